"""The files under examples/ run as they stand, and print what their pages say."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dart_llm.pruning.registry import SCORES

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
NOTEBOOK = FOLDER / "first_look.ipynb"
PAGE = FOLDER.parent / "docs/quickstart.md"
LONGEST = 40


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    SCORES.unregister("reach")


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_four_short_files_and_a_notebook() -> None:
    assert SCRIPTS == ["batch.py", "own_score.py", "prune_and_generate.py", "watch_remasks.py"]
    for name in SCRIPTS:
        assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) < LONGEST
    page = PAGE.read_text(encoding="utf-8")
    found = sorted(re.findall(r"\]\(\.\./examples/([\w.]+)\)", page))
    assert found == sorted([*SCRIPTS, NOTEBOOK.name])


def test_the_notebook_is_clean() -> None:
    found = notebook()
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])


@pytest.mark.smollm2
def test_prune_and_generate(capsys: pytest.CaptureFixture[str]) -> None:
    text, *lines = printed("prune_and_generate.py", capsys).rsplit("\n", 4)
    assert text.startswith("The sky is blue because")
    assert lines[0] == "asked for: 30% of the FFN neurons removed"
    assert lines[1] == "while pruned: 30.0%"
    assert lines[2] == "over all 59 decoded tokens: 24.4%"  # the first 11 ran dense


@pytest.mark.smollm2
def test_own_score(capsys: pytest.CaptureFixture[str]) -> None:
    found = dict(re.findall(r"(\w+): perplexity ([\d.]+)", printed("own_score.py", capsys)))
    assert {name: float(value) for name, value in found.items()} == {
        "normalized": pytest.approx(17.9, rel=0.05),
        "reach": pytest.approx(20.3, rel=0.05),
    }


@pytest.mark.smollm2
def test_batch(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed("batch.py", capsys).splitlines()
    assert lines[0].startswith("shared: 1 masks")
    assert lines[2] == "per_row: 3 masks, executor masked"
    rows = [re.fullmatch(r"  row (\w+): (\d+)% removed", line) for line in lines[1:2] + lines[3:6]]
    assert [row and row.groups() for row in rows] == [
        ("None", "30"),
        ("0", "30"),
        ("1", "30"),
        ("2", "30"),
    ]
    assert lines[6].startswith("Tides rise and fall because the moon")


@pytest.mark.smollm2
def test_watch_remasks(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, last = printed("watch_remasks.py", capsys).splitlines()
    assert first == "token 5: first, 23040 neurons kept"
    found = re.fullmatch(
        r"token 101: interval, 23040 neurons kept, (\d+)% as in the mask before", second
    )
    assert found is not None and 50 < int(found[1]) < 100
    assert last == "re-masks: 1"


@pytest.mark.smollm2
def test_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    outputs = []
    for cell in notebook()["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            outputs.append(capsys.readouterr().out)
    dense, pruned, report, layers, same, perplexity = outputs
    assert dense.startswith("The sky is blue because")
    assert pruned.startswith("The sky is blue because") and pruned != dense
    assert "50.0% while pruned" in report and "mean over 39 decoded tokens" in report
    assert len(layers.splitlines()) == 30 and layers.startswith(" 0 ")
    assert same == "same text as before: True\n"
    values = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", perplexity)}
    assert list(values) == ["dense", "griffin", "dart"]
    assert values["dense"] < values["dart"] < values["griffin"]
