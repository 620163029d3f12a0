"""Inspection: which texts and settings are taken, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.inspection.texts import inspect_texts


def test_what_is_looked_at_follows_from_the_texts() -> None:
    assert InspectSettings().chosen(()) == ["weights", "neurons"]
    assert InspectSettings(prompt="x").chosen(()) == ["layers", "weights", "neurons"]
    both = InspectSettings(prompt="x", prompt_b="y")
    assert both.chosen(()) == ["layers", "weights", "neurons", "overlap", "ablation", "space"]
    assert both.chosen(["space", "layers"]) == ["layers", "space"]
    assert both.prune_config().sparsity == 0.5 and not both.prune_config().compensation
    with pytest.raises(UnknownName, match="did you mean layers"):
        both.chosen(["layer"])
    with pytest.raises(ConfigError, match=r"overlap needs 2 text\(s\): give --prompt and"):
        InspectSettings(prompt="x").chosen(["overlap"])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"prompt_b": "y"}, "text B without text A"),
        ({"prompt": "x", "prompt_file": "f"}, "not both"),
        ({"prompt": "x", "passage": "01"}, "one of the three"),
        ({"share": 1.0}, r"--share 1\.0 must be less than 1"),
        ({"top": 0}, "--top 0 must be at least 1"),
        ({"neuron_score": "maxx"}, "did you mean max"),
        ({"prompt": " ", "prompt_b": "y"}, r"text A \(\) is empty"),
        ({"prompt_file": "none.txt"}, "there is no prompt file none.txt: give an existing"),
        ({"passage": "99"}, "unknown prompt or passage"),
        ({"runs": "a,b,c"}, "one results folder or two, not 3"),
    ],
)
def test_bad_settings(given: dict[str, Any], problem: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=problem):
        inspect_texts(InspectSettings(**given))


def test_texts_of_a_passage_and_of_prompts() -> None:
    bees, loans = inspect_texts(InspectSettings(passage="01"))
    assert bees.text.startswith("When a honeybee finds") and loans.text.startswith("A mortgage is")
    assert (bees.label, loans.label) == ("A", "B") and "honeybee" not in loans.text
    sky, own = inspect_texts(InspectSettings(prompt="sky", prompt_b="my own\nwords"))
    assert (sky.name, own.name, own.title) == ("sky", "my own words", "B (my own words)")
    assert sky.text != "sky" and len(own.sha256) == 64
