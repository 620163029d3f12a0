"""Self-calibration: once per model, cached, the model left as it was; text that it writes."""

import functools
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load, save

from damage import DAMAGES, TENSOR_DAMAGES
from dart_llm import cache as kept
from dart_llm.calibration import progress
from dart_llm.calibration.collect import (
    FISHER,
    likeliest,
    opening_ids,
    sample_continuations,
    start_ids,
)
from dart_llm.calibration.self_calibration import BASIS, SCORE, calibrate, observing, wanted
from dart_llm.calibration.self_calibration import self_calibrate as learn
from dart_llm.data import texts
from dart_llm.errors import AttachError, ConfigError, DartError
from dart_llm.models.calls import cache_name
from dart_llm.models.checkpoint import remember_tokenizer
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL, layers_of
from steps import CACHE, Same, decode, forward_lengths, new_cache, same_masks, shared_model
from tiny import HIDDEN, LAYERS, VOCAB, WIDTH, tiny, tokens

IDS = tokens(1, 30, seed=3)
GRIFFIN = PruneConfig.build("griffin", sparsity=0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    return tmp_path


def masks_of(model, config=CONFIG, **changes):
    with prune(model, config, **changes) as run:
        decode(model, IDS, 20)
    return list(run.masks().values())


PARTS = 2
"""Files of what a configuration learns: the text, and its statistics."""

ONE_BY_ONE = [1] * 23
"""Two sequences of 24 tokens, of which the first is given."""

ALL = [*ONE_BY_ONE, 24, 24]
"""Then a forward for the bases, and one forward and backward."""


def lengths(model, config=CONFIG, **changes):
    """The forwards that attaching makes."""
    return forward_lengths(model, lambda: prune(model, config, **changes).attach().detach())


def files(cache):
    return sorted((cache / "dart-llm" / "calibration").glob("*"))


def learned(model, cache, config=CONFIG, news=None):
    """The model's layers with what was learned."""
    news = [] if news is None else news
    return learn(model, config, layers_of(model), str(cache), news.append)


def tensors(layers):
    result = []
    for layer in layers:
        sums = layer.self_stats.evidence.sums
        result += [sums[name].mean for name in sorted(sums)]
        result += [t for t in (layer.fisher, layer.basis) if t is not None]
    return result


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_a_model_learns_once(cache):
    model, other, anew = tiny(), tiny(), tiny()
    assert lengths(model) == ALL and lengths(model) == []
    assert len(files(cache)) == PARTS
    # the disk gives the same to another object, to the bit
    first = tensors(learned(model, cache))
    assert lengths(other) == [] and equal(tensors(learned(other, cache)), first)
    for path in files(cache):
        path.unlink()
    assert lengths(anew) == ALL
    logits = []
    for one in (model, other, anew):
        with prune(one, CONFIG) as run:
            logits.append(decode(one, IDS, 20))
        assert equal(tensors(run.layers), first), "the text is seeded"
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_what_changes_the_text():
    model = tiny()
    lengths(model)
    parts = ({"temperature": 1.0}, {"top_p": 1.0}, {"length": 23}, {"sequences": 3})
    for changes in ({"seed": 1}, *({"self_stats": part} for part in parts)):
        assert len(lengths(model, **changes)) >= 24, changes
        assert lengths(model, **changes) == lengths(model) == [], "the first is known still"


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    blocked, news, model = tmp_path / "file", [], tiny()
    blocked.write_text("")
    learned(model, blocked, news=news)
    assert news[:2] == [
        "learning from self-generated text, once per model; griffin and dart-prompt learn nothing",
        "without a tokenizer self-generated text begins with the model's start token",
    ]
    assert len(news) == 4
    assert news[2].startswith("the learned statistics were not cached: the cache folder")
    assert forward_lengths(model, lambda: learned(model, blocked)) == []


def test_what_does_not_fit_is_refused_before_anything_runs(cache, monkeypatch):
    """In one sentence that names ways out; the estimate by hand."""
    model, kept = tiny(), 2 * 2 * 8 * LAYERS  # heads of 8, of which two are kept
    assert progress.text_bytes(model, 3, 10) == 4 * 3 * (2 * 10 * kept + 4 * VOCAB)
    each = 16 * HIDDEN + 16 * WIDTH // 3
    assert progress.graph_bytes(model, 5, True) == 4 * 5 * (each * LAYERS + 4 * VOCAB)
    assert progress.graph_bytes(model, 5, False) == 4 * 5 * (each + VOCAB)
    glass = PruneConfig.build("glass", calibration={"sequences": 4, "length": 16})
    monkeypatch.setattr(progress, "available", lambda: 30_000)
    refused = (
        r"^learning needs 0\.\d MB of memory in addition to this model, "
        r"but only 0\.0 MB is free: .*"
    )
    for call in (
        lambda: prune(model, CONFIG).attach(),
        lambda: calibrate(model, None, glass, None, None, print),
    ):
        with pytest.raises(ConfigError, match=refused):
            call()
    assert files(cache) == []
    monkeypatch.setattr(progress, "available", lambda: 1 << 40)
    monkeypatch.setattr(progress, "LARGE", 0)
    learned(model, cache, news=(news := []))
    assert re.match(r"learning .*, once per model, 0\.\d MB of memory; griffin", news[0])


def test_nothing_is_learned_where_nothing_is_chosen(cache):
    for one in ({"sparsity": 0.0}, {"budget": {"table": "all:1.0"}}, {"masks": {0: range(20)}}):
        assert lengths(tiny(), CONFIG.replace({"sparsity": None}), **one) == [], one
    assert files(cache) == []


def test_what_each_configuration_reads(cache):
    layers = layers_of(tiny())
    sums = [SCORE, "signed", "features"]
    for changes, names in (
        ({}, [FISHER, BASIS, *sums]),
        ({"score": "max"}, [BASIS, *sums]),
        ({"score": "weight", "compensation": False}, []),
        ({"budget": "depth", "compensation_rank": 0}, [FISHER, SCORE, "signed", "sensitivity"]),
        ({"self_stats": {"tokens": 0}}, [FISHER, BASIS]),
    ):
        assert wanted(CONFIG.replace(changes), layers) == names, changes
    assert wanted(GRIFFIN, layers) == []
    token = PruneConfig.build("dart-token", sparsity=0.5, score="magnitude", self_stats=SMALL)
    assert wanted(token, layers) == [FISHER, SCORE, "signed"], "tokens choose by gradients"
    model = tiny()
    assert lengths(model, CONFIG.replace({"compensation_rank": 0})) == [*ONE_BY_ONE, 24]


def test_one_text_serves_all_configurations(cache):
    """And what does not decide the statistics makes nothing anew."""
    model, alone = tiny(), tiny()
    lengths(model)
    assert lengths(model, budget="uniform", drift="interval 5", sparsity=0.8) == []
    assert lengths(model, budget="depth") == [24, 24]
    assert lengths(model, compensation_rank=4) == [24, 24]
    config = CONFIG.replace({"budget": "depth"})
    again = learned(alone, cache / "b", config)
    assert equal(tensors(learned(model, cache, config)), tensors(again))


@pytest.mark.parametrize(
    "damage", [DAMAGES["flip"], *TENSOR_DAMAGES.values()], ids=["flip", *TENSOR_DAMAGES]
)
def test_damaged_files_are_learned_anew(cache, damage):
    first, whole = masks_of(tiny()), files(cache)
    assert len(whole) == PARTS
    for path in whole:
        damage(path)
    assert same_masks(first, masks_of(tiny()))
    assert [path.name for path in files(cache)] == [path.name for path in whole]
    assert lengths(tiny()) == []


def test_statistics_of_two_texts_are_never_mixed(cache):
    """Machines that round otherwise write another text: what is in it decides, not its settings."""
    learned(tiny(), cache)
    (text,) = [path for path in files(cache) if set(load(path.read_bytes())) == {"ids"}]
    ids = load(text.read_bytes())["ids"].flip(0).contiguous()
    text.unlink()
    kept.write(text.parent, text.name.rpartition("-")[0], ".safetensors", save({"ids": ids}))
    assert lengths(tiny()) == [24, 24], "all but the text, of the other one"
    assert len(files(cache)) == PARTS + 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_the_caller(cache, mode):
    wanted = tensors(learned(tiny(), cache / "other"))
    for _ in range(2):  # learnt, then found on disk
        model = tiny()
        with mode(), prune(model, CONFIG) as run:
            decode(model, IDS, 20)
        assert equal(tensors(run.layers), wanted)
        assert not any(t.is_inference() for t in tensors(run.layers))
        with torch.enable_grad(), prune(model, CONFIG, executor="masked"):
            read = model(IDS[:, :20], **{CACHE: new_cache(model)})
            model(IDS[:, 20:21], **{CACHE: read[CACHE]}).logits.sum().backward()
        assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_model_is_left_as_it_was(name):
    """Dropout neither draws from the user's random numbers nor enters what is learnt."""
    model, calm = tiny(name).train(), tiny(name)
    state = torch.get_rng_state()
    assert len(lengths(model)) == 25
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert lengths(calm) == [], "the same was learnt as by a calm model"
    with Same(calm):
        assert len(lengths(calm, seed=1)) == 25


def test_an_interrupted_lesson_leaves_its_text_alone(monkeypatch, cache):
    model = tiny("gpt2").train()

    interrupt = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr("dart_llm.calibration.collect.run_forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(model, CONFIG).attach()
    assert all(module.training for module in model.modules())
    assert len(files(cache)) == 1, "the text is written, and is not written again"
    with Same(model.eval()):
        assert lengths(model) == [24, 24]


def _broken(where):
    model = tiny()
    with torch.no_grad():
        model.get_submodule(where).weight[5, 3] = float("nan")
    return model


BARE = PruneConfig(method="mine", sparsity=0.5, self_stats=SMALL)
OFFLOADED = functools.partial(cpu_offload, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "config", "error", "message"),
    [
        (lambda: OFFLOADED(tiny()), CONFIG, ConfigError, "layer 0 is offloaded"),
        (lambda: OFFLOADED(tiny()), BARE, ConfigError, "an offloaded model cannot write"),
        (torch.inference_mode()(tiny), CONFIG, ConfigError, "torch.inference_mode() lack"),
        (lambda: _broken("lm_head"), CONFIG, DartError, "not finite"),
        (lambda: _broken("model.layers.1.mlp.down_proj"), CONFIG, DartError, "not finite"),
    ],
)
def test_models_that_cannot_be_learned_from(cache, make, config, error, message):
    model = make()
    with pytest.raises(error) as caught:
        prune(model, config).attach()
    assert message in str(caught.value) and files(cache) == []


def test_nothing_is_learned_inside_another_run_nor_from_a_calibration(cache):
    model = tiny()
    with prune(model, "griffin", sparsity=0.5):
        for inner in (model, model.model):
            run = prune(inner, CONFIG)
            handle = model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
            with pytest.raises(AttachError, match=r"dart_llm\.restore\(model\)"):
                run.attach()
            handle.remove()
    assert files(cache) == []
    config = PruneConfig.build("wanda", sparsity=0.5, score="fisher", self_stats={})
    with pytest.raises(ConfigError, match='score "fisher" reads gradients'):
        observing(config, layers_of(model))


class Fixed:
    """A model that gives the same chances, moved on by ``step`` tokens with every token."""

    device = torch.device("cpu")

    config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(vocab_size=4, bos_token_id=None, eos_token_id=None)
    )

    def __init__(self, *chances, step=0):
        self.logits, self.step = torch.tensor(chances).log(), step

    def __call__(self, ids, use_cache, logits_to_keep, **past):
        assert use_cache and logits_to_keep == 1 and ids.shape[1] == 1
        rows = torch.stack([self.logits.roll(self.step * int(token)) for token in ids[:, 0]])
        return SimpleNamespace(logits=rows[:, None], **{cache_name(): 0})


def sample_sequences(model, start, count, length, seed, news=lambda share: None, **how):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), start[0]) if start else start_ids(model, count, generator)
    return sample_continuations(model, ids, length, generator, news, **how)


UNEVEN = (0.4, 0.3, 0.2, 0.1)


def shares(result):
    return [float((result == token).float().mean()) for token in range(4)]


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 8.0])  # flat rows need more than NUCLEUS
def test_likeliest_keeps_what_a_whole_sort_keeps(sharpness):
    generator = torch.Generator().manual_seed(3)
    chances = (sharpness * torch.randn(4, 5000, generator=generator)).softmax(-1)
    ordered, tokens = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > 0.95] = 0
    wanted = torch.zeros_like(chances).scatter(1, tokens, ordered)
    assert torch.equal(likeliest(chances, 0.95), wanted)


def test_tokens_come_with_their_chances():
    """Temperature sharpens them; top_p leaves out the unlikely; every token follows the last."""
    sharp = [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]
    for how, expected in (
        ({}, list(UNEVEN)),
        ({"temperature": 0.5}, sharp),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
    ):
        result = sample_sequences(Fixed(*UNEVEN), [3], 4000, 4, 0, **how)
        assert bool((result[:, 0] == 3).all())
        assert shares(result[:, 1:]) == pytest.approx(expected, abs=0.02)
    sure = Fixed(0, 1, 0, 0, step=1)  # token t + 1 follows token t
    assert sample_sequences(sure, [2], 2, 6, 0).tolist() == [[2, 3, 0, 1, 2, 3]] * 2
    free = sample_sequences(sure, [], 4000, 3, 0)  # no start: any token
    assert shares(free[:, 0]) == pytest.approx([0.25] * 4, abs=0.03)
    assert torch.equal(free[:, 1], (free[:, 0] + 1) % 4)


def test_no_global_random_number_is_drawn():
    shared_model()  # making it draws some
    state, news = torch.get_rng_state(), []
    sequences = sample_sequences(shared_model(), [], 3, 8, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sample_sequences(shared_model(), [], 3, 8, 5), sequences)
    sample_sequences(Fixed(*UNEVEN), [3], 1, 66, 0, news.append)
    assert news == [n / 65 for n in range(1, 66)], "after every token, which share is written"
    news.clear()
    sample_sequences(Fixed(*UNEVEN), [3], 65, 3, 0, news.append)
    assert news == [0.25, 0.5, 0.75, 1], "in two lots of rows"


def test_models_that_write_nothing():
    model = Fixed(*UNEVEN)
    for value in (float("nan"), float("inf")):
        model.logits[2] = value
        with pytest.raises(DartError, match="logits of the model's self-generated text are not"):
            sample_sequences(model, [3], 2, 4, 0)
    with pytest.raises(ConfigError, match="LlamaModel has no language-model head"):
        sample_sequences(shared_model().model, [1], 2, 4, 0)


def letters(text):
    """A tokenizer: an id of 0 to 25 for every letter, none for anything else."""
    return {"input_ids": [ord(one) - ord("a") for one in text.lower() if "a" <= one <= "z"]}


def taught(tokenizer):
    model = tiny()
    remember_tokenizer(model, tokenizer)
    return model


def test_openings_are_cut_to_one_length_and_taken_in_turn():
    """Those that are too short are left out: half of them have the median's letters."""
    model, every = taught(letters), [letters(text)["input_ids"] for text in texts.openings()]
    sizes = sorted(map(len, every))
    for length in (10, sizes[len(sizes) // 2], sizes[-1]):
        fits = [ids[:length] for ids in every if len(ids) >= length]
        result = opening_ids(model, len(every) + 3, length)
        assert result is not None and result.dtype == torch.int64
        assert result.tolist() == [fits[row % len(fits)] for row in range(len(every) + 3)]
    for one, length in ((tiny(), 10), (model, 0), (model, sizes[-1] + 1)):
        assert opening_ids(one, 4, length) is None, "no tokenizer, none wanted, all too short"
    unread = taught(lambda text: {"input_ids": [0, VOCAB]})  # an id that the model has not
    assert opening_ids(unread, 1, 2) is None
