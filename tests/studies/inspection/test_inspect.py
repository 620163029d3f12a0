"""``dart-llm inspect``: its numbers beside independent computations; texts, files, page, errors."""

import csv
import json
import math
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.evaluation.perplexity import score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.study import run_study
from dart_llm.models.capture import capture_activations
from dart_llm.reporting.console import Ui
from dart_llm.session.run import prune
from dart_llm.studies.inspection import sections
from dart_llm.studies.inspection.readings import Readings, activations, impact
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings, InspectText, inspect_texts
from dart_llm.studies.inspection.study import InspectionStudy
from html_page import Page
from lm_cases import loaded, place
from observed_cases import Recorder
from products import SHAPES
from steps import Same, decode, shared_model
from tiny import LAYERS, WIDTH, tokens
from written import lines

A = "the tide comes in twice a day because the moon pulls at the water of the sea. " * 2
B = "11 + 22 = 33; 44 - 12 = 32; 9 * 9 = 81; 100 / 4 = 25; (3 + 4) * 5 = 35; 7 * 8 = 56! " * 2


def read(a=A, b=B, **settings):
    texts = [InspectText(label, label, t) for label, t in zip("AB", (a, b), strict=True) if t]
    given = {"method": "griffin", "sparsity": 0.5, **settings}
    return Readings(*loaded(), InspectSettings(**given), texts)


def recorded(text, layer):
    """u of one layer by a hook of the test, [T, width] float64."""
    model, tokenizer = loaded()
    recorder = Recorder(model)
    with torch.no_grad():
        model(tokenizer(text, return_tensors="pt").input_ids)
    for handle in recorder.handles:
        handle.remove()
    return recorder.get(layer, "u")


def best(u, count):
    """The neurons with the highest GRIFFIN score over the tokens of u."""
    share = (u / u.norm(dim=-1, keepdim=True)).square()
    return set(share.sum(0).topk(count).indices.tolist())


def jaccard(a, b):
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("name", SHAPES)
def test_impact_gives_the_sensitivities_of_the_depth_budgets(name):
    """The same S as the tracer's evidence."""
    model, ids = shared_model(name), tokens(1, 30, seed=6)
    impacts = {}

    def take(layer, activations):
        impacts[layer] = impact(activations)

    with Same(model), capture_activations(model, take), torch.no_grad():
        model(ids)
    settings = {"budget": "depth", "sparsity": 0.5, "masking_step": 1000}
    with prune(model, "griffin", **settings) as run:
        decode(model, ids, 30)
    for layer, evidence in enumerate(run.controller.sequences[0].evidence):
        cosine, change = (float(evidence.sums[name].mean) for name in ("cosine", "change"))
        output = impacts[layer]["output"]
        assert output["change"]["mean"] == pytest.approx(change, rel=1e-4)
        assert output["s"] == pytest.approx((1 - cosine) * change, rel=1e-3, abs=1e-5)


def test_activations():
    u = torch.tensor([[0.0, 3.0, -4.0, 0.0], [1.0, 1.0, 1.0, 1.0], [10.0, 0.02, 0.0, 0.4]])
    numbers = activations(u)
    assert numbers["zero"] == pytest.approx(3 / 12)
    assert numbers["near"] == pytest.approx(5 / 12)  # root mean squares 2.5, 1 and 5.004
    # 9 of 25 are too many to leave out
    assert numbers["concentrated"] == pytest.approx((2 + 4 + 1) / 3 / 4)
    assert (numbers["absolute"]["max"], numbers["absolute"]["median"]) == (10.0, 1.0)
    assert activations(torch.zeros(3, 5))["concentrated"] == 1 / 5


def test_strong_neurons_by_forward_proxy(monkeypatch):
    monkeypatch.setattr(sections, "REACH_CHUNK", 7)  # of 50 and more vocabulary entries
    model, tokenizer = loaded()
    monkeypatch.setattr(sections, "PROXY", "product")
    strong = sections.neurons(read(b=None, top=1))["rows"]
    monkeypatch.setattr(sections, "PROXY", "max")
    alone = sections.neurons(read(None, None, top=3))["rows"]  # the proxy alone decides
    rows = model.lm_head.weight.detach().double()
    for layer, strongest in enumerate(strong):
        u, down = recorded(A, layer), model.transformer.h[layer].mlp.c_proj.weight.double()
        reach = (rows @ down.T).abs()  # [V, I]
        magnitude = u.square().sum(0).sqrt()
        scores = magnitude * reach.amax(0) * magnitude * reach.mean(0)
        neuron = int(scores.argmax())
        assert (strongest["layer"], strongest["neuron"]) == (layer, neuron)
        assert strongest["score"] == pytest.approx(float(scores.max()), rel=1e-4)
        assert strongest["mean_activation"] == pytest.approx(float(u[:, neuron].mean()), rel=1e-3)
        sign = math.copysign(1.0, strongest["mean_activation"])
        promoted = (sign * rows @ down[neuron]).topk(5).indices
        assert strongest["tokens"] == [tokenizer.decode([token]) for token in promoted.tolist()]
        farthest = [row["neuron"] for row in alone if row["layer"] == layer]
        assert farthest == reach.amax(0).topk(3).indices.tolist()


def test_jaccard_and_its_chance():
    a, b, none = torch.tensor([1, 2, 3]), torch.tensor([3, 4]), torch.tensor([])
    pairs = ((a, b), (a, a), (a, none), (none, none))
    assert [sections.jaccard(*pair) for pair in pairs] == [1 / 4, 1.0, 0.0, 1.0]
    assert sections.expected_jaccard(6, 3, 2) == pytest.approx(1 / 4)  # one of 3 + 2 - 1
    assert (sections.expected_jaccard(3, 3, 3), sections.expected_jaccard(4, 0, 0)) == (1.0, 1.0)


def test_overlap():
    """The whole texts by the method's own masks, the halves from activations of the whole texts."""
    model, tokenizer = loaded()
    data = sections.overlap(read())
    masks = []
    for text in (A, B):
        with prune(model, "griffin", sparsity=0.5) as run, torch.no_grad():
            model(tokenizer(text, return_tensors="pt").input_ids, use_cache=True)
            masks.append([set(mask.ids.tolist()) for mask in run.select()])
    for layer, (of_a, of_b) in enumerate(zip(*masks, strict=True)):
        row = data["layers"][layer]
        assert (row["kept_a"], row["kept_b"]) == (len(of_a), len(of_b))
        assert row["jaccard"] == pytest.approx(jaccard(of_a, of_b))
        assert row["chance"] == sections.expected_jaccard(WIDTH, len(of_a), len(of_b))
        us = [recorded(text, layer) for text in (A, B)]
        halves = [part for u in us for part in (u[: len(u) // 2], u[len(u) // 2 :])]
        a1, a2, b1, b2 = (best(half, WIDTH // 2) for half in halves)
        across = sum(jaccard(x, y) for x in (a1, a2) for y in (b1, b2)) / 4
        assert row["same_text"] == pytest.approx((jaccard(a1, a2) + jaccard(b1, b2)) / 2)
        assert row["across"] == pytest.approx(across)
    assert data["removed"] == pytest.approx(0.5)


def test_what_cannot_be_looked_at():
    for settings in (
        {"method": "dense", "sparsity": None},
        {"method": "wanda"},
        {"method": "dart-token"},
        {"ranking_method": "weight"},
    ):
        with pytest.raises(ConfigError, match="does not select the neurons of a sequence by its"):
            sections.overlap(read(**settings))
    with pytest.raises(ConfigError, match=r"needs 64 tokens of each text, but B \(B\) has 3"):
        sections.ablation(read(A, "sea"))
    with pytest.raises(ConfigError, match=r"text A \(A\) has 1 token"):
        read("a")
    limited = read("x" * 3000, B, max_tokens=1100)  # A by the model's context
    assert [len(ids) for ids in limited.ids] == [1024, len(B)]


def test_ablation():
    study = read(share=0.25, ablation_seeds=2)
    with Same(study.model):
        rows = sections.ablation(study)["rows"]
    model, sets = study.model, []
    for text, ids in zip((A, B), study.ids, strict=True):
        half = len(ids) // 2
        sets.append([best(recorded(text, layer)[:half], WIDTH // 4) for layer in range(LAYERS)])
    a, b = sets
    removed = {
        "A's own": [of_a - of_b for of_a, of_b in zip(a, b, strict=True)],
        "B's own": [of_b - of_a for of_a, of_b in zip(a, b, strict=True)],
    }
    assert len(rows) == 4
    for row in rows:
        ids, sets = study.ids["AB".index(row["text"])], removed[row["removed"]]
        window = Window(ids, len(ids) // 2)
        with prune(model, remove={k: torch.tensor(sorted(n)) for k, n in enumerate(sets)}) as run:
            losses = score_window(model, run, window).losses
        assert (row["neurons"], row["tokens"]) == (sum(map(len, sets)), len(losses))
        assert row["achieved_sparsity"] == pytest.approx(row["neurons"] / (LAYERS * WIDTH))
        assert (row["dense_token_share"], row["remasks"]) == (0.0, 0)
        assert row["loss"] == pytest.approx(fmean(losses), rel=1e-5)
        dense = fmean(score_window(model, None, window).losses)
        over, random = row["over_dense"], row["over_random"]["estimate"]
        assert over["estimate"] == pytest.approx(row["loss"] - dense, abs=1e-5)
        assert random == pytest.approx(row["loss"] - row["random_loss"], abs=1e-6)
        assert row["random_loss"] != row["dense_loss"]
        assert over["n"] == math.ceil(row["tokens"] / sections.BLOCK)
    rows = sections.ablation(read(A, A, ablation_seeds=1))["rows"]  # no neurons are A's alone
    assert [row["neurons"] for row in rows] == [0] * 4
    assert rows[0]["loss"] == rows[0]["dense_loss"] == rows[0]["random_loss"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InspectionStudy, "figures", lambda self: ())  # drawn once, for ``whole``
    monkeypatch.setattr(InspectionStudy, "write_page", lambda self: None)


def inspect(*arguments):
    """``dart-llm inspect ARGUMENTS`` on the tiny model."""
    words = ["inspect", *arguments, "--model", str(place() / "model"), "--device", "cpu"]
    return CliRunner().invoke(app, words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of one inspection of everything, and its document; A has words of HTML."""
    root = tmp_path_factory.mktemp("inspected")
    texts = {"prompt": f"{A}<script>1</script> & so on", "prompt_b": B, "ablation_seeds": 1}
    given = {"model": str(place() / "model"), "device": "cpu", "method": "griffin", **texts}
    settings = InspectSettings(results_dir=str(root), **given)
    folder = run_study(InspectionStudy(settings, (), Ui(quiet=True))).path
    return folder, json.loads((folder / "inspect.json").read_text("utf-8"))


def test_files_plots_and_page_have_the_numbers(whole):
    folder, kept = whole
    assert list(kept["sections"]) == list(TEXTS)
    assert [text["label"] for text in kept["texts"]] == ["A", "B"]
    assert {path.stem for path in folder.glob("*.csv")} == {*TEXTS, "activations"}
    rows = list(csv.DictReader((folder / "layers.csv").read_text("utf-8").splitlines()))
    for row, layer in zip(rows, kept["sections"]["layers"]["layers"], strict=True):
        assert float(row["output.s"]) == layer["output"]["s"]
    losses = [row["loss"] for row in kept["sections"]["ablation"]["rows"]]
    jaccard = kept["sections"]["overlap"]["mean"]["jaccard"]
    assert [line["value"] for line in lines(folder / "rows.jsonl")] == [jaccard, *losses]
    mean = {key: f"{value:.3f}" for key, value in kept["sections"]["overlap"]["mean"].items()}
    words = f"a Jaccard index of {mean['jaccard']} ({mean['chance']} by chance)."
    assert words in (folder / "inspect.md").read_text("utf-8")
    drawn = {f"inspect_{name}" for name in ("layers", "activations", "overlap")}
    assert {path.stem for path in (folder / "plots").iterdir()} == drawn
    html = (folder / "report.html").read_text("utf-8")
    page = Page(html)
    assert html.count("<img ") == 3 and page.row("mean")[4] == mean["jaccard"]
    assert f"{A}<script>1</script> & so on" in page.text and "<script" not in html
    assert words in page.text.replace("\xa0", " ")


def test_what_is_looked_at_follows_from_the_texts():
    bare = json.loads(inspect("--json").stdout)
    assert list(bare["sections"]) == ["neurons"] and bare["texts"] == []
    assert InspectSettings(prompt="x", prompt_b="y").chosen(()) == list(TEXTS)
    texts = ("--prompt", "the sea", "--prompt-b", "the moon")
    assert "skipping ablation: ablation needs 64 tokens" in inspect(*texts).stderr
    assert "needs 64 tokens" in str(inspect("ablation", *texts).exception)
    plain = json.loads(inspect(*texts, "--method", "dense", "--json").stdout)
    assert list(plain["sections"]) == ["layers", "neurons"]


def test_activations_are_kept_on_request():
    keep = ("--save-activations", "--activation-tokens", ":9", "--activation-tensors", "u,r")
    result = inspect("layers", "--prompt", A, "--prompt-b", B, *keep)
    assert result.exit_code == 0, result.exception
    (folder,) = Path("results").glob("*/*")
    for label in "ab":
        tensors = load_file(folder / f"activations-{label}.safetensors")
        assert tensors["layer3.u"].shape == (9, WIDTH) and len(tensors) == 2 * LAYERS + 1
    assert "give --prompt or --pass" in str(inspect("neurons", "--save-activations").exception)


def test_texts_of_passages_and_prompts():
    bees, loans = inspect_texts(InspectSettings(passage="01"))
    assert bees.text.startswith("When a honeybee finds") and loans.text.startswith("A mortgage is")
    assert (bees.label, loans.label) == ("A", "B") and "honeybee" not in loans.text
    sky, words = inspect_texts(InspectSettings(prompt="sky", prompt_b="my own\nwords"))
    assert (sky.name, words.title) == ("sky", "B (my own words)") and sky.text != "sky"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--prompt-b y", "text B needs a text A"),
        ("--prompt x --prompt-file f", "not both"),
        ("--prompt x --passage 01", "give prompts or --passage, not both"),
        ("--prompt x --share 1.0", r"--share 1\.0 must be less than 1"),
        ("--prompt= --prompt-b y", r"text A \(\) is empty"),
        ("overlap --prompt x", r"needs 2 text\(s\): give --prompt"),
        ("overlap --passage 01 --method wanda", "e.g. griffin"),
    ],
)
def test_what_cannot_be_inspected(words, problem):
    result = inspect(*words.split())
    assert isinstance(result.exception, ConfigError | UnknownName)
    assert re.search(problem, str(result.exception))
