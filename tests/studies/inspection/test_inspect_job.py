"""``dart-llm inspect`` as a command: files, errors, plots, page; its folder: tests/experiments."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from dart_llm.cli import commands as cli_inspect
from dart_llm.cli.options import with_settings
from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.experiments.study import run_study
from dart_llm.reporting import figures as plots
from dart_llm.reporting.console import Ui
from dart_llm.studies.inspection import report as report_inspect
from dart_llm.studies.inspection.plots import make
from dart_llm.studies.inspection.report import with_ends
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings
from dart_llm.studies.inspection.study import InspectionStudy
from html_page import Page
from inspect_cases import A, B, without_pictures
from lm_cases import place
from tiny import LAYERS, WIDTH

FILES = {
    *("layers", "weights", "activations", "concentration", "neurons", "overlap", "ablation"),
    *("space_layers", "space_windows", "space_tokens"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)  # drawn once, for ``whole``


def inspect(*arguments: object) -> Any:
    """``dart-llm inspect ARGUMENTS`` on the tiny model."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(name="inspect")(with_settings(cli_inspect.inspect, InspectSettings))
    app.command(name="other")(lambda: None)
    words = ["inspect", "--model", place() / "model", "--device", "cpu", *arguments]
    return CliRunner().invoke(app, list(map(str, words)))


def settings(**given: Any) -> InspectSettings:
    texts = {"prompt": A, "prompt_b": B, "ablation_seeds": 1, "method": "griffin"}
    return InspectSettings(model=str(place() / "model"), device="cpu", **{**texts, **given})


def document(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stderr == ""
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one inspection of everything."""
    root = tmp_path_factory.mktemp("inspected")
    return run_study(InspectionStudy(settings(results_dir=str(root)), (), Ui(quiet=True))).path


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{name}.csv").read_text("utf-8").splitlines()))


def test_a_folder_with_everything(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["what"] == list(TEXTS)
    document = json.loads((whole / "inspect.json").read_text())
    assert list(document["sections"]) == list(TEXTS) == list(document["sentences"])
    assert [text["label"] for text in document["texts"]] == ["A", "B"]
    assert {path.stem for path in whole.glob("*.csv")} == FILES


def test_csv_holds_the_numbers_of_the_json(whole: Path) -> None:
    found = json.loads((whole / "inspect.json").read_text())["sections"]
    for row, layer in zip(rows(whole, "layers"), found["layers"]["layers"], strict=True):
        assert float(row["residual_cosine"]) == layer["residual"]["cosine"]["mean"]
        assert float(row["output_change_median"]) == layer["output"]["change"]["median"]
        assert float(row["output_s"]) == layer["output"]["s"]
    norms = rows(whole, "weights")
    assert len(norms) == 2 * LAYERS
    assert (norms[3]["layer"], norms[3]["matrix"]) == ("1", "down")
    assert float(norms[3]["q95"]) == found["weights"]["weights"]["layers"][1]["down"]["q95"]
    holds = [layer["holds"] for layer in found["weights"]["activations"]]
    assert [float(row["holds"]) for row in rows(whole, "activations")] == holds
    neurons = rows(whole, "neurons")
    assert len(neurons) == LAYERS * 2 * 5
    best = found["neurons"]["layers"][0]["strong"][0]
    assert (int(neurons[0]["neuron"]), json.loads(neurons[0]["tokens"])) == (
        best["neuron"],
        best["tokens"],
    )
    jaccards = rows(whole, "overlap")
    assert jaccards[-1]["layer"] == "mean"
    assert float(jaccards[1]["jaccard"]) == found["overlap"]["layers"][1]["jaccard"]
    removed = rows(whole, "ablation")
    assert [row["text"] for row in removed] == ["A", "B"] * 3
    for row, one in zip(removed, found["ablation"]["rows"], strict=True):
        assert float(row["loss"]) == one["loss"] and float(row["random_loss"]) > 0
        assert float(row["over_random_low"]) == one["over_random"]["low"]
        assert float(row["achieved_sparsity"]) == one["achieved_sparsity"]
        assert (row["dense_token_share"], row["remasks"]) == ("0.0", "0")
    assert len(rows(whole, "space_tokens")) == len(found["space"]["tokens"])


def test_markdown_and_sentences(whole: Path) -> None:
    text = (whole / "inspect.md").read_text("utf-8")
    found = json.loads((whole / "inspect.json").read_text())
    for sentence in found["sentences"].values():
        assert sentence in text
    mean = found["sections"]["overlap"]["mean"]
    assert (
        f"have a Jaccard of {mean['jaccard']:.3f}, where chance gives {mean['chance']:.3f}"
        in (found["sentences"]["overlap"])
    )
    row = found["sections"]["ablation"]["rows"][0]
    assert f"on A by {row['loss'] - row['dense_loss']:+.3f} nats" in found["sentences"]["ablation"]
    assert "### Neurons that griffin keeps for A and for B" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_page(whole: Path) -> None:
    html = (whole / "report.html").read_text("utf-8")
    page = Page(html)
    assert html.count("<picture>") == 9
    for title in report_inspect.TITLES.values():
        assert title in page.text
    told = json.loads((whole / "inspect.json").read_text())["sentences"]
    assert told["ablation"] in page.text.replace("\xa0", " ")
    row = page.row("mean")
    mean = json.loads((whole / "inspect.json").read_text())["sections"]["overlap"]["mean"]
    assert row[4] == f"{mean['jaccard']:.3f}"
    assert A.strip() in page.text
    assert "http" not in html.replace("http-equiv", "")
    assert all(str(one["src"]).startswith("data:") for one in page.attributes("img"))
    assert all(one["alt"] for one in page.attributes("img"))


def test_hostile_words_are_escaped() -> None:
    text = "<script>alert(1)</script> & so on"
    folder = run_study(
        InspectionStudy(settings(prompt=text, prompt_b=None), ["layers"], Ui(quiet=True))
    ).path
    html = report_inspect.write(folder).read_text("utf-8")
    assert "<script" not in html and text in Page(html).text


def test_plots_are_drawn_from_the_document(whole: Path) -> None:
    found = json.loads((whole / "inspect.json").read_text())
    drawn = make(found, "small print")
    names = {plot.name for plot in drawn}
    assert {path.stem for path in (whole / "plots").iterdir()} == names
    assert len(names) == 9
    assert all(plot.alt and plot.small.startswith("small print") for plot in drawn)
    for plot in drawn[:1]:
        assert plots.render(plot, "png", narrow=True).startswith(b"\x89PNG")
    assert make({"sections": {}, "sentences": {}}, "") == []


def test_no_text_one_text_and_json() -> None:
    found = document(inspect("--json"))
    assert list(found["sections"]) == ["weights", "neurons"] and found["texts"] == []
    assert found["sections"]["weights"]["activations"] is None
    one = document(inspect("layers", "--prompt", "the sea", "--json"))
    assert list(one["sections"]) == ["layers"]
    assert one["texts"][0]["tokens_read"] == len("the sea")
    assert len(one["sections"]["layers"]["layers"]) == LAYERS


def test_for_people_there_are_tables_and_sentences() -> None:
    result = inspect("overlap", "neurons", "--prompt", A, "--prompt-b", B, "--top", 6)
    assert (result.exit_code, result.stdout) == (0, "")
    for words in (
        "Neurons that dart keeps for A and for B",
        "by chance",
        "a Jaccard of",
        "48 rows in neurons.csv",
    ):
        assert words in result.stderr, words


def test_activations_are_kept_on_request() -> None:
    keep = ("--save-activations", "--activation-tokens", ":9", "--activation-tensors", "u,r")
    result = inspect("layers", "--prompt", A, "--prompt-b", B, *keep)
    assert result.exit_code == 0, result.exception
    (folder,) = Path("results").glob("*/*")
    for label in "ab":
        found = load_file(folder / f"activations-{label}.safetensors")
        assert found["layer3.u"].shape == (9, WIDTH) and len(found) == 2 * LAYERS + 1
    refused = inspect("weights", "--save-activations")
    assert isinstance(refused.exception, ConfigError)
    assert "give --prompt or --passage" in str(refused.exception)


def test_short_texts_leave_ablation_out_unless_it_was_asked_for() -> None:
    texts = ("--prompt", "the sea", "--prompt-b", "the moon")
    result = inspect(*texts)
    assert result.exit_code == 0, result.exception
    assert "no ablation: ablation needs 64 tokens of each text" in result.stderr
    refused = inspect("ablation", *texts)
    assert isinstance(refused.exception, ConfigError)
    plain = document(inspect(*texts, "--method", "dense", "--json"))
    assert "overlap" not in plain["sections"] and "space" in plain["sections"]


def test_two_runs_and_the_two_texts_of_one() -> None:
    folders = []
    for name, texts in (("one", ("sea", "sea")), ("two", ("moon", "hills and moon"))):
        folder = Path("runs") / name / "20260101-000000"
        folder.mkdir(parents=True)
        variants = zip(("pruned", "dense"), texts, strict=True)
        lines = [json.dumps({"variant": variant, "text": text}) for variant, text in variants]
        (folder / "generation.jsonl").write_text("\n".join(lines))
        folders.append(str(folder))
    both = document(inspect("space", "--runs", ",".join(folders), "--json"))
    assert [text["text"] for text in both["texts"]] == ["sea", "moon"]
    assert both["texts"][0]["name"] == "one/20260101-000000"
    own = document(inspect("space", "--runs", folders[1], "--json"))
    assert [text["text"] for text in own["texts"]] == ["hills and moon", "moon"]
    (Path(folders[0]) / "generation.jsonl").write_text('{"variant": "dense", "text": "sea"}')
    assert "holds one text" in str(inspect("space", "--runs", folders[0]).exception)
    (Path(folders[0]) / "generation.jsonl").unlink()
    assert "holds no generated text" in str(inspect("space", "--runs", folders[0]).exception)


@pytest.mark.parametrize(
    ("arguments", "kind", "problem"),
    [
        (["overlaps"], UnknownName, "did you mean overlap"),
        (["space", "--prompt", "x"], ConfigError, r"needs 2 text\(s\)"),
        (["layers", "--prompt", "x \udcff"], ConfigError, "is not valid UTF-8"),
        (["layers"], ConfigError, r"needs 1 text\(s\): give --prompt"),
        (["space", "--passage", "01", "--layer", 4], ConfigError, "this model has 4 layers"),
        (["overlap", "--passage", "01", "--method", "wanda"], ConfigError, "e.g. griffin"),
        (["--prompt", "x", "--activation-layers", "9-1"], ConfigError, "not a layer or a range"),
    ],
)
def test_errors(arguments: list[object], kind: type[DartError], problem: str) -> None:
    result = inspect(*arguments)
    assert type(result.exception) is kind
    assert re.search(problem, str(result.exception))


def test_an_interval_in_words() -> None:
    ends = {"estimate": 0.5, "low": -0.25, "high": 1.0}
    assert with_ends(ends) == "+0.500 (-0.250 to +1.000)"


def test_flags_that_mean_nothing_here_do_not_exist() -> None:
    text = inspect("--help").stdout
    assert "--prompt-b-file" in text and "--save-activations" in text
    for name in ("--masks", "--drift", "--release-step", "--executor"):
        assert name not in text
