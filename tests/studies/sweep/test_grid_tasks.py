"""Options of single tasks in a grid."""

from __future__ import annotations

import pytest

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.studies.sweep.grid import expand, spec

TASKS = ["arc_easy", "perplexity:embedded"]


def test_a_task_has_its_own_options_on_top_of_the_shared_ones() -> None:
    grid = spec(
        {
            "methods": ["dense"],
            "tasks": TASKS,
            "options": {"limit": 4, "batch_size": 2},
            "task_options": {"perplexity:embedded": {"limit": 1}},
        }
    )
    found = {cell.task: cell.options for cell in expand(grid)}
    assert (found["arc_easy"].limit, found["arc_easy"].batch_size) == (4, 2)
    assert found["perplexity:embedded"].limit == 1
    assert found["perplexity:embedded"].batch_size == 2


def test_options_of_a_shortcut_hold_for_its_tasks() -> None:
    grid = spec(
        {"methods": "dense", "tasks": "general-nlp", "task_options": {"general-nlp": {"limit": 3}}}
    )
    assert {cell.options.limit for cell in expand(grid)} == {3}


def test_options_of_a_task_that_is_not_in_the_grid_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"arc_eazy.*did you mean arc_easy"):
        spec({"methods": "dense", "tasks": TASKS, "task_options": {"arc_eazy": {"limit": 1}}})
    with pytest.raises(ConfigError, match="limit = 0 must be 1 or more"):
        spec({"methods": "dense", "tasks": TASKS, "task_options": {"arc_easy": {"limit": 0}}})
