"""``dart-llm inspect``: texts, files, page, errors; resuming is in tests/experiments."""

import csv
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.study import run_study
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.studies.inspection import plots, report
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings
from dart_llm.studies.inspection.study import InspectionStudy
from dart_llm.studies.inspection.texts import inspect_texts
from html_page import Page
from inspect_cases import A, B
from lm_cases import place
from tiny import LAYERS, WIDTH

FILES = {
    *("layers", "weights", "activations", "concentration", "neurons", "overlap", "ablation"),
    *("space_layers", "space_windows", "space_tokens"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InspectionStudy, "figures", lambda self: ())  # drawn once, for ``whole``
    monkeypatch.setattr(InspectionStudy, "write_page", lambda self: None)


def inspect(*arguments):
    """``dart-llm inspect ARGUMENTS`` on the tiny model."""
    words = ["inspect", *arguments, "--model", place() / "model", "--device", "cpu"]
    return CliRunner().invoke(app, list(map(str, words)))


def document(result):
    assert (result.exit_code, result.stderr) == (0, ""), result.exception
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of one inspection of everything, and its document; A has words of HTML."""
    root = tmp_path_factory.mktemp("inspected")
    given = {"prompt": f"{A}<script>1</script> & so on", "prompt_b": B, "ablation_seeds": 1}
    own = {"model": str(place() / "model"), "device": "cpu", "method": "griffin", **given}
    asked = InspectSettings(results_dir=str(root), **own)
    folder = run_study(InspectionStudy(asked, (), Ui(quiet=True))).path
    return folder, json.loads((folder / "inspect.json").read_text("utf-8"))


def rows(folder, name):
    return list(csv.DictReader((folder / f"{name}.csv").read_text("utf-8").splitlines()))


def test_csv_holds_the_numbers_of_the_json(whole):
    folder, kept = whole
    found = kept["sections"]
    assert json.loads((folder / "config.json").read_text())["settings"]["what"] == list(TEXTS)
    assert list(found) == list(TEXTS) == list(kept["sentences"])
    assert [text["label"] for text in kept["texts"]] == ["A", "B"]
    assert {path.stem for path in folder.glob("*.csv")} == FILES
    for row, layer in zip(rows(folder, "layers"), found["layers"]["layers"], strict=True):
        assert float(row["residual_cosine"]) == layer["residual"]["cosine"]["mean"]
        assert float(row["output_change_median"]) == layer["output"]["change"]["median"]
        assert float(row["output_s"]) == layer["output"]["s"]
    norms = rows(folder, "weights")
    assert len(norms) == 2 * LAYERS
    assert (norms[3]["layer"], norms[3]["matrix"]) == ("1", "down")
    assert float(norms[3]["q95"]) == found["weights"]["weights"]["layers"][1]["down"]["q95"]
    holds = [layer["holds"] for layer in found["weights"]["activations"]]
    assert [float(row["holds"]) for row in rows(folder, "activations")] == holds
    neurons, best = rows(folder, "neurons"), found["neurons"]["layers"][0]["strong"][0]
    assert len(neurons) == LAYERS * 2 * 5 and int(neurons[0]["neuron"]) == best["neuron"]
    assert json.loads(neurons[0]["tokens"]) == best["tokens"]
    jaccards = rows(folder, "overlap")
    assert jaccards[-1]["layer"] == "mean"
    assert float(jaccards[1]["jaccard"]) == found["overlap"]["layers"][1]["jaccard"]
    removed = rows(folder, "ablation")
    assert [row["text"] for row in removed] == ["A", "B"] * 3
    for row, one in zip(removed, found["ablation"]["rows"], strict=True):
        assert float(row["loss"]) == one["loss"]
        assert float(row["over_random_low"]) == one["over_random"]["low"]
        assert (row["dense_token_share"], row["remasks"]) == ("0.0", "0")
    assert len(rows(folder, "space_tokens")) == len(found["space"]["tokens"])


def test_words_plots_and_page(whole):
    folder, found = whole
    text, told = (folder / "inspect.md").read_text("utf-8"), found["sentences"]
    assert all(sentence in text for sentence in told.values())
    mean = {key: f"{value:.3f}" for key, value in found["sections"]["overlap"]["mean"].items()}
    assert f"a Jaccard of {mean['jaccard']}, where chance gives {mean['chance']}" in text
    row = found["sections"]["ablation"]["rows"][0]
    assert f"on A by {row['loss'] - row['dense_loss']:+.3f} (" in told["ablation"]
    ends = {"estimate": 0.5, "low": -0.25, "high": 1.0}
    assert report.with_ends(ends) == "+0.500 (-0.250 to +1.000)"
    assert "### Neurons that griffin keeps for A and for B" in text
    drawn = plots.make(found, "small print")
    assert {path.stem for path in (folder / "plots").iterdir()} == {one.name for one in drawn}
    assert len(drawn) == 9 and all(plot.alt and plot.small[:11] == "small print" for plot in drawn)
    assert figures.render(drawn[0], "png", narrow=True).startswith(b"\x89PNG")
    html = (folder / "report.html").read_text("utf-8")
    page = Page(html)
    assert html.count("<picture>") == 9 and page.row("mean")[4] == mean["jaccard"]
    assert all(title in page.text for title in report.TITLES.values())
    assert all(words in page.text.replace("\xa0", " ") for words in told.values())
    assert f"{A}<script>1</script> & so on" in page.text and "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    images = page.attributes("img")
    assert all(str(one["src"]).startswith("data:") and one["alt"] for one in images)


def test_what_is_looked_at_follows_from_the_texts():
    found = document(inspect("--json"))
    assert list(found["sections"]) == ["weights", "neurons"] and found["texts"] == []
    assert found["sections"]["weights"]["activations"] is None
    one = document(inspect("layers", "--prompt", "the sea", "--json"))
    assert list(one["sections"]) == ["layers"] and one["texts"][0]["tokens_read"] == len("the sea")
    both = InspectSettings(prompt="x", prompt_b="y")
    assert both.chosen(()) == list(TEXTS)
    assert both.chosen(["space", "layers"]) == ["layers", "space"]
    assert both.prune_config().sparsity == 0.5 and not both.prune_config().compensation
    texts = ("--prompt", "the sea", "--prompt-b", "the moon")
    assert "no ablation: ablation needs 64 tokens" in inspect(*texts).stderr
    assert "needs 64 tokens" in str(inspect("ablation", *texts).exception)
    plain = document(inspect(*texts, "--method", "dense", "--json"))
    assert "overlap" not in plain["sections"] and "space" in plain["sections"]
    result = inspect("overlap", "neurons", "--prompt", A, "--prompt-b", B, "--top", 6)
    assert (result.exit_code, result.stdout) == (0, "")
    words = ("Neurons that dart keeps for A and for B", "a Jaccard of", "48 rows in neurons.csv")
    assert [one for one in words if one not in result.stderr] == []
    flags = inspect("--help").stdout
    assert "--prompt-b-file" in flags and "--save-activations" in flags
    assert re.findall("--masks|--drift|--release-step|--executor", flags) == []


def test_activations_are_kept_on_request():
    keep = ("--save-activations", "--activation-tokens", ":9", "--activation-tensors", "u,r")
    result = inspect("layers", "--prompt", A, "--prompt-b", B, *keep)
    assert result.exit_code == 0, result.exception
    (folder,) = Path("results").glob("*/*")
    for label in "ab":
        found = load_file(folder / f"activations-{label}.safetensors")
        assert found["layer3.u"].shape == (9, WIDTH) and len(found) == 2 * LAYERS + 1
    assert "give --prompt or --pass" in str(inspect("weights", "--save-activations").exception)


def test_texts_of_runs_passages_and_prompts():
    folders = []
    for name, texts in (("one", ("sea", "sea")), ("two", ("moon", "hills and moon"))):
        folder = Path("runs") / name / "20260101-000000"
        folder.mkdir(parents=True)
        variants = zip(("pruned", "dense"), texts, strict=True)
        lines = [json.dumps({"variant": variant, "text": text}) for variant, text in variants]
        (folder / "generation.jsonl").write_text("\n".join(lines))
        folders.append(str(folder))
    both = inspect_texts(InspectSettings(runs=",".join(folders)))
    assert [text.text for text in both] == ["sea", "moon"]
    assert both[0].name == "one/20260101-000000"
    own = inspect_texts(InspectSettings(runs=folders[1]))
    assert [text.text for text in own] == ["hills and moon", "moon"]
    (Path(folders[0]) / "generation.jsonl").write_text('{"variant": "dense", "text": "sea"}')
    with pytest.raises(ConfigError, match="holds one text"):
        inspect_texts(InspectSettings(runs=folders[0]))
    (Path(folders[0]) / "generation.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds no generated text"):
        inspect_texts(InspectSettings(runs=folders[0]))
    bees, loans = inspect_texts(InspectSettings(passage="01"))
    assert bees.text.startswith("When a honeybee finds") and loans.text.startswith("A mortgage is")
    assert (bees.label, loans.label) == ("A", "B") and "honeybee" not in loans.text
    sky, words = inspect_texts(InspectSettings(prompt="sky", prompt_b="my own\nwords"))
    assert (sky.name, words.title) == ("sky", "B (my own words)") and sky.text != "sky"


REFUSED = [
    ({"prompt_b": "y"}, "text B without text A"),
    ({"prompt": "x", "prompt_file": "f"}, "not both"),
    ({"prompt": "x", "passage": "01"}, "one of the three"),
    ({"share": 1.0}, r"--share 1\.0 must be less than 1"),
    ({"neuron_score": "maxx"}, "did you mean max"),
    ({"prompt": " ", "prompt_b": "y"}, r"text A \(\) is empty"),
    ({"prompt": "x \udcff"}, "is not valid UTF-8"),
    ({"prompt_file": "none.txt"}, "there is no prompt file none.txt: give an existing"),
    ({"passage": "99"}, "unknown prompt or passage"),
    ({"runs": "a,b,c"}, "one results folder or two, not 3"),
    ({"what": "overlaps"}, "did you mean overlap"),
    ({"what": "layers"}, r"needs 1 text\(s\): give --prompt"),
    ({"what": "space", "prompt": "x"}, r"needs 2 text\(s\): give --prompt and"),
    ({"what": "space", "passage": "01", "layer": 4}, "this model has 4 layers"),
    ({"what": "overlap", "passage": "01", "method": "wanda"}, "e.g. griffin"),
    ({"prompt": "x", "activation_layers": "9-1"}, "not a layer or a range"),
]


@pytest.mark.parametrize(("given", "problem"), REFUSED)
def test_what_cannot_be_inspected(given, problem):
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    words = [word for flag in flags for word in flag if flag[0] != "--what"]
    result = inspect(*filter(None, [given.get("what")]), *words)
    assert isinstance(result.exception, ConfigError | UnknownName)
    assert re.search(problem, str(result.exception))
