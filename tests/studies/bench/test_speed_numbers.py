"""The arithmetic of ``dart-llm bench speed``, its settings and its clock, by hand."""

import pytest

from dart_llm.data import texts
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.timing import cache_bytes, prompt_ids, shuffled, timed_mean
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import merge
from dart_llm.studies.bench import report
from dart_llm.studies.bench.rows import DISTURBED, DecodeTraffic, mean_context, speed_document
from dart_llm.studies.bench.settings import Candidate, SpeedSettings, speed_grid
from lm_cases import loaded
from speed_cases import sample, settings


def test_formulas_by_hand():
    """600 of 800 bytes of weights are the FFN's; 200 bytes of cache make f 0.6."""
    sizes = DecodeTraffic(ffn=600, weights=800, cache=200)
    assert sizes.share == pytest.approx(0.6)
    assert sizes.limit(0.5) == pytest.approx(1 / 0.7) and sizes.limit(0.0) == 1.0
    assert sizes.limit(0.5, proxy_share=0.25) == pytest.approx(1 / 0.85)
    assert sizes.read(1.0) == 1000 and sizes.read(0.5) == 700
    # the head has 100 of the other 200, of which a screened one reads a quarter
    screened = DecodeTraffic(ffn=600, weights=800, cache=200, head=100)
    assert screened.limit(0.5, head_share=0.25) == pytest.approx(1 / (0.7 - 0.075))
    assert screened.limit(0.5) == sizes.limit(0.5) and screened.read(0.5, 0.25) == 625
    # prompt of 10; two untimed tokens read 11 and 12 positions; the timed four 13, 14, 15, 16
    assert mean_context(10, 4) == 14.5
    # 0.4 over 10 tokens, of which the first two were dense: 4.0 / 8
    assert timed_mean(0.4, 10, 0.0, 2) == pytest.approx(0.5) and timed_mean(0.4, 2, 0.4, 2) == 0.0
    wanted = {1234.4: "1234", 17.62: "17.6", 1.234: "1.23", 0.0417: "0.042", -1e-5: "0.000"}
    assert {value: report.number(value) for value in wanted} == wanted


GRIFFIN = PruneConfig.build("griffin", sparsity=0.5, executor="native")
DENSE = GRIFFIN.replace({"sparsity": 0.0})
CANDIDATES = (
    Candidate("transformers", weights="dense"),
    Candidate("dense, native", DENSE, "dense"),
    Candidate("griffin 50, native", GRIFFIN, "dense", "griffin"),
    Candidate("griffin 70, native", GRIFFIN.replace({"sparsity": 0.7}), "dense", "griffin"),
)
COUNTED = [
    {"achieved_sparsity": share, "dense_token_share": 0.25, "ffn_bytes_share": 1 - share}
    | {"remasks": 1, "extra_memory_bytes": 3 * 2**20}
    for share in (0.5, 0.7)
]


def document(*rows):
    """speed.json of a model whose FFN has 600 of 1000 bytes; ms per token by row, repetition."""
    samples = {}
    for candidate, row, more in zip(CANDIDATES, rows, ({}, {}, *COUNTED), strict=False):
        steps = [ms if isinstance(ms, list) else [ms] for ms in row]
        samples[candidate.label] = [sample(ms, **more) for ms in steps]
    sizes = {"ffn_bytes": 600.0, "weight_bytes": 800, "cache_bytes_per_position": 10}
    formats = {"dense": {"weights": sizes, "stored_as": "float32", "base": "dense, native"}}
    about = {"formats": formats, "base": "dense, native", "main": "dense", "reference": {}}
    about |= {"prompt_tokens": 16, "tokens": 3, "repeats": 3, "versions": {"torch": "2"}}
    about |= {"checkpoint": {"name": "m", "dtype": "float32"}, "kernels": None}
    about |= {"machine": {"processor": "p", "threads": 1, "device": "cpu"}}
    return speed_document(CANDIDATES[: len(rows)], samples, about)


def test_rows_by_hand():
    # in the third repetition something else ran on the machine; a mean context of 20
    griffin = [[14, 16], [15, 15], [15, 15]]
    speed = document([[40, 40], [44, 44], [60, 60]], [[21, 21]] * 3, griffin)
    assert (speed["ffn_share_of_bytes_read"], speed["mean_context"]) == (0.6, 20)
    plain, dense, row = speed["rows"]
    assert plain["ms"] == pytest.approx(44)
    assert (plain["bandwidth_limit"], plain["dense_token_share"]) == (None, 1)
    assert dense["bandwidth_limit"] == 1.0 and dense["share_of_limit"] is None
    wanted = {"ms": 15, "pp_tokens_per_second": 160, "times_transformers": 44 / 15}
    wanted |= {"times_dense": 1.4, "bandwidth_limit": 1 / 0.7, "share_of_limit": 0.98}
    wanted |= {"bytes_per_token": 700, "extra_memory_bytes": 3 * 2**20}
    wanted |= {"achieved_sparsity": 0.5, "dense_token_share": 0.25, "remasks": 1}
    assert {key: row[key] for key in wanted} == pytest.approx(wanted)
    assert (row["disturbed"], row["scatter"], row["requested"]) == (None, 0.0, 0.5)


@pytest.mark.parametrize(
    ("dense", "half", "less", "ratios"),
    [
        ([21] * 3, [15] * 3, [13] * 3, [1.4, 21 / 13]),
        ([40] * 3, [15] * 3, [13] * 3, [None, None]),  # the dense row met other work
        ([21] * 3, [15] * 3, [9] * 3, [1.4, None]),
        ([16] * 3, [15] * 3, [9.5] * 3, [None, None]),  # within the limit, but not beside 50 %
        ([21, 21, 24], [15, 15, 15], [13] * 3, [1.4, 21 / 13]),
        ([24, 20, 22], [15, 15, 15], [14] * 3, [1 / 0.7, 22 / 14]),  # no more than the bytes allow
        ([21, 40, 60], [15, 15, 15], [13, 25, 37], [None, 21 / 13]),
    ],
)
def test_what_the_bytes_do_not_allow_is_disturbed(dense, half, less, ratios):
    _, base, *rows = document([2 * ms for ms in dense], dense, half, less)["rows"]
    for row, ratio in zip(rows, ratios, strict=True):
        assert row["times_dense"] == (None if ratio is None else pytest.approx(ratio)), row
        assert row["share_of_limit"] == (ratio and pytest.approx(ratio / row["bandwidth_limit"]))
        assert row["disturbed"] == (None if ratio else DISTURBED)
    assert base["times_dense"] == 1.0


def test_a_disturbed_row_shows_no_ratio_anywhere():
    speed = document([40, 44, 90], [21] * 3, [15] * 3, [13] * 3)  # transformers alone scatters
    row = speed["rows"][2]
    assert row["times_transformers"] is None
    assert row["times_dense"] == pytest.approx(1.4) and row["disturbed"] == DISTURBED
    speed = document([42] * 3, [21] * 3, [15] * 3, [9] * 3)
    row = speed["rows"][-1]
    assert (row["times_dense"], row["share_of_limit"]) == (None, None)
    (line,) = [x for x in report.table("speed", speed).lines() if "| griffin 70, native |" in x]
    assert "2.33" not in line and line.endswith("| disturbed: repeat it |")
    assert report.speed_sentences(speed)[0].startswith("griffin 50, native: 2.80 x as fast as")
    (sentence,) = report.speed_sentences(document([60] * 3, [40] * 3, [15] * 3, [13] * 3))
    assert sentence == f"griffin 50, native; griffin 70, native: {DISTURBED}"


def test_the_order_follows_from_the_seed():
    labels = [str(number) for number in range(6)]
    first, again = ([shuffled(labels, 0, number) for number in range(4)] for _ in range(2))
    assert first == again and all(sorted(order) == labels for order in first)
    assert len(set(map(tuple, first))) == 4 and shuffled(labels, 1, 0) != first[0]


def test_candidates(tmp_path):
    file = tmp_path / "v.yaml"
    file.write_text("calm: {drift: never}\ng2: {method: griffin}\n", encoding="utf-8")
    flags = settings(tmp_path, variants=str(file), sparsities="0.5,0.7", model="m")
    variants = flags.variant_list()
    assert [(v.label, v.config.method) for v in variants] == [
        *(("griffin", "griffin"), ("calm", "dart"), ("g2", "griffin"))
    ]
    assert variants[1].config.drift.rule == "never"
    grid = speed_grid(flags, "dense")
    assert len(grid) == 3 * 2 * 2
    assert (grid[2].label, grid[2].executor) == ("griffin 70 %, compact", "compact")
    heads = settings(tmp_path, heads="full,screened", executors="native", model="m")
    assert [row.label for row in speed_grid(heads, "dense")] == [
        *("griffin 50 %, native", "dense, native, screened head"),
        "griffin 50 %, native, screened head",
    ]
    named = merge(SpeedSettings, {"model": "Qwen/Qwen2.5-0.5B"}, environment={})
    assert (named.name, named.experiment) == ("qwen2.5-0.5b", "speed-qwen2.5-0.5b")
    file.write_text("x: {executor: native}\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r'"x" of .* sets executor, which only --executors may set'
    ):
        settings(tmp_path, variants=str(file), model="m")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"executors": "nativ"}, "unknown executor 'nativ'; did you mean native"),
        ({"executors": ","}, "--executors is empty: give at least one"),
        ({"heads": "half"}, "unknown head 'half'"),
        ({"methods": "dense"}, "method dense removes no neurons, and the dense model is"),
        ({"sparsities": "50"}, "50 must be between 0 and 1"),
        ({"weights": "q8_0,none.gguf"}, "--weights none.gguf is not a file"),
        ({"reference": "llama"}, "unknown reference 'llama'; did you mean llama.cpp?"),
        ({"reference_file": ["a.gguf"]}, "--reference-file has no effect without --reference"),
        ({"reference": "llama.cpp", "reference_file": ["a.gguf"]}, "--reference-file a.gguf is"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, given, error):
    with pytest.raises((ConfigError, UnknownName)) as caught:
        settings(tmp_path, model="m", **given)
    assert str(caught.value).startswith(error) and "\n" not in str(caught.value)


def test_prompts_have_the_length_that_was_asked_for():
    model, tokenizer = loaded()
    ids = prompt_ids(model, tokenizer, 7)
    assert ids.tolist() == [tokenizer(texts.all_text()).input_ids[:7]]
    assert cache_bytes(model, ids) == model.config.n_layer * 2 * model.config.n_embd * 4
