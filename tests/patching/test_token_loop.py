"""The token loop of whole steps: what transformers' gives, by fewer calls around each step."""

import copy
import math
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers import StoppingCriteriaList as Criteria

from dart_llm.models.growing_cache import GrowingLayer, GrowingSlidingLayer
from dart_llm.models.token_loop import TokenLoop
from dart_llm.patching import patch
from dart_llm.patching.executors import native_step
from dart_llm.session.run import prune
from engine_cases import tokenizer
from steps import new_cache, selections, shared_model, step
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

PROMPT, NEW = tokens(1, 24, seed=5), 24
SAMPLED = {"do_sample": True, "top_k": 0}
OFF = {"eos_token_id": None, "do_sample": False}


@pytest.fixture
def count(monkeypatch):
    """How often the own loop ran, and how many tokens passed the model by."""
    result = {"loops": 0, "steps": 0}
    loop, decode = TokenLoop._decode, patch.ModelPatch._decode

    def counted_loop(self, *given):
        result["loops"] += 1
        return loop(self, *given)

    def counted_step(self, ids, cache, forbidden):
        logits = decode(self, ids, cache, forbidden)
        result["steps"] += logits is not None
        return logits

    monkeypatch.setattr(TokenLoop, "_decode", counted_loop)
    monkeypatch.setattr(patch.ModelPatch, "_decode", counted_step)
    return result


class Streamer:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.clone())

    def end(self):
        self.got.append("end")


class Seen(StoppingCriteria):
    """Notes what it is asked with, does ``act`` and stops at ``length``."""

    def __init__(self, length=None, act=lambda ids: None):
        self.length, self.act, self.got = length, act, []

    def __call__(self, input_ids, scores, **kwargs):
        self.got.append((input_ids.clone(), scores))
        self.act(input_ids)
        return torch.tensor([input_ids.shape[1] == self.length])


class Steered(LogitsProcessor):
    """Notes ids and scores, and writes into the scores."""

    def __init__(self):
        self.got = []

    def __call__(self, input_ids, scores):
        self.got.append((input_ids.clone(), scores.clone()))
        scores[:, int(input_ids[0, -1]) :: 2] = -1e9
        return scores


def flat(value):
    """Tensors in it, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for one in value for t in flat(one)]
    return []


def both(monkeypatch, ask, name="llama", method="griffin", dtype=torch.float32, **settings):
    """What ``ask(model)`` gives with transformers' loop and with the own one, and their runs."""
    result, runs, model = [], [], shared_model(name, dtype)
    for own in (False, True):
        with monkeypatch.context() as change:
            if not own:
                change.setattr(patch, "can_stand_in", lambda model, original: False)
            how = {"sparsity": 0.5, "executor": "native", **settings}
            with prune(model, method, **how) as run:
                masks = selections(run)
                torch.manual_seed(7)
                result.append([ask(model), torch.rand(1)])
            runs.append((run, masks))
    assert len(flat(result[0])) == len(flat(result[1]))
    for theirs, ours in zip(flat(result[0]), flat(result[1]), strict=True):
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours)
    reports = [run.report() for run, _ in runs]
    assert reports[0].decoded_tokens == reports[1].decoded_tokens
    assert reports[0].achieved_sparsity == reports[1].achieved_sparsity
    assert [at for at, _, _ in runs[0][1]] == [at for at, _, _ in runs[1][1]]
    return result[1][0], runs[1][0]


def generated(model, **how):
    return model.generate(PROMPT, **{"max_new_tokens": NEW, **OFF, **how})


ASKED = {
    "greedy": {},
    "long": {"max_new_tokens": 300},
    "one token": {"max_new_tokens": 1},
    "sampled": SAMPLED,
    "warped": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "penalties": {**SAMPLED, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "length": {"max_new_tokens": None, "max_length": 40},
    "shortest length": {"min_length": 40, "eos_token_id": list(range(50)), **SAMPLED},
    "nonsense ends": {"min_new_tokens": 4, "eos_token_id": [95, 96, 1000]},
    "a mask": {"attention_mask": torch.ones_like(PROMPT)},
    "time": {"max_time": 1000.0},
    "narrow": {},
}


@pytest.mark.parametrize("case", ASKED)
def test_tokens_and_random_numbers_are_those_of_transformers_loop(monkeypatch, count, case):
    dtype = torch.bfloat16 if case == "narrow" else torch.float32
    ids, run = both(monkeypatch, lambda model: generated(model, **ASKED[case]), dtype=dtype)
    grown = case == "long"  # more room for the cache is made by a call of the model
    assert count == {"loops": 1, "steps": max(0, ids.shape[1] - 24 - 2) - grown}
    assert run.report().decoded_tokens == ids.shape[1] - 24 - 1


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt2"])
def test_windows_and_what_is_returned(monkeypatch, count, name):
    """The cache too, over more tokens than its rooms and windows hold."""

    def ask(model):
        made = generated(model, max_new_tokens=330, return_dict_in_generate=True)
        assert made.scores is made.logits is made.attentions is made.hidden_states is None
        lengths = [layer.get_seq_length() for layer in made.cache.layers]
        shown = [(layer.keys, layer.values) for layer in made.cache.layers]
        return [made.sequences, shown, torch.tensor(lengths)]

    both(monkeypatch, ask, name)
    assert count["loops"] == 1 and 328 > count["steps"] >= 326


def test_ends_of_a_text(monkeypatch, count):
    ids, _ = both(monkeypatch, generated)
    ends = [int(ids[0, 24 + 5]), 1]
    made, _ = both(monkeypatch, lambda model: generated(model, eos_token_id=ends))
    first = int((ids[0, 24:] == ends[0]).nonzero()[0])
    assert made.shape[1] == 24 + first + 1
    settings = {"eos_token_id": ends, "min_new_tokens": first + 3}
    made, _ = both(monkeypatch, lambda model: generated(model, **settings))
    assert made.shape[1] > 24 + first + 1
    word = tokenizer().decode(ids[0, 30:32])
    settings = {"stop_strings": [word], "tokenizer": tokenizer()}
    made, run = both(monkeypatch, lambda model: generated(model, **settings))
    assert 24 < made.shape[1] <= 32 and run.report().executor == "native, whole steps"
    assert count["loops"] == 3  # a tokenizer does not come through to a loop of one's own


def test_streamers_criteria_and_processors_are_asked_the_same(monkeypatch, count):
    def ask(model):
        streamer, seen, steered = Streamer(), Seen(24 + 9), Steered()
        made = generated(
            model,
            streamer=streamer,
            stopping_criteria=Criteria([seen]),
            logits_processor=LogitsProcessorList([steered]),
            repetition_penalty=1.1,
        )
        assert made.shape[1] == 24 + 9 and len(seen.got) == len(steered.got) == 9
        assert streamer.got[-1] == "end" and len(streamer.got) == 11
        return [made, streamer.got, seen.got, steered.got]

    both(monkeypatch, ask)
    assert count == {"loops": 1, "steps": 7}


def _given_cache(model):
    """A text in three parts, of which the second begins in the middle of a cache."""
    cache = new_cache(model)
    first = generated(model, cache=cache, max_new_tokens=6)
    more = torch.cat([first, PROMPT[:, :5]], 1)
    second = model.generate(more, cache=cache, max_new_tokens=6, **OFF)
    third = generated(model, max_new_tokens=6)
    return [first, second, third, [layer.keys for layer in cache.layers]]


def _onlooker(model):
    """Reads the whole cache after every token."""
    cache, seen = new_cache(model), []
    look = Seen(act=lambda ids: seen.append([layer.keys.clone() for layer in cache.layers]))
    made = generated(model, cache=cache, stopping_criteria=Criteria([look]))
    assert seen[-1][0].shape[2] == made.shape[1] - 1
    return [made, seen, [layer.values for layer in cache.layers]]


def _hooked(model):
    """Steers a layer for four tokens."""
    handles = []

    def act(ids):
        if ids.shape[1] == 24 + 6:
            hook = lambda module, args, out: out + torch.linspace(-1, 1, 32)  # noqa: E731
            handles.append(model.model.layers[1].register_forward_hook(hook))
        if ids.shape[1] == 24 + 10:
            handles.pop().remove()

    return generated(model, stopping_criteria=Criteria([Seen(act=act)]))


def _hooked_root(model):
    """Sees every call of the model, with what transformers gives it."""
    calls = []

    def look(module, args, kwargs):
        positions = kwargs["position_ids"][:, -1:].clone()
        calls.append([kwargs["input_ids"].clone(), positions])

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    made = generated(model)
    handle.remove()
    assert len(calls) == NEW
    return [made, calls]


def _cropped(model):
    """Takes two positions back in the middle: from then on positions are not the cache's."""
    cache = new_cache(model)

    def act(ids):
        if ids.shape[1] == 24 + 6:
            cache.crop(-2)

    return generated(model, cache=cache, stopping_criteria=Criteria([Seen(act=act)]))


def _copied(model):
    """Copies of a cache in the middle go on by themselves."""
    cache, copies = new_cache(model), []

    def act(ids):
        if ids.shape[1] == 24 + 6:
            copies.extend([copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))])

    made = generated(model, cache=cache, stopping_criteria=Criteria([Seen(act=act)]))
    growing = (GrowingLayer, GrowingSlidingLayer)
    assert not any(isinstance(layer, growing) for one in copies for layer in one.layers)
    with torch.no_grad():
        return [made, [step(model, made[:, 29:30], one) for one in copies]]


def _inference(model):
    """In inference mode, and with the cache from there in another."""
    with torch.inference_mode():
        made = generated(model, return_dict_in_generate=True)
        both = [layer.keys.sum() for layer in made.cache.layers]
    logits = [step(model, PROMPT[:, :1], made.cache) for _ in range(3)]
    return [made.sequences, both, logits, [layer.values for layer in made.cache.layers]]


TOUCHED = {
    "given cache": (_given_cache, 12),
    "onlooker": (_onlooker, 22),
    "hooked": (_hooked, 5 + 12),
    "hooked root": (_hooked_root, 0),
    "cropped": (_cropped, 4),
    "copied": (_copied, 22),
    "inference": (_inference, 22),
}


@pytest.mark.parametrize("case", TOUCHED)
def test_whoever_looks_or_changes_something_between_steps(monkeypatch, count, case):
    ask, steps = TOUCHED[case]
    both(monkeypatch, ask)
    assert count["loops"] == (3 if case == "given cache" else 1)
    assert count["steps"] == steps


def test_masks_that_change_while_it_runs(monkeypatch, count):
    """Observed tokens, re-masks, tokens that the model runs itself for a signal."""
    settings = {"self_stats": {"sequences": 2, "length": 24, "opening": 0}}
    for method, drift in (("griffin", "interval 4"), ("dart", None), ("dart-prompt", None)):
        how = settings if drift is None else {"drift": drift, "remask": {"observe_tokens": 2}}
        _, run = both(monkeypatch, generated, method=method, **how)
        assert run.report().decoded_tokens == NEW - 1
    assert count["loops"] == 3


def _two_rows(model):
    return model.generate(PROMPT.repeat(2, 1), max_new_tokens=8, **OFF)


def _padded(model):
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    return generated(model, attention_mask=mask)


def _own(model):
    def method(model, input_ids, **given):
        return input_ids + 1

    return generated(model, custom_generate=method)


LEFT = {
    "scores": lambda model: generated(model, output_scores=True, return_dict_in_generate=True)[1],
    "rows": _two_rows,
    "several": lambda model: generated(model, num_return_sequences=2, **SAMPLED),
    "beams": lambda model: generated(model, num_beams=2),
    "padding": _padded,
    "embeddings": lambda model: model.generate(
        inputs_embeds=model.get_input_embeddings()(PROMPT), max_new_tokens=8, **OFF
    ),
    "candidates": lambda model: generated(model, prompt_lookup_num_tokens=3),
    "static": lambda model: generated(model, cache_implementation="static"),
    "chunks": lambda model: generated(model, prefill_chunk_size=9),
    "another method": _own,
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_transformers(monkeypatch, count, case):
    both(monkeypatch, LEFT[case])
    assert count == {"loops": 0, "steps": 0}


def test_other_executors_and_models_with_methods_of_their_own(monkeypatch, count):
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5, executor="compact"):
        generated(model)
    own = type(model)._update_model_kwargs_for_generation
    with monkeypatch.context() as change:
        change.setattr(
            type(model), "_update_model_kwargs_for_generation", lambda *a, **k: own(*a, **k)
        )
        both(monkeypatch, generated)
    assert count["loops"] == 0


def test_an_interrupt_leaves_a_model_that_goes_on(monkeypatch):
    """In a streamer, and between the plan of a forward and the forward."""
    model = shared_model()

    class Interrupted(Streamer):
        def put(self, value):
            super().put(value)
            if len(self.got) == 6:
                raise KeyboardInterrupt

    with prune(model, "griffin", sparsity=0.5, executor="native"):
        wanted = generated(model)
        with pytest.raises(KeyboardInterrupt):
            generated(model, streamer=Interrupted())
        assert torch.equal(generated(model), wanted)
    prior = {"sequences": 2, "length": 24, "opening": 0}
    with prune(model, "dart-prompt", sparsity=0.5, executor="native", self_stats=prior):
        wanted = generated(model)
        prepare = type(model).prepare_inputs_for_generation

        def interrupted(self, ids, **given):
            if ids.shape[1] > 28:
                raise KeyboardInterrupt
            return prepare(self, ids, **given)

        with monkeypatch.context() as change:
            change.setattr(type(model), "prepare_inputs_for_generation", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generated(model)
        assert torch.equal(generated(model), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_growing_layer_is_one_of_transformers(name):
    model = shared_model(name)
    with prune(model, "griffin", sparsity=0.5, executor="native"):
        cache = new_cache(model)
        step(model, PROMPT, cache)
        kinds = [type(layer) for layer in cache.layers]
        for at in range(10):
            step(model, PROMPT[:, at : at + 1], cache)
        for layer, kind in zip(cache.layers, kinds, strict=True):
            assert layer.buffers is not None and isinstance(layer, kind)
            assert layer.get_seq_length() == 34 and layer.is_initialized
            assert not hasattr(layer, "nothing")
            assert layer.keys.shape[2] == min(34, getattr(layer, "sliding_window", 99) - 1)
            assert hasattr(layer, "cumulative_length") == layer.is_sliding
        step(model, PROMPT[:, :1], cache)
        layer = cache.layers[0]
        layer.values = None
        assert layer.buffers is None and layer.keys.shape[2] in (23, 35)
        other = cache.layers[1]
        del cache  # a layer outlives it
        assert other.get_seq_length() == 35 and other.keys.shape[2] in (23, 35)
        assert isinstance(new_cache(model), DynamicCache)


def test_another_thread_may_read_the_cache():
    model, stop, seen = shared_model("gemma3"), threading.Event(), []
    with prune(model, sparsity=0.0, executor="native"):
        wanted = generated(model)
        for _ in range(4):
            cache = new_cache(model)

            def look(cache=cache):
                while not stop.wait(0.0005):
                    seen.append([layer.keys for layer in cache.layers if layer.is_initialized])

            reader = threading.Thread(target=look)
            reader.start()
            try:
                assert torch.equal(generated(model, cache=cache), wanted)
            finally:
                stop.set()
                reader.join()
                stop.clear()
            assert {layer.get_seq_length() for layer in cache.layers} == {PROMPT.shape[1] + NEW - 1}
    assert seen


def test_what_a_user_sets_on_the_model_or_around_it(monkeypatch, count):
    """A method of the instance is called; a default device is none of a step's."""
    model = shared_model()
    own, calls = model.prepare_inputs_for_generation, []

    def prepare(*args, **kwargs):
        calls.append(args[0].shape[1])
        return own(*args, **kwargs)

    with prune(model, sparsity=0.0, executor="native"):
        with torch.device("meta"):
            first = generated(model)
        with monkeypatch.context() as change:
            change.setattr(model, "prepare_inputs_for_generation", prepare)
            assert torch.equal(generated(model), first)
    assert len(calls) == NEW and count["loops"] == 1


class Twice:
    """A native object, each of whose steps is taken for logits and for the likeliest tokens."""

    def __init__(self, native):
        self.native, self.chosen = native, []

    def __getattr__(self, name):
        return getattr(self.native, name)

    def step(self, *given):
        logits, _ = self.native.step(*given[:-1], None)
        tokens, hidden = self.native.step(*given[:-1], [])
        assert tokens.dtype == torch.int64 and tokens.shape == logits.shape[:1]
        scores = logits.float().numpy()
        assert tokens.tolist() == scores.argmax(-1).tolist()
        others, _ = self.native.step(*given[:-1], [*tokens.tolist(), 9999])
        scores[:, tokens] = -math.inf
        assert others.tolist() == scores.argmax(-1).tolist()
        self.chosen += tokens.tolist()
        return (logits if given[-1] is None else tokens), hidden


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["distinct", "equal", "no numbers"])
def test_the_likeliest_token_of_a_step_is_the_first_of_its_largest_logits(
    monkeypatch, head, dtype, name, rows
):
    """A vocabulary of several parts, whose second half may equal the first one; caps of logits."""
    model = tiny(name, dtype=dtype, vocab_size=5003, tie_word_embeddings=False)
    if head == "equal":
        model.lm_head.weight.data[2501:5002] = model.lm_head.weight.data[:2501]
    if head == "no numbers":
        model.lm_head.weight.data[[4000, 2222, 3333]] = torch.nan
    made, native = native_step._decoder, []

    def twice(*given):
        native.append(Twice(made(*given)))
        return native[-1]

    monkeypatch.setattr(native_step, "_decoder", twice)
    with prune(model, sparsity=0.0, executor="native"):
        model.generate(tokens(rows, 24), max_new_tokens=12, **OFF)
    (one,) = native
    assert len(one.chosen) == 11 * rows
    if head == "equal":
        assert max(one.chosen) < 2501
    if head == "no numbers":
        assert set(one.chosen) == {2222}


def test_scores_are_only_made_where_somebody_reads_them(monkeypatch, count):
    forbidden, run = [], native_step.NativeDecoder.step

    def noted(self, call, observe):
        forbidden.append(call.forbidden)
        return run(self, call, observe)

    monkeypatch.setattr(native_step.NativeDecoder, "step", noted)
    model = shared_model()

    def greedy_steps(**how):
        forbidden.clear()
        with prune(model, sparsity=0.0, executor="native"):
            generated(model, **how)
        assert len(forbidden) == NEW - 1
        return [one for one in forbidden if one is not None]

    ends = {"eos_token_id": [95, 1000], "min_new_tokens": 4}
    known = NEW - 2  # the first step is a call of the model
    assert greedy_steps() == [[]] * known
    assert greedy_steps(**ends) == [[95, 1000]] * 2 + [[]] * (known - 2)  # three had come before
    assert greedy_steps(logits_processor=LogitsProcessorList([Steered()])) == []
    assert greedy_steps(**SAMPLED) == []
