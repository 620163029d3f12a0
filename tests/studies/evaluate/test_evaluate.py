"""The study of ``eval``, ``perplexity`` and ``summarize``: its files, resuming, failures."""

import copy
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.study import run_study
from dart_llm.models.describe import widths
from dart_llm.reporting.console import Ui
from dart_llm.session.prepare import PreparedMethod
from dart_llm.settings import merge
from dart_llm.studies.evaluate.settings import (
    EvalSettings,
    PerplexitySettings,
    SummarizeSettings,
)
from dart_llm.studies.evaluate.study import MeasureStudy
from lm_cases import LETTERS, QUESTIONS, break_position, candidate, loaded, measured, place
from summary_cases import DOCUMENTS, write_documents

TEXT = "".join(
    f"the tide number {n * n} comes twice a day and goes by {n * 7}. " for n in range(40)
)
SLICES = {"prompt_tokens": 48, "scored_tokens": 24, "limit": 2}


def settings(folder, tasks, **more):
    given = {"include_path": str(place() / "tasks"), "tasks": tasks, "method": "griffin", **more}
    return own_data(folder, EvalSettings, **given)


def own_data(folder, kind, **more):
    given = {"model": place() / "model", "results_dir": folder / "r", "cache_dir": folder / "cache"}
    given = {name: str(path) for name, path in given.items()}
    return merge(kind, {**given, "device": "cpu", "sparsity": 0.5, **more}, environment={})


def run(asked, ui=None):
    return run_study(MeasureStudy(asked, ui or Ui(quiet=True)))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_method_beside_dense_on_two_tasks(tmp_path):
    study = run(settings(tmp_path, "tiny_choice,tiny_group", dense=True))
    rows = lines(study.path / "results.jsonl")
    labels = [(row["label"], row["cell"]["task"]) for row in rows]
    assert labels == list(product(("dense", "griffin@0.5"), ("tiny_choice", "tiny_group")))
    for row in rows:
        own = candidate(*(() if row["label"] == "dense" else ("griffin",)))
        direct = measured(own, row["cell"]["task"]).to_dict()
        assert row["measurement"] == json.loads(json.dumps(direct))
        assert (row["status"], row["cell"]["protocol"]) == ("done", "decode")
    assert rows[2]["cell"]["sparsity"] == 0.5 and rows[0]["cell"]["sparsity"] == 0.0
    samples = lines(study.path / "samples.jsonl")
    assert len(samples) == 2 * (2 * len(QUESTIONS) + len(LETTERS))
    assert samples[0]["label"] == "dense" and len(samples[0]["answers"]) == 3
    assert study.path.parent.name == "eval-model-griffin-0.5"
    answer = study.answer()
    assert answer["results"] == {
        "tiny_choice": rows[2]["measurement"]["metrics"],
        "tiny_group": rows[3]["measurement"]["metrics"],
    }
    assert answer["dense"]["tiny_choice"] == rows[0]["measurement"]["metrics"]
    assert answer["subtasks"] == {"tiny_group": rows[3]["measurement"]["subtasks"]}
    counted = answer["accounting"]
    assert counted["decoded_tokens"] == 93 + 93 + len(LETTERS)
    assert counted["tasks"]["tiny_choice"]["decoded_tokens"] == 93
    assert counted["achieved_sparsity"] == pytest.approx(0.5)


def test_dense_alone_and_without_samples(tmp_path):
    own = {"method": "dense", "sparsity": None, "log_samples": False, "limit": 3}
    study = run(settings(tmp_path, "tiny_choice", **own))
    counted, found = study.answer()["accounting"], study.lines[0]["measurement"]
    assert (counted["method"], counted["achieved_sparsity"], counted["remasks"]) == ("dense", 0, 0)
    assert (counted["dense_token_share"], counted["ffn_bytes_share"]) == (1.0, 1.0)
    assert "dense" not in study.answer() and found["accounting"] is None
    assert not (study.path / "samples.jsonl").exists()
    assert len(found["items"]) == 3 < len(QUESTIONS)


def test_nan_fails_the_run_says_where_and_keeps_what_was_finished(tmp_path):
    model, tokenizer = loaded()
    break_position(copy.deepcopy(model), 60).save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    own = {"model": str(tmp_path / "broken")}
    for tasks, more in (
        ("tiny_choice,tiny_roll", {}),
        ("tiny_roll", {"method": "dense", "sparsity": None}),
    ):
        with pytest.raises(DartError, match=r"document tiny_roll/0: .* not finite"):
            run(settings(tmp_path, tasks, **own, **more))
    (kept,) = (tmp_path / "r").glob("*griffin*/*/results.jsonl")
    (row,) = lines(kept)
    assert row["measurement"]["task"] == "tiny_choice" and row["measurement"]["metrics"]["acc"]
    broken = break_position(copy.deepcopy(model), 30)
    for method in (None, "griffin"):
        method = PreparedMethod(broken, tokenizer, candidate(method).config)
        with pytest.raises(DartError, match="a logit of document tiny_write/0 is not finite"):
            measured(method, "tiny_write")


def write_masks(path, widths, keep):
    tensors = {}
    for layer, width in enumerate(widths):
        tensors[f"remask0.layer{layer}.ids"] = torch.arange(keep, dtype=torch.int32)
        tensors[f"remask0.layer{layer}.scores"] = torch.arange(width, 0.0, -1.0)
    save_file(tensors, path, {"checkpoint": "some-model"})
    return str(path)


def test_given_masks_and_tables_are_not_called_by_a_preset_and_its_sparsity(tmp_path):
    sizes = widths(loaded()[0])
    own = {"method": "dart", "sparsity": None, "dense": True, "limit": 3}
    masks = write_masks(tmp_path / "m.safetensors", sizes, sizes[0] // 4)
    for more, label, method in (
        ({"masks": masks}, "given masks", "given masks"),
        ({"layer_topk": "all:0.25"}, "dart@table", "dart"),
    ):
        ui = Ui(quiet=True)
        row = run(settings(tmp_path, "tiny_letters", **own, **more), ui).lines[-1]
        cell = row["cell"]
        assert (row["label"], cell["method"], cell["sparsity"]) == (label, method, None)
        assert row["measurement"]["accounting"]["sparsity_while_pruned"] == pytest.approx(0.75)
        assert any(line.startswith(f"{method} beats dense on ") for line in ui.log)
    other = write_masks(tmp_path / "other.safetensors", [24, 24], 3)
    shape = f"2 layers of 24 neurons; the model at hand has {len(sizes)} layers of {sizes[0]} "
    with pytest.raises(ConfigError, match=rf"are of some-model, which has {shape}neurons"):
        run(settings(tmp_path, "tiny_letters", **{**own, "masks": other}))


def test_a_calibration_text_is_named_and_never_evaluated(tmp_path):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT, encoding="utf-8")
    other.write_text(TEXT[::-1], encoding="utf-8")
    rows = Path(write_documents(tmp_path / "four.jsonl"))
    for kind, data in ((PerplexitySettings, text), (SummarizeSettings, rows)):
        asked = own_data(tmp_path, kind, method="wanda", data=str(data), calibration=str(data))
        with pytest.raises(ConfigError, match=f"{data.name} is evaluated and cannot be the calib"):
            run(asked)
    assert not (tmp_path / "r").exists()  # said before anything is loaded or written
    for method, calibration, note in (("griffin", text, ""), ("flap", other, "other.txt")):
        own = {"method": method, "data": str(text), "calibration": str(calibration), **SLICES}
        measurement = run(own_data(tmp_path, PerplexitySettings, **own)).lines[1]["measurement"]
        assert any(note in line for line in measurement["notes"]) or not note
        assert measurement["accounting"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"protocol": "ful"}, "did you mean full"),
        ({"protocol": "standard"}, "unknown protocol 'standard'"),
        ({"tasks": ""}, "--tasks"),
        ({"tasks": "tiny_letters,tiny_choyce"}, "tiny_choice"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        run(settings(tmp_path, **{"tasks": "tiny_choice", **given}))
    assert list(tmp_path.iterdir()) == []


def test_an_option_of_zero_is_given_and_others_are_the_tasks_own(tmp_path):
    options = settings(tmp_path, "tiny_choice", num_fewshot=0, limit=3).options()
    assert (options.num_fewshot, options.limit, options.protocol) == (0, 3, "decode")
    assert settings(tmp_path, "tiny_choice").options().num_fewshot is None


def test_summaries_are_measured_with_their_texts_once(tmp_path):
    rows = str(write_documents(tmp_path / "four.jsonl"))
    own = {"method": "griffin", "data": f"{rows}, {rows},", "max_output": 6, "limit": 2}
    asked = own_data(tmp_path, SummarizeSettings, **own)
    assert asked.task_names() == [f"summarize:{rows}"]
    study = run(asked)
    metrics = study.answer()["results"][f"summarize:{rows}"]
    assert set(metrics) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    samples = lines(study.path / "samples.jsonl")
    assert [sample["reference"] for sample in samples] == [row["summary"] for row in DOCUMENTS[:2]]
    assert study.answer()["accounting"]["decoded_tokens"] == 2 * 5
