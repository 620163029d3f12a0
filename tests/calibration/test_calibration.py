"""Calibration: its text, what is observed and cached, what ``prepare`` makes of it."""

import re

import pytest
import torch

from dart_llm.calibration.self_calibration import calibrate
from dart_llm.data.documents import sequences
from dart_llm.errors import AttachError, ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import BoundMethod, prepare
from steps import Same, decode, forward_lengths, picked, same_masks, shared_model
from tiny import LAYERS, WIDTH, tiny, tokens

SMALL = {"sequences": 10, "length": 16}
TWICE = [16, 16]  # 8 sequences and 2
WORDS = " ".join(f"word{i} and {i * i % 97}" for i in range(400))


class Letters:
    """A tokenizer of characters: ids 3 to 95."""

    eos_token_id = 2

    def __init__(self, bos=None, adds=False):
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if self.adds and add_special_tokens else []
        return {"input_ids": start + [3 + ord(letter) % 93 for letter in text]}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text(WORDS)
    return str(path)


def config(method="wanda", **changes):
    return PruneConfig.build(method, **{"sparsity": 0.5, "calibration": SMALL, **changes})


def run_calibration(model, made, source, cache):
    """What ``calibrate`` gives, and the lengths of the forwards that it made."""
    result = []

    def body():
        result.append(calibrate(model, Letters(), made, source, str(cache), lambda news: None))

    lengths = forward_lengths(model, body)
    return result[0], lengths


def kept(masks):
    return [mask.ids for mask in masks]


def test_the_model_is_left_as_it_was(tmp_path, text):
    model = tiny()
    with Same(model):
        run_calibration(model, config("flap"), text, tmp_path)
        run_calibration(model, config("glass"), None, tmp_path)
    made = BoundMethod(model, None, PruneConfig.build("griffin"))
    with made.run(), pytest.raises(AttachError, match="already being pruned"):
        run_calibration(model, config(score="normalized"), text, tmp_path)


def test_one_calibration_serves_all_sparsities_and_both_kinds_of_masks(tmp_path, text):
    model = tiny()
    first, lengths = run_calibration(model, config(), text, tmp_path)
    assert lengths == TWICE
    assert all(len(ids) == WIDTH // 2 for ids in kept(first.fixed_masks))
    for made in (
        config(sparsity=0.7, compensation=True),
        config(budget={"table": "0:0.5,1-3:auto"}),
        PruneConfig.build("wanda", calibration=SMALL, score={"name": "wanda", "strategy": "auto"}),
        config("flap"),
    ):
        assert run_calibration(model, made, text, tmp_path)[1] == []
    assert run_calibration(model, config(score="normalized"), text, tmp_path)[1] == TWICE


def test_other_weights_texts_and_damaged_files_are_calibrated_anew(tmp_path, text):
    changed, other = tiny(), tmp_path / "other.txt"
    other.write_text(WORDS[1:])
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[7, 3] += 0.01
    for model, source in ((tiny(), text), (changed, text), (tiny(), str(other))):
        assert run_calibration(model, config(), source, tmp_path)[1] == TWICE
    files = sorted((tmp_path / "dart-llm/calibration").iterdir())
    assert len(files) == 3 and all(path.suffix == ".safetensors" for path in files)
    for path in files:
        path.write_bytes(path.read_bytes()[:-5])
    for lengths in (TWICE, []):
        assert run_calibration(tiny(), config(), text, tmp_path)[1] == lengths


def quiet(made, source, cache):
    return prepare(shared_model(), Letters(), made, source, str(cache), lambda news: None)


def test_static_methods_have_fixed_masks_and_glass_a_prior(tmp_path, text):
    result = quiet(config("flap"), text, tmp_path)
    message = "calibration: 10 sequences of 16 tokens (160 tokens) of calibration"
    assert result.notes == (message,) and result.label == "flap@0.5"
    for likelihood in (False, True):
        with result.run(likelihood) as run:
            decode(run.model, tokens(1, 24), 20)
        report = run.report()
        assert report.achieved_sparsity == pytest.approx(0.5, abs=1 / (LAYERS * WIDTH))
        assert report.remask_causes == {"fixed": 1}
        assert same_masks([run.masks()[layer] for layer in range(LAYERS)], kept(result.fixed_masks))
    (message,) = quiet(config(calibration={"length": 200}), text, tmp_path).notes
    words = r"calibration: [1-9]\d of 128 sequences of 200 tokens \([\d,]+ tokens\) of "
    assert re.match(words, message)
    result = quiet(config("glass"), None, tmp_path)
    assert result.notes[0].endswith("(160 tokens) of self-generated text")
    assert sum(layer.nbytes for layer in result.prior) == 4 * LAYERS * WIDTH


def letters(text):
    return Letters()(text)["input_ids"]


def test_windows_are_cut_from_the_joined_texts():
    windows = sequences(Letters(), ["abcd", "efg", "hij"], 3, 4)
    assert windows.tolist() == [letters("abcd"), letters("\n\nef"), letters("g\n\nh")]
    assert sequences(Letters(), ["abcd", "efg"], 9, 4).shape == (2, 4)
    assert sequences(Letters(), [WORDS], 1, 4).tolist() == [letters(WORDS[:4])]
    with pytest.raises(ConfigError, match="has 4 tokens, but one sequence needs 5"):
        sequences(Letters(), ["abcd"], 1, 5)
    starting = Letters(bos=1, adds=True)  # every window starts as the tokenizer starts a text
    assert sequences(starting, ["abcdef"], 9, 4).tolist() == [
        [1, *letters("abc")],
        [1, *letters("def")],
    ]


HALF = PruneConfig.build("griffin", sparsity=0.5, masking_step=4, drift="interval 4")


def test_likelihood_tasks_have_masks_at_once_and_never_a_new_one():
    method = BoundMethod(shared_model(), None, HALF)
    run, scored = method.run(), method.run(likelihood=True)
    assert run.config == HALF
    assert (scored.config.masking_step, scored.config.min_evidence) == (0, 0)
    assert scored.config.drift.rule == "never" and scored.config.sparsity == 0.5


TABLE = PruneConfig.build("griffin", budget={"table": "all:0.5"})
CASES = [
    (None, None, ("dense", "dense", 0.0)),
    (PruneConfig.build("dense"), None, ("dense", "dense", 0.0)),
    (HALF, None, ("griffin@0.5", "griffin", 0.5)),
    (TABLE, None, ("griffin@table", "griffin", None)),
    (HALF, picked(), ("fixed masks", "fixed masks", None)),
]


@pytest.mark.parametrize(("config", "masks", "expected"), CASES)
def test_what_it_is_called(config, masks, expected):
    method = prepare(shared_model(), None, config, masks=masks)
    assert (method.label, method.method, method.requested) == expected
    assert (method.run() is None) == (expected[0].startswith("dense"))
    assert ("weight_bytes" in method.facts) == (method.run() is None)
