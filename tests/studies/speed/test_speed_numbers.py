"""The arithmetic of ``dart-llm bench speed``, and its settings: nothing here runs a model."""

from __future__ import annotations

from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import merge
from dart_llm.studies.speed.cases import Case, dense_cases, rebuilding
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.speed.study import shuffled
from dart_llm.studies.speed.summary import (
    DecodeTraffic,
    mad,
    mean_context,
    number,
    summarise,
    timed_mean,
)
from dart_llm.studies.speed.timing import Growth, read_bandwidth
from speed_cases import sample, settings


def test_the_byte_limit_by_hand() -> None:
    """600 of 800 bytes of weights are the FFN's; 200 bytes of cache make f 0.6."""
    sizes = DecodeTraffic(ffn=600, weights=800, cache=200)
    assert sizes.share == pytest.approx(0.6)
    assert sizes.limit(0.5) == pytest.approx(1 / 0.7)
    assert sizes.limit(0.0) == 1.0
    assert sizes.limit(0.5, proxy_share=0.25) == pytest.approx(1 / 0.85)
    assert sizes.read(1.0) == 1000 and sizes.read(0.5) == 700
    # the cache makes the gain smaller
    assert DecodeTraffic(600, 800, 0).limit(0.5) > sizes.limit(0.5)


def test_the_mean_context_by_hand() -> None:
    # prompt of 10; two untimed tokens read 11 and 12 positions; the timed four 13, 14, 15, 16
    assert mean_context(10, 4) == 14.5


def test_means_over_the_timed_tokens_alone() -> None:
    # 0.4 over 10 tokens, of which the first two were dense: 4.0 / 8
    assert timed_mean(0.4, 10, 0.0, 2) == pytest.approx(0.5)
    assert timed_mean(0.4, 2, 0.4, 2) == 0.0


def test_the_spread_by_hand() -> None:
    assert mad([1.0, 2.0, 3.0, 4.0, 100.0]) == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.4, "1234"), (17.62, "17.6"), (1.234, "1.23"), (0.0417, "0.042"), (-1e-5, "0.000")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def _document(**more: Any) -> dict[str, Any]:
    griffin = PruneConfig.build("griffin", sparsity=0.5)
    cases = [
        Case("transformers"),
        Case("dense, slim", griffin.replace({"sparsity": 0.0, "executor": "slim"})),
        Case("griffin 50 %, slim", griffin, variant="griffin"),
    ]
    counted = {"achieved_sparsity": 0.5, "dense_token_share": 0.25, "ffn_bytes_share": 0.5,
               "remasks": 1, "attach_s": 0.02, "extra_memory_bytes": 3 * 2**20}  # fmt: skip
    times = {
        "transformers": [[40, 40], [44, 44]],
        "dense, slim": [[21, 21], [21, 21]],
        "griffin 50 %, slim": [[14, 16], [15, 15]],
    }
    extra = {
        "griffin 50 %, slim": {**counted, "phases": "pp"},
    }
    repetitions = [
        {
            "order": [*times],
            "sitting": "one",
            "read_bandwidth": speed,
            "samples": {
                label: sample(each[turn], **extra.get(label, {})) for label, each in times.items()
            },
        }
        for turn, speed in ((0, 50000.0), (1, 60000.0))
    ]
    sizes = {"ffn_bytes": 600.0, "weight_bytes": 800, "cache_bytes_per_position": 10}
    about = {"weights": sizes, "prompt_tokens": 16, "tokens": 3, **more}  # a mean context of 20
    return summarise(cases, "dense, slim", repetitions, about)


def test_rows_by_hand() -> None:
    found = _document()
    assert (found["ffn_share_of_bytes_read"], found["mean_context"]) == (0.6, 20)
    assert found["read_bandwidth"]["bytes_per_second"] == 55000
    plain, own, row = found["rows"]
    steps = [plain[f"token_ms_{at}"] for at in ("p5", "median", "p95")]
    assert steps == pytest.approx([40, 42, 44])  # of 40, 40, 44, 44: straight lines between them
    assert (plain["tg_ms"], plain["tg_spread_ms"]) == (pytest.approx(42), pytest.approx(2))
    assert plain["times_own_dense"] == pytest.approx(0.5)
    assert own["limit"] == 1.0 and own["share_of_limit"] is None
    assert row["tg_ms"] == pytest.approx(15) and row["pp_tokens_per_second"] == pytest.approx(160)
    assert row["times_transformers"] == pytest.approx(42 / 15)
    assert row["times_own_dense"] == pytest.approx(1.4)
    assert row["limit"] == pytest.approx(1 / 0.7)
    assert row["share_of_limit"] == pytest.approx(0.98)
    assert row["bytes_per_token"] == pytest.approx(700)
    assert row["bytes_per_second"] == pytest.approx(700 / 0.015)
    assert row["share_of_read_bandwidth"] == pytest.approx(700 / 0.015 / 55000)
    assert (row["achieved_sparsity"], row["dense_token_share"], row["remasks"]) == (0.5, 0.25, 1)
    assert row["attach_ms"] == pytest.approx(20) and row["extra_memory_bytes"] == 3 * 2**20
    # 100 for the prompt, 32 for two untimed tokens, and the timed ones: 30 and 30
    assert row["all_ms"] == pytest.approx(162)
    assert row["all_times_transformers"] == pytest.approx((132 + 84) / 162)
    assert row["all_times_own_dense"] == pytest.approx((132 + 42) / 162)
    assert plain["attach_ms"] is None and plain["peak_growth_bytes"] is None


def test_the_order_follows_from_the_seed() -> None:
    labels = [str(number) for number in range(6)]
    first = [shuffled(labels, 0, number) for number in range(4)]
    assert first == [shuffled(labels, 0, number) for number in range(4)]
    assert all(sorted(one) == labels for one in first)
    assert len(set(map(tuple, first))) == 4
    assert shuffled(labels, 1, 0) != first[0]


# cases and settings


def test_masks_are_rebuilt_as_often_as_asked() -> None:
    config = rebuilding(PruneConfig.build("dart", sparsity=0.5), 64)
    assert config.drift.rule == "interval 64" and config.remask.observe_tokens == 1
    assert (config.drift.min_distance, config.drift.max_dense_share) == (0, None)
    assert config.remask.evidence == "decay"  # the rest is the method's
    dense = [one.label for one in dense_cases()]
    assert dense == ["transformers", "dense, slim", "dense, native", "dense, graph"]


def test_variants_come_after_methods(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text("calm: {drift: never}\ng2: {method: griffin}\n", encoding="utf-8")
    found = settings(tmp_path, methods="griffin", variants=str(file)).variant_list()
    assert [one.label for one in found] == ["griffin", "calm", "g2"]
    assert [one.config.method for one in found] == ["griffin", "dart", "griffin"]
    assert found[1].config.drift.rule == "never"
    cases = settings(tmp_path, variants=str(file), sparsities="0.5,0.7").case_list()
    assert len(cases) == 3 * 2 * 3
    assert cases[3].label == "griffin 70 %, compact" and cases[3].executor == "compact"
    file.write_text("x: {executor: slim}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r'"x" of .* sets the executor, which --executors does'):
        settings(tmp_path, variants=str(file))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"executors": "slm"}, "unknown executor 'slm'; did you mean slim"),
        ({"executors": ","}, "--executors is empty: give some of masked, compact, native, slim"),
        ({"methods": "drat"}, "unknown method 'drat'; did you mean dart"),
        ({"methods": "dense"}, "method dense removes nothing, and dense runs anyway"),
        ({"methods": "dense-8bit"}, "method dense-8bit removes nothing"),
        ({"methods": "dart,dart"}, 'the label "dart" is taken'),
        ({"methods": ""}, "--methods is empty: give at least one"),
        ({"sparsities": "50"}, "--sparsities 50 must lie between 0 and 1"),
        ({"tokens": 3}, "--tokens 3 must be at least 4"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0 must be at least 1"),
        ({"repeats": 0}, "--repeats 0 must be at least 1"),
        ({"threads": 0}, "--threads 0 must be at least 1"),
        ({"threads": 4097}, "--threads 4097 must be at most 4096"),
        ({"rebuild_every": 0}, "--rebuild-every 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 must be a whole number"),
        ({"shape": "none.json"}, "--model-config none.json is no file"),
        ({"model": "gpt2"}, "--model-config stands in place of --model: give one of them"),
        ({"repeat": 2}, 'unknown setting "repeat" in SpeedSettings; did you mean "repeats"?'),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, given: dict[str, Any], error: str) -> None:
    with pytest.raises((ConfigError, UnknownName)) as caught:
        settings(tmp_path, **given)
    assert str(caught.value).startswith(error) and "\n" not in str(caught.value)


def test_a_model_is_called_by_its_name() -> None:
    found = merge(SpeedSettings, {"model": "Qwen/Qwen2.5-0.5B"}, environment={})
    assert (found.name, found.experiment, found.is_random) == (
        "qwen2.5-0.5b", "speed-qwen2.5-0.5b", False)  # fmt: skip


# the machine


def test_growth_sees_what_was_allocated_and_freed() -> None:
    growth = Growth(torch.device("cpu"))
    if growth.before is None:
        pytest.skip("this system does not say how much memory a process held")
    # Mapped directly: the allocator may hand out memory that the process already held.
    with mmap(-1, 64 * 2**20) as held:
        held.write(bytes(len(held)))
    assert growth.bytes is not None
    assert 60 * 2**20 < growth.bytes < 128 * 2**20
    assert (Growth(torch.device("cpu")).bytes or 0) < 32 * 2**20  # the peak starts anew


def test_reading_is_measured_in_bytes_per_second() -> None:
    found = read_bandwidth(torch.device("cpu"), mib=4, reads=3)
    assert 1e7 < found < 1e13
