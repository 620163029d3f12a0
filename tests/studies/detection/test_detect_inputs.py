"""``dart-llm detect``: passages as tokens, and settings."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dart_llm.cli.options import parameters
from dart_llm.data.passages import Passage, Text, Topic, check, digest, shipped, tokens
from dart_llm.data.passages import tokenised_passages as passages
from dart_llm.errors import ConfigError
from dart_llm.models.loading import load
from dart_llm.settings import merge
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.detection.signals import SIGNALS
from dart_llm.studies.detection.study import plan
from detect_cases import folder, passage


def test_changes_in_tokens() -> None:
    _, tokenizer = load(folder())
    found = tokens(passage(1), tokenizer)
    assert found.changes == passage(1).changes  # one token per character
    assert tokenizer.decode(found.ids[found.changes[0] :]).startswith("interest on loan")
    assert found.topics == ("bees", "loans")


class Spans:
    """A tokenizer of words with a special token ahead, and blanks that belong to the next word."""

    is_fast = True

    def __call__(self, text: str, verbose: bool = True, **more: Any) -> Any:
        self.spans = [(0, 0), *((m.start(), m.end()) for m in re.finditer(r"\s*\S+", text))]
        self.text = text
        found: dict[str, Any] = {"input_ids": list(range(len(self.spans)))}
        if more.get("return_offsets_mapping"):
            found["offset_mapping"] = self.spans
        return found


def test_a_token_that_holds_the_break_too_belongs_to_the_new_topic() -> None:
    one = Passage("x", "a bb\n\ncc d", (Topic("a", "a"), Topic("b", "b")), (6,))
    assert tokens(one, Spans()).changes == (3,)  # special, a, bb, then the break with cc


class NoSpans(Spans):
    is_fast = False

    def __call__(self, text: str, verbose: bool = True, **more: Any) -> Any:
        if more.get("return_offsets_mapping"):
            raise NotImplementedError("only fast tokenizers know places")
        return super().__call__(text)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.text[start:end] for start, end in (self.spans[i] for i in ids))


def test_without_places_the_text_before_is_counted() -> None:
    one = Passage("x", "a bb\n\ncc d", (Topic("a", "a"), Topic("b", "b")), (6,))
    assert tokens(one, NoSpans()).changes == (3,)


def test_what_does_not_fit_is_refused_by_name() -> None:
    text = Text("07", torch.zeros(900, dtype=torch.long), (300,), ("a", "b"))
    check([text], 299, 900)
    check([text], 299, None)
    with pytest.raises(ConfigError, match='first change of passage "07" is its token 300, within'):
        check([text], 300, None)
    with pytest.raises(ConfigError, match="has 900 tokens, and the model's context holds 899"):
        check([text], 100, 899)


def test_the_packages_passages_are_the_default() -> None:
    assert all(passages(name, None) == shipped() for name in (None, "", "shipped"))
    assert [one.id for one in passages(None, 2)] == [one.id for one in shipped()[:2]]
    assert digest(shipped()) != digest(shipped()[:2])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": "dart"}, "leave out method"),
        ({"signals": "hiden"}, "did you mean hidden"),
        ({"signals": " , "}, "--signals is empty"),
        ({"thresholds": "0,x"}, 'thresholds "0,x" must be numbers'),
        ({"thresholds": "0,inf"}, "finite"),
        ({"windows": "1"}, "1 is too small: give 2 or more"),
        ({"counts": "0,1"}, "0 is too small: give 1 or more"),
        ({"prompt_tokens": 15}, "--prompt-tokens 15 must be at least 16"),
        ({"horizon": 0}, "--horizon 0 must be at least 1"),
        ({"sparsity": 0.5}, "leave out sparsity"),
        ({"attn_implementation": "sdpa"}, "only eager attention gives: drop"),
        ({"rules": "papr"}, "did you mean paper"),
        ({"rules": "griffin"}, "griffin never re-masks"),
    ],
)
def test_bad_settings_are_one_sentence(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        plan(merge(DetectSettings, given, environment={}))


def test_defaults() -> None:
    asked = merge(DetectSettings, {}, environment={})
    assert asked.signal_names() == tuple(SIGNALS)
    assert asked.rule_names() == (
        "dart",
        "paper",
        "published",
        "interval 64",
        "dart-prompt",
    )
    assert asked.experiment == "detect-smollm2-135m"
    assert len(plan(asked).sweep) == 3 * 11
    other = merge(DetectSettings, {"attn_implementation": "sdpa", "signals": "hidden"})
    assert other.signal_names() == ("hidden",)


def test_nothing_about_pruning_is_a_flag() -> None:
    names = {parameter.name for parameter in parameters(DetectSettings)}
    assert {"model", "seed", "signals", "horizon", "results_dir"} <= names
    assert not names & {"method", "sparsity", "masks", "drift", "budget", "executor"}
