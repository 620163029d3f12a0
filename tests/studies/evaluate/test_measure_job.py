"""The job of ``eval``, ``perplexity`` and ``summarize``: its files, resuming, failures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dart_llm.errors import ConfigError, DartError, LoadError, UnknownName
from dart_llm.models.describe import widths
from dart_llm.reporting.console import Ui
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.settings import merge
from dart_llm.studies.evaluate.settings import EvalSettings, PerplexitySettings, SummarizeSettings
from dart_llm.studies.evaluate.study import MeasureJob, document, run_measure
from lm_cases import LETTERS, QUESTIONS, break_position, candidate, loaded, measured, place
from stopping import Stopping
from summary_cases import DOCUMENTS, write_documents

WORDS = "the tide number {} comes in twice a day and goes out again by {}. "
TEXT = "".join(WORDS.format(n * n, n * 7 % 60) for n in range(40))


def settings(folder: Path, tasks: str, **more: Any) -> EvalSettings:
    given = {
        "model": str(place() / "model"),
        "include_path": str(place() / "tasks"),
        "results_dir": str(folder / "results"),
        "device": "cpu",
        "tasks": tasks,
        "method": "griffin",
        "sparsity": 0.5,
    }
    return merge(EvalSettings, {**given, **more}, environment={})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def only_folder(root: Path) -> Path:
    (found,) = (root / "results").glob("*/*/config.json")
    return found.parent


def test_one_method_beside_dense_on_two_tasks(tmp_path):
    job = run_measure(settings(tmp_path, "tiny_choice,tiny_group", dense=True), Ui(quiet=True))
    rows = lines(job.path / "results.jsonl")
    assert [row["key"] for row in rows] == [
        "dense/tiny_choice",
        "dense/tiny_group",
        "griffin@0.5/tiny_choice",
        "griffin@0.5/tiny_group",
    ]
    for row in rows:
        direct = measured(
            candidate(*(() if row["label"] == "dense" else ("griffin",))), row["cell"]["task"]
        )
        assert row["measurement"] == json.loads(json.dumps(direct.to_dict()))
        assert (row["status"], row["cell"]["protocol"]) == ("done", "decode")
    assert rows[2]["cell"]["sparsity"] == 0.5 and rows[0]["cell"]["sparsity"] == 0.0
    samples = lines(job.path / "samples.jsonl")
    assert len(samples) == 2 * (2 * len(QUESTIONS) + len(LETTERS))
    assert samples[0]["label"] == "dense" and len(samples[0]["answers"]) == 3
    assert (config(job.path)["status"], config(job.path)["kind"]) == ("complete", "eval")
    assert config(job.path)["settings"]["tasks"] == "tiny_choice,tiny_group"
    names = {path.name for path in job.path.iterdir()}
    stamp = job.path.name
    assert {"timing.json", "report.html", f"output_{stamp}.log", f"timing_{stamp}.log"} <= names
    assert "parts.jsonl" not in names
    assert job.path.parent.name == "eval-model-griffin-0.5"
    found = document(job)
    assert found["results"] == {
        "tiny_choice": rows[2]["measurement"]["metrics"],
        "tiny_group": rows[3]["measurement"]["metrics"],
    }
    assert found["dense"]["tiny_choice"] == rows[0]["measurement"]["metrics"]
    assert found["subtasks"] == {"tiny_group": rows[3]["measurement"]["subtasks"]}
    assert found["accounting"]["decoded_tokens"] == 93 + 93 + len(LETTERS)
    assert found["accounting"]["tasks"]["tiny_choice"]["decoded_tokens"] == 93
    assert found["accounting"]["achieved_sparsity"] == pytest.approx(0.5)
    assert found["folder"] == str(job.path)


def test_dense_alone_has_the_accounting_of_an_untouched_model(tmp_path):
    job = run_measure(settings(tmp_path, "tiny_choice", method="dense", sparsity=None), Ui(True))
    found = document(job)
    assert found["accounting"]["method"] == "dense"
    assert found["accounting"]["achieved_sparsity"] == 0.0
    assert found["accounting"]["dense_token_share"] == 1.0
    assert (found["accounting"]["remasks"], found["accounting"]["ffn_bytes_share"]) == (0, 1.0)
    assert "dense" not in found
    assert job.rows[0]["measurement"]["accounting"] is None


def test_samples_can_be_left_out(tmp_path):
    job = run_measure(settings(tmp_path, "tiny_choice", log_samples=False), Ui(quiet=True))
    assert not (job.path / "samples.jsonl").exists()
    assert len(job.rows[0]["measurement"]["items"]) == len(QUESTIONS)


@pytest.mark.parametrize("after", [2, 6])
def test_an_interrupted_job_resumes_to_the_same_bytes(tmp_path, after):
    asked = settings(tmp_path, "tiny_choice,tiny_roll", method="dart", prompt_tokens=80)
    whole = run_measure(asked, Ui(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        run_measure(asked, Stopping(after))
    folders = sorted((tmp_path / "results").glob("*/*"))
    left = next(folder for folder in folders if folder != whole.path)
    assert config(left)["status"] == "interrupted"
    assert (left / "parts.jsonl").read_text(encoding="utf-8").count("\n") >= 2
    again = run_measure(asked, Ui(quiet=True))
    assert (again.path, again.folder.resumed) == (left, True)
    for name in ("results.jsonl", "samples.jsonl"):
        assert (left / name).read_bytes() == (whole.path / name).read_bytes()
    assert config(left)["status"] == "complete"
    assert not (left / "parts.jsonl").exists()
    another = run_measure(asked, Ui(quiet=True))
    assert another.path not in folders


def test_other_weights_under_the_same_name_start_a_new_folder(tmp_path):
    folder = tmp_path / "model"
    model, tokenizer = loaded()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked = settings(tmp_path, "tiny_choice,tiny_roll", model=str(folder))
    with pytest.raises(KeyboardInterrupt):
        run_measure(asked, Stopping(2))
    left = only_folder(tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    other.save_pretrained(folder)
    again = run_measure(asked, Ui(quiet=True))
    assert again.path != left and not again.folder.resumed
    assert config(left)["status"] == "interrupted"  # kept for the weights that it belongs to


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The tiny model with NaN from the 61st position on."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    model, tokenizer = loaded()
    break_position(copy.deepcopy(model), 60).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("method", "sparsity"), [("griffin", 0.5), ("dense", None)])
def test_nan_fails_the_run_says_where_and_keeps_what_was_finished(
    broken, tmp_path, method, sparsity
):
    asked = settings(
        tmp_path, "tiny_choice,tiny_roll", model=str(broken), method=method, sparsity=sparsity
    )
    with pytest.raises(DartError, match=r"document tiny_roll/0: .* not finite"):
        run_measure(asked, Ui(quiet=True))
    folder = only_folder(tmp_path)
    assert config(folder)["status"] == "failed"
    rows = lines(folder / "results.jsonl")
    assert [row["measurement"]["task"] for row in rows] == ["tiny_choice"]
    assert rows[0]["measurement"]["metrics"]["acc"] is not None


@pytest.mark.parametrize("method", [None, "griffin"])
def test_nan_in_a_generated_text_is_an_error_too(method):
    model = break_position(copy.deepcopy(loaded()[0]), 30)
    own = Candidate(model, loaded()[1], candidate(method).config)
    with pytest.raises(DartError, match="a logit of document tiny_write/0 is not finite"):
        measured(own, "tiny_write")


def test_a_task_that_does_not_exist_is_said_before_any_work(tmp_path):
    with pytest.raises(UnknownName, match="tiny_choice"):
        run_measure(settings(tmp_path, "tiny_letters,tiny_choyce"), Ui(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_an_error_says_where_the_finished_tasks_are(tmp_path):
    ui = Ui(quiet=True)
    with pytest.raises(LoadError, match="tiny_lost"):
        run_measure(settings(tmp_path, "tiny_letters,tiny_lost"), ui)
    folder = only_folder(tmp_path)
    assert f"what was finished is kept in {folder}; the same command resumes" in ui.log
    assert len(lines(folder / "results.jsonl")) == 1


def write_masks(path: Path, widths: list[int], keep: int) -> str:
    tensors = {}
    for layer, width in enumerate(widths):
        tensors[f"remask0.layer{layer}.ids"] = torch.arange(keep, dtype=torch.int32)
        tensors[f"remask0.layer{layer}.scores"] = torch.arange(width, 0.0, -1.0)
    save_file(tensors, path, {"checkpoint": "some-model"})
    return str(path)


def test_given_masks_and_tables_are_not_called_by_a_preset_and_its_sparsity(tmp_path):
    sizes = widths(loaded()[0])
    masks = write_masks(tmp_path / "m.safetensors", sizes, sizes[0] // 4)
    own = {"method": "dart", "sparsity": None, "dense": True, "limit": 3}
    for more, label, method in (
        ({"masks": masks}, "given masks", "given masks"),
        ({"layer_topk": "all:0.25"}, "dart@table", "dart"),
    ):
        ui = Ui(quiet=True)
        job = run_measure(settings(tmp_path, "tiny_letters", **own, **more), ui)
        row = job.rows[-1]
        assert (row["label"], row["cell"]["method"], row["cell"]["sparsity"]) == (
            label,
            method,
            None,
        )
        assert row["measurement"]["accounting"]["sparsity_while_pruned"] == pytest.approx(0.75)
        assert any(line.startswith(f"With its own counts {method} ") for line in ui.log)


def test_masks_of_a_model_of_another_shape_are_refused(tmp_path):
    sizes = widths(loaded()[0])
    other = write_masks(tmp_path / "m.safetensors", [24, 24], 3)
    wanted = settings(tmp_path, "tiny_letters", masks=other, method="dart", sparsity=None)
    shape = f"2 layers of 24 neurons; the model at hand has {len(sizes)} layers of {sizes[0]} "
    with pytest.raises(ConfigError, match=rf"are of some-model, which has {shape}neurons"):
        run_measure(wanted, Ui(quiet=True))


def own_data(folder: Path, kind: type, **more: Any) -> Any:
    given = {"model": str(place() / "model"), "results_dir": str(folder / "r"), "device": "cpu"}
    given["cache_dir"] = str(folder / "cache")
    return merge(kind, {**given, "sparsity": 0.5, **more}, environment={})


def test_a_calibration_text_is_never_evaluated(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    rows = Path(write_documents(tmp_path / "four.jsonl"))
    for kind, data in ((PerplexitySettings, text), (SummarizeSettings, rows)):
        asked = own_data(tmp_path, kind, method="wanda", data=str(data), calibration=str(data))
        with pytest.raises(ConfigError, match=f"{data.name} is evaluated and cannot be the calib"):
            run_measure(asked, Ui(quiet=True))
    assert not (tmp_path / "r").exists()  # said before anything is loaded or written
    small = {"prompt_tokens": 48, "scored_tokens": 24, "limit": 2}
    same = own_data(
        tmp_path,
        PerplexitySettings,
        method="griffin",
        data=str(text),
        calibration=str(text),
        **small,
    )
    assert run_measure(same, Ui(quiet=True)).rows  # griffin reads no calibration text


def test_a_calibrated_method_says_what_it_was_calibrated_on(tmp_path):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT, encoding="utf-8")
    other.write_text(TEXT[::-1], encoding="utf-8")
    small = {"prompt_tokens": 48, "scored_tokens": 24, "limit": 2}
    asked = own_data(
        tmp_path, PerplexitySettings, method="flap", data=str(text), calibration=str(other), **small
    )
    job = run_measure(asked, Ui(quiet=True))
    assert any("other.txt" in note for note in job.rows[1]["measurement"]["notes"])
    assert job.rows[1]["measurement"]["accounting"]["achieved_sparsity"] == pytest.approx(
        0.5, abs=0.01
    )


def test_given_masks_are_measured(tmp_path):
    first = run_measure(settings(tmp_path, "tiny_choice"), Ui(quiet=True))
    names = {f"remask0.layer{n}.ids": torch.arange(24) for n in range(4)}
    path = tmp_path / "masks.safetensors"
    save_file(names, path)
    job = run_measure(settings(tmp_path, "tiny_choice", masks=str(path), sparsity=None), Ui(True))
    assert job.rows[-1]["label"] == "given masks"
    assert job.rows[-1]["measurement"]["accounting"]["achieved_sparsity"] == 0.5
    assert job.rows[-1]["measurement"] != first.rows[-1]["measurement"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"protocol": "ful"}, "did you mean full"),
        ({"protocol": "standard"}, "unknown protocol 'standard'"),
        ({"tasks": ""}, "--tasks"),
        ({"tracker": "tensorbord"}, "did you mean tensorboard"),
        ({"num_fewshot": -1}, "--num-fewshot -1 must be at least 0"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, **{"tasks": "tiny_choice", **given})


def test_summaries_are_measured_with_their_texts(tmp_path):
    rows = write_documents(tmp_path / "four.jsonl")
    asked = own_data(
        tmp_path, SummarizeSettings, method="griffin", data=rows, max_output=6, limit=2
    )
    job: MeasureJob = run_measure(asked, Ui(quiet=True))
    found = document(job)
    assert set(found["results"][f"summarize:{rows}"]) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    samples = lines(job.path / "samples.jsonl")
    assert [sample["reference"] for sample in samples] == [row["summary"] for row in DOCUMENTS[:2]]
    assert found["accounting"]["decoded_tokens"] == 2 * 5


def test_data_that_is_named_twice_is_measured_once(tmp_path):
    file = str(write_documents(tmp_path / "d.jsonl"))
    asked = own_data(tmp_path, SummarizeSettings, data=f"{file}, {file},")
    assert asked.task_names() == [f"summarize:{file}"]
