"""What items hold, and the numbers of a group: means where they are means, else none."""

from __future__ import annotations

import math

import pytest

from dart_llm.experiments import comparison as compare_items
from dart_llm.experiments import rows as measure_rows
from lm_cases import candidate, measured


def test_the_perplexity_of_a_group_is_that_of_all_its_words():
    found = measured(candidate(), "tiny_pages")
    loss = math.fsum(item["mean_loss"] * item["tokens"] for item in found.items)
    words = sum(item["tokens"] for item in found.items)
    assert len(found.items) == 3 and len({item["tokens"] for item in found.items}) == 3
    assert (found.metric, found.higher_is_better) == ("word_perplexity", False)
    assert found.metrics == {"word_perplexity": pytest.approx(math.exp(loss / words))}
    assert compare_items.scores(found.to_dict()).mean == pytest.approx(math.exp(loss / words))


def test_a_perplexity_of_bytes_has_items():
    found = measured(candidate(), "tiny_bytes")
    assert (found.metric, found.higher_is_better) == ("byte_perplexity", False)
    mean = compare_items.scores(found.to_dict()).mean
    assert mean == pytest.approx(found.metrics["byte_perplexity"])
    assert found.metrics["bits_per_byte"] == pytest.approx(math.log2(mean))


def test_what_no_task_averages_has_no_mean_over_a_group_and_no_interval():
    found = measured(candidate("griffin"), "tiny_lasts")
    assert all(part["perplexity"] > 1 for part in found.subtasks.values())
    assert found.metrics == {"acc": sum(item["acc"] for item in found.items) / len(found.items)}
    alone = measured(candidate("griffin"), "tiny_last").to_dict()
    assert alone["metrics"]["perplexity"] > 1
    assert measure_rows._interval(alone, "perplexity") == ""
    assert measure_rows._interval(alone, "acc") != ""
