"""The token loop of whole steps: what transformers' gives, by fewer calls around each step."""

import copy
import math
import pickle
import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers import StoppingCriteriaList as Criteria

from dart_llm.models import growing_cache
from dart_llm.models.growing_cache import GrowingLayer, GrowingSlidingLayer
from dart_llm.models.token_loop import TokenLoop
from dart_llm.patching import patch
from dart_llm.session.run import prune
from engine_cases import tokenizer
from prior_cases import SMALL
from steps import new_cache, selections, shared_model, step
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

PROMPT, NEW = tokens(1, 24, seed=5), 24
SAMPLED = {"do_sample": True, "top_k": 0}
OFF = {"eos_token_id": None, "do_sample": False}


@pytest.fixture
def count(monkeypatch):
    """How often our loop ran, and how many tokens passed the model by."""
    result = {"loops": 0, "steps": 0}
    loop, decode = TokenLoop._decode, patch.ModelPatch.decode

    def counted_loop(self, *arguments):
        result["loops"] += 1
        return loop(self, *arguments)

    def counted_step(self, ids, cache, forbidden):
        logits = decode(self, ids, cache, forbidden)
        result["steps"] += logits is not None
        return logits

    monkeypatch.setattr(TokenLoop, "_decode", counted_loop)
    monkeypatch.setattr(patch.ModelPatch, "decode", counted_step)
    return result


class Streamer:
    def __init__(self, act=lambda tokens: None):
        self.tokens, self.act = [], act

    def put(self, value):
        self.tokens.append(value.clone())
        self.act(self.tokens)

    def end(self):
        self.tokens.append("end")


class Seen(StoppingCriteria):
    """Notes what it is called with, does ``act`` and stops at ``length``."""

    def __init__(self, length=None, act=lambda ids: None):
        self.length, self.act, self.calls = length, act, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.clone(), scores))
        self.act(input_ids)
        return torch.tensor([input_ids.shape[1] == self.length])


class Steered(LogitsProcessor):
    """Notes ids and scores, and writes into the scores."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        scores[:, int(input_ids[0, -1]) :: 2] = -1e9
        return scores


def flat(value):
    """Tensors in it, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in flat(part)] if isinstance(value, (list, tuple)) else []


def both(monkeypatch, ask, name="llama", method="griffin", dtype=torch.float32, **settings):
    """What ``ask(model)`` gives with our loop, and the run; transformers' loop gives the same."""
    result, runs, model = [], [], shared_model(name, dtype)
    for ours in (False, True):
        with monkeypatch.context() as change:
            if not ours:
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
    first, second = (run.report() for run, _ in runs)
    assert first.decoded_tokens == second.decoded_tokens
    assert first.achieved_sparsity == second.achieved_sparsity
    assert [at for at, _, _ in runs[0][1]] == [at for at, _, _ in runs[1][1]]
    return result[1][0], runs[1][0]


def generated(model, **how):
    return model.generate(PROMPT, **{"max_new_tokens": NEW, **OFF, **how})


SETTINGS = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "warped": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "penalties": {**SAMPLED, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "shortest length": {"min_length": 40, "eos_token_id": list(range(50)), **SAMPLED},
    "nonsense ends": {"min_new_tokens": 4, "eos_token_id": [95, 96, 1000], "max_time": 1000.0},
    "bfloat16": {"max_new_tokens": None, "max_length": 40},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_tokens_and_random_numbers_are_those_of_transformers_loop(monkeypatch, count, case):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    ids, run = both(monkeypatch, lambda model: generated(model, **SETTINGS[case]), dtype=dtype)
    assert count == {"loops": 1, "steps": max(0, ids.shape[1] - 24 - 2)}
    assert run.report().decoded_tokens == ids.shape[1] - 24 - 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
def test_windows_and_what_is_returned(monkeypatch, count, name):
    """The cache too, over more tokens than its buffers and windows hold."""
    monkeypatch.setattr(growing_cache, "ROOM", 32)

    def ask(model):
        made = generated(model, max_new_tokens=60, return_dict_in_generate=True)
        assert made.scores is made.logits is made.attentions is made.hidden_states is None
        lengths = [layer.get_seq_length() for layer in made.cache.layers]
        shown = [(layer.keys, layer.values) for layer in made.cache.layers]
        return [made.sequences, shown, torch.tensor(lengths)]

    both(monkeypatch, ask, name)
    assert count["loops"] == 1 and 58 > count["steps"] > 50  # more room is made by the model


def test_ends_of_a_sequence(monkeypatch, count):
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


def test_streamers_criteria_and_processors_get_the_same(monkeypatch, count):
    def ask(model):
        streamer, seen, steered = Streamer(), Seen(24 + 9), Steered()
        made = generated(
            model,
            streamer=streamer,
            stopping_criteria=Criteria([seen]),
            logits_processor=LogitsProcessorList([steered]),
            repetition_penalty=1.1,
        )
        assert made.shape[1] == 24 + 9 and len(seen.calls) == len(steered.calls) == 9
        assert streamer.tokens[-1] == "end" and len(streamer.tokens) == 11
        return [made, streamer.tokens, seen.calls, steered.calls]

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
        calls.append([kwargs["input_ids"].clone(), kwargs["position_ids"][:, -1:].clone()])

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    made = generated(model)
    handle.remove()
    assert len(calls) == NEW
    return [made, calls]


def _cropped(model):
    """Takes two positions back in the middle: from then on positions are not the cache's."""
    cache = new_cache(model)
    crop = Seen(act=lambda ids: cache.crop(-2) if ids.shape[1] == 24 + 6 else None)
    return generated(model, cache=cache, stopping_criteria=Criteria([crop]))


def _copied(model):
    """Copies of a cache in the middle are plain ones, and can be continued."""
    cache, copies = new_cache(model), []

    def act(ids):
        if ids.shape[1] == 24 + 6:
            copies.extend([copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))])

    made = generated(model, cache=cache, stopping_criteria=Criteria([Seen(act=act)]))
    growing = (GrowingLayer, GrowingSlidingLayer)
    assert not any(isinstance(layer, growing) for one in copies for layer in one.layers)
    with torch.no_grad():
        return [made, [step(model, made[:, 29:30], one) for one in copies]]


TOUCHED = {
    "given cache": (_given_cache, 12),
    "onlooker": (_onlooker, 22),
    "hooked": (_hooked, 5 + 12),
    "hooked root": (_hooked_root, 0),
    "cropped": (_cropped, 4),
    "copied": (_copied, 22),
}
"""Users that look at or change something between steps, and how many steps are taken natively."""


@pytest.mark.parametrize("case", TOUCHED)
def test_users_between_steps(monkeypatch, count, case):
    ask, steps = TOUCHED[case]
    both(monkeypatch, ask)
    assert count == {"loops": 3 if case == "given cache" else 1, "steps": steps}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_of_a_growing_cache_show_the_positions_that_they_keep(name):
    model = shared_model(name)
    with prune(model, "griffin", sparsity=0.5, executor="native"):
        cache = new_cache(model)
        for ids in (PROMPT, *PROMPT[:, :10].split(1, 1)):
            step(model, ids, cache)
        for layer in cache.layers:
            assert layer.buffers is not None and layer.get_seq_length() == 34
            assert layer.keys.shape[2] == min(34, getattr(layer, "sliding_window", 99) - 1)


def test_masks_that_change_while_it_runs(monkeypatch, count):
    """Observed tokens, re-masks, tokens that the model runs itself for a signal."""
    often = {"drift": "interval 4", "remask": {"observe_tokens": 2}}
    for method in ("griffin", "dart", "dart-prompt"):
        settings = often if method == "griffin" else {"self_stats": SMALL}
        _, run = both(monkeypatch, generated, method=method, **settings)
        assert run.report().decoded_tokens == NEW - 1
    assert count["loops"] == 3


def test_tokens_of_one_plan_are_counted_together_and_in_time(monkeypatch):
    """Only the first of them is planned, and reports count all of them, even while it generates."""
    model, planned, seen = shared_model("llama"), [], []
    with prune(model, "griffin", sparsity=0.5, executor="native") as run:
        before = run.controller.before_forward
        monkeypatch.setattr(
            run.controller, "before_forward", lambda call: (planned.append(call), before(call))[1]
        )
        streamer = Streamer(lambda tokens: len(tokens) > 1 and seen.append(run.report()))
        generated(model, streamer=Streamer())
        assert len(planned) == 2  # the prompt, and all steps after it
        assert run.report().decoded_tokens == NEW - 1
        generated(model, streamer=streamer)
    assert [report.decoded_tokens for report in seen] == [NEW - 1 + n for n in range(NEW)]


LEFT = {
    "scores": lambda model: generated(model, output_scores=True, return_dict_in_generate=True)[1],
    "rows": lambda model: model.generate(PROMPT.repeat(2, 1), max_new_tokens=8, **OFF),
    "several": lambda model: generated(model, num_return_sequences=2, **SAMPLED),
    "beams": lambda model: generated(model, num_beams=2),
    "padding": lambda model: generated(model, attention_mask=(torch.arange(24)[None] > 2).long()),
    "embeddings": lambda model: model.generate(
        inputs_embeds=model.get_input_embeddings()(PROMPT), max_new_tokens=8, **OFF
    ),
    "candidates": lambda model: generated(model, prompt_lookup_num_tokens=3),
    "static": lambda model: generated(model, cache_implementation="static"),
    "chunks": lambda model: generated(model, prefill_chunk_size=9),
    "another method": lambda model: generated(model, custom_generate=lambda m, ids, **_: ids + 1),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_transformers(monkeypatch, count, case):
    both(monkeypatch, LEFT[case])
    assert count == {"loops": 0, "steps": 0}


def test_other_executors_and_what_users_change(monkeypatch, count):
    """Methods of a class are transformers' or the loop is; one of the instance is called."""
    model = shared_model()
    with prune(model, "griffin", sparsity=0.5, executor="compact"):
        generated(model)
    update = type(model)._update_model_kwargs_for_generation
    with monkeypatch.context() as change:
        name = "_update_model_kwargs_for_generation"
        change.setattr(type(model), name, lambda *a, **k: update(*a, **k))
        both(monkeypatch, generated)
    assert count["loops"] == 0
    original, calls = model.prepare_inputs_for_generation, []

    def prepare(*args, **kwargs):
        calls.append(args[0].shape[1])
        return original(*args, **kwargs)

    with prune(model, sparsity=0.0, executor="native"):
        with torch.device("meta"):  # a default device is none of a step's
            first = generated(model)
        with monkeypatch.context() as change:
            change.setattr(model, "prepare_inputs_for_generation", prepare)
            assert torch.equal(generated(model), first)
    assert len(calls) == NEW and count["loops"] == 1


def test_a_model_can_be_used_after_an_interrupt(monkeypatch):
    """In a streamer, and between the plan of a forward and the forward."""

    def interrupt(tokens):
        if len(tokens) == 6:
            raise KeyboardInterrupt

    model, prepare = shared_model(), type(shared_model()).prepare_inputs_for_generation
    with prune(model, "griffin", sparsity=0.5, executor="native"):
        expected = generated(model)
        with pytest.raises(KeyboardInterrupt):
            generated(model, streamer=Streamer(interrupt))
        assert torch.equal(generated(model), expected)

    def interrupted(self, ids, **kwargs):
        if ids.shape[1] > 28:
            raise KeyboardInterrupt
        return prepare(self, ids, **kwargs)

    with prune(model, "dart-prompt", sparsity=0.5, executor="native", self_stats=SMALL):
        expected = generated(model)
        with monkeypatch.context() as change:
            change.setattr(type(model), "prepare_inputs_for_generation", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generated(model)
        assert torch.equal(generated(model), expected)


class Twice:
    """A native object, each of whose steps is taken for logits and for the likeliest tokens."""

    def __init__(self, native):
        self.native, self.chosen = native, []

    def __getattr__(self, name):
        return getattr(self.native, name)

    def step(self, *arguments):
        logits, _ = self.native.step(*arguments[:-1], None)
        tokens, hidden = self.native.step(*arguments[:-1], [])
        assert tokens.dtype == torch.int64 and tokens.shape == logits.shape[:1]
        scores = logits.float().numpy()
        assert tokens.tolist() == scores.argmax(-1).tolist()
        others, _ = self.native.step(*arguments[:-1], [*tokens.tolist(), 9999])
        scores[:, tokens] = -math.inf
        assert others.tolist() == scores.argmax(-1).tolist()
        self.chosen += tokens.tolist()
        return (logits if arguments[-1] is None else tokens), hidden


@pytest.mark.parametrize(
    ("head", "dtype", "name", "rows"),
    [
        ("distinct", torch.float32, "llama", 1),
        ("distinct", torch.bfloat16, "gemma2", 3),
        ("equal", torch.float32, "gemma2", 1),
        ("equal", torch.bfloat16, "llama", 3),
        ("nan", torch.float32, "llama", 3),
        ("nan", torch.bfloat16, "llama", 1),
    ],
)
def test_the_likeliest_token_of_a_step_is_the_first_of_its_largest_logits(head, dtype, name, rows):
    """A vocabulary of several parts, whose second half may equal the first one; caps of logits."""
    model = tiny(name, dtype=dtype, vocab_size=5003, tie_word_embeddings=False)
    if head == "equal":
        model.lm_head.weight.data[2501:5002] = model.lm_head.weight.data[:2501]
    if head == "nan":
        model.lm_head.weight.data[[4000, 2222, 3333]] = torch.nan
    with prune(model, sparsity=0.0, executor="native") as run:
        steps = run.patch.whole_steps
        steps.native = Twice(steps.native)
        model.generate(tokens(rows, 24), max_new_tokens=12, **OFF)
        chosen = steps.native.chosen
        steps.native = steps.native.native
    assert len(chosen) == 11 * rows
    assert head != "equal" or max(chosen) < 2501
    assert head != "nan" or set(chosen) == {2222}


def test_the_times_of_a_step_by_part():
    model = tiny("llama")
    with prune(model, sparsity=0.0, executor="native") as run:
        native = run.patch.whole_steps.native
        model.generate(tokens(1, 24), max_new_tokens=3, **OFF)
        with pytest.raises(RuntimeError, match="nobody timed the last step"):
            native.part_seconds()
        native.time_parts(True)
        began = time.perf_counter()
        model.generate(tokens(1, 24), max_new_tokens=3, **OFF)
        elapsed = time.perf_counter() - began
    embedding, qkv, attention, output, activations, ffn, sums, head = native.part_seconds()
    assert activations == 0, "only packed FFNs compute them apart"
    parts = (embedding, qkv, attention, output, ffn, sums, head)
    assert min(parts) > 0 and sum(parts) < elapsed
