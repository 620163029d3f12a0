"""The files under examples/ run as they stand, and print what their pages say."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from dart_llm.errors import ConfigError
from dart_llm.pruning.registry import SCORES
from dart_llm.session.run import prune
from tiny import tiny, tokens

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
NOTEBOOKS = ("first_look.ipynb", "topic_neurons.ipynb")
LONGEST = 40


@pytest.fixture(autouse=True)
def _clean():
    yield
    SCORES.unregister("reach")


def code_of(notebook):
    """Its cells of code."""
    cells = json.loads((FOLDER / notebook).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def ran(notebook, capsys):
    """What each cell printed."""
    names, outputs = {}, []
    for cell in code_of(notebook):
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        outputs.append(capsys.readouterr().out)
    return outputs


def test_five_short_files_and_clean_notebooks():
    generating = ["pipeline.py", "prune_and_generate.py", "watch_remasks.py"]
    assert ["batch.py", "own_score.py", *generating] == SCRIPTS
    for name in SCRIPTS:
        assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) < LONGEST
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == [*NOTEBOOKS]
    code = [cell for notebook in NOTEBOOKS for cell in code_of(notebook)]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


PRINTED = {
    "prune_and_generate.py": """The sky is blue because.*
requested: 30% of the FFN neurons removed
while pruned: 30[.]0%
over all 59 decoded tokens: 24[.]4%""",  # the first 11 ran dense
    "pipeline.py": r"The sky .*\n[23]\d% of the neurons were removed",
    "own_score.py": r"normalized: perplexity (\d+[.]\d)\nreach: perplexity (\d+[.]\d)",
    "batch.py": r"""shared: 1 masks.*
  row None: 30% removed.*
per_row: 3 masks, executor masked
  row 0: 30% removed.*
  row 1: 30% removed.*
  row 2: 30% removed.*
Tides rise and fall because the moon.*""",
    "watch_remasks.py": r"""token 5: first, 23040 neurons kept
token 101: interval, 23040 neurons kept, [5-9]\d% also in the previous mask
re-masks: 1""",
}


@pytest.mark.smollm2
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_an_example_prints(name, capsys):
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    said = capsys.readouterr().out.rstrip("\n")
    found = re.fullmatch(PRINTED[name], said, re.DOTALL)
    assert found, said
    if name == "own_score.py":
        assert [*map(float, found.groups())] == pytest.approx([17.9, 20.3], rel=0.05)


@pytest.mark.smollm2
def test_a_first_look(capsys):
    dense, pruned, report, layers, same, perplexity = ran("first_look.ipynb", capsys)
    assert dense.startswith("The sky is blue because")
    assert pruned.startswith("The sky is blue because") and pruned != dense
    assert "50.0% while pruned" in report and "mean over 39 decoded tokens" in report
    assert len(layers.splitlines()) == 30 and layers.startswith(" 0 ")
    assert same == "same text as before: True\n"
    values = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", perplexity)}
    assert list(values) == ["dense", "griffin", "dart"]
    assert values["dense"] < values["dart"] < values["griffin"]


@pytest.mark.smollm2
def test_neurons_of_a_topic(capsys):
    """The tides' own neurons write towards high and flow, and it is the tides that need them."""
    _, tokens, changes, shape, best, words, needed, held = ran("topic_neurons.ipynb", capsys)
    assert tokens.splitlines()[5].split()[2:] == ["pruned", "0", "768"]
    assert re.search(r"0 +0 +first +23040 +0 +23040\n1 +12 +interval +23040 +(\d+) +\1$", changes)
    assert shape == "30 layers, 188 1536 tokens and neurons\n"
    assert best.startswith("[(27, 296), (28, 831)") and "' flow', ' stream'" in words
    found = dict(re.findall(r"(\w+): dense .* without ([-+.\d]+), random", needed))
    assert float(found["tides"]) == pytest.approx(0.198, abs=0.02)
    assert abs(float(found["bread"])) < 0.05
    off, on, strong = held.splitlines()[:3]
    assert "high" not in off and on.count(" high") == 2 and " high" in strong


IDS = tokens(1, 24)
ASKED = {"max_new_tokens": 12, "do_sample": False}


def test_the_folder_generates_what_prune_does(tmp_path, monkeypatch):
    """``model.generate(custom_generate=FOLDER)``; its copy goes elsewhere than the user's cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    recipe = {"custom_generate": str(FOLDER / "transformers"), "trust_remote_code": True}
    model, reports = tiny(), []
    dense = model.generate(IDS, **ASKED)
    for settings in ({"method": "griffin", "sparsity": 0.5}, {"method": "dart-prompt"}):
        more = {"min_evidence": 4} if settings["method"] == "dart-prompt" else {}
        with prune(model, **settings, **more) as run:
            wanted = model.generate(IDS, **ASKED)
        result = model.generate(
            IDS, **ASKED, **recipe, **settings, dart=more, on_report=reports.append
        )
        assert torch.equal(result, wanted) and not torch.equal(result, dense)
        assert reports[-1].to_dict() == run.report().to_dict()
    assert torch.equal(model.generate(IDS, **ASKED), dense)  # nothing stays on the model
    with pytest.raises(ConfigError, match="sparsity"):
        model.generate(IDS, **ASKED, **recipe, sparsity=50)
