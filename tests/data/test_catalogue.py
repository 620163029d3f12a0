"""The table of data sets: complete, consistent, and the one that lm-eval's tasks load."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from dart_llm.data import datasets as catalogue
from dart_llm.data.datasets import DATA_SETS, USES, DataSet, rows
from dart_llm.errors import LoadError, UnknownName
from fake_datasets import install

ROLES = {
    "perplexity": {"text"},
    "calibration": {"text"},
    "summarize": {"document", "summary"},
    "prompts": {"question", "choices", "answer"},
    "eval": {"question", "answer"},
}
"""What a data set must have for a use."""


def test_every_use_has_its_data_sets() -> None:
    assert {use: catalogue.names(use) for use in USES} == {
        "perplexity": ("c4", "wikitext2"),
        "calibration": ("c4_train",),
        "summarize": ("cnn_dailymail", "gov_report", "multi_news", "xsum"),
        "prompts": ("mmlu",),
        "eval": (
            *("arc_challenge", "arc_easy", "boolq", "gpqa", "hellaswag", "medmcqa", "mmlu_test"),
            *("openbookqa", "rte", "winogrande"),
        ),
    }
    assert catalogue.names() == tuple(sorted(DATA_SETS))


def test_an_entry_says_everything() -> None:
    for name, data in DATA_SETS.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", data.hub_id)
        assert data.uses and set(data.uses) <= set(USES)
        assert all(ROLES[use] <= set(data.columns) for use in data.uses)
        assert all(column for columns in data.columns.values() for column in columns)
        assert data.licence_page.startswith("https://")
        assert data.megabytes
        assert bool(data.tasks) == ("eval" in data.uses)
        assert data.gated == (name == "gpqa")


@pytest.mark.contract("nothing evaluated calibrates")
def test_what_calibrates_is_not_what_is_scored() -> None:
    scored = {
        (found.hub_id, found.config, found.split)
        for found in DATA_SETS.values()
        if set(found.uses) & {"perplexity", "summarize", "eval"}
    }
    for use in ("calibration", "prompts"):
        for found in map(catalogue.get, catalogue.names(use)):
            assert (found.hub_id, found.config, found.split) not in scored


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        DATA_SETS["mine"] = DATA_SETS["c4"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        DATA_SETS["c4"].split = "train"  # type: ignore[misc]
    with pytest.raises(TypeError):
        DATA_SETS["c4"].columns["text"] = ("other",)  # type: ignore[index]


def test_lookups() -> None:
    assert catalogue.get("c4").where == "allenai/c4 (en, validation)"
    assert catalogue.get("xsum", "summarize").where == "EdinburghNLP/xsum (test)"
    assert catalogue.get("gov_report").column("document") == "report"
    with pytest.raises(UnknownName, match="unknown data set 'xsumm'; did you mean xsum"):
        catalogue.get("xsumm")
    with pytest.raises(UnknownName, match="unknown data set 'c4'; known: cnn_dailymail"):
        catalogue.get("c4", "summarize")
    with pytest.raises(UnknownName, match="unknown use of data sets 'sum'"):
        catalogue.names("sum")


def test_a_gated_data_set_says_how_to_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch).error = PermissionError("gated")
    with pytest.raises(LoadError) as caught:
        next(rows(catalogue.get("gpqa"), "choose another task"))
    assert str(caught.value) == (
        "the data set Idavidrein/gpqa (gpqa_main, train) could not be fetched from the hub "
        "(gated); accept its conditions on the hub and set HF_TOKEN, or choose another task"
    )


def test_every_missing_column_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = replace(catalogue.get("medmcqa"), split="s")
    row = {"question": "q", "opa": "a", "opb": "b", "cop": 1}
    install(monkeypatch).rows = {("openlifescienceai/medmcqa", None, "s", False): [row]}
    with pytest.raises(LoadError, match=r"no column opc or opd: its columns are question, opa, "):
        next(rows(source, "x"))


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files without their functions."""


_Loader.add_multi_constructor("!", lambda *_arguments: None)


def _task(name: str, files: dict[str, Path]) -> dict[str, Any]:
    def read(path: Path) -> dict[str, Any]:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        above = found.get("include")
        return {**read(path.parent / above), **found} if above else found

    return read(files[name])


def _task_files() -> dict[str, Path]:
    spec = find_spec("lm_eval")
    assert spec and spec.origin
    tasks = Path(spec.origin).parent / "tasks"
    folders = "arc glue/rte gpqa/n_shot hellaswag medmcqa mmlu/default openbookqa super_glue/boolq"
    found = {}
    for folder in f"{folders} winogrande".split():
        for path in (tasks / folder).glob("*.yaml"):
            name = re.search(
                r"^[\"']?task[\"']?: *[\"']?([\w-]+)", path.read_text(encoding="utf-8"), re.M
            )
            if name:
                found[name[1]] = path
    return found


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.parametrize("found", [d for d in DATA_SETS.values() if d.tasks], ids=lambda d: d.name)
def test_the_ids_are_those_of_the_installed_tasks(found: DataSet) -> None:
    files = _task_files()
    for task in found.tasks:
        name = f"mmlu_{found.config}" if task == "mmlu" else task
        settings = _task(name, files)
        assert settings["dataset_path"] == found.hub_id
        assert settings.get("dataset_name") == found.config
        assert found.split == (settings.get("test_split") or settings["validation_split"])
