"""The arithmetic of ``dart-llm bench speed``, its settings and its clock, by hand."""

import json
from mmap import mmap

import pytest
import torch

from dart_llm.data import texts
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.timed_cases import Case, dense_cases, rebuilding
from dart_llm.experiments.timing import (
    Growth,
    cache_bytes,
    mad,
    prompt_ids,
    read_bandwidth,
    shuffled,
    timed_mean,
)
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.speed import summary
from dart_llm.studies.speed.model import prepare_model
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.speed.summary import (
    DISTURBED,
    DecodeTraffic,
    mean_context,
    number,
    summarise,
)
from lm_cases import loaded, place
from shells import ROOT
from speed_cases import sample, settings
from written import axes_of


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
    assert mad([1.0, 2.0, 3.0, 4.0, 100.0]) == 1.0
    wanted = {1234.4: "1234", 17.62: "17.6", 1.234: "1.23", 0.0417: "0.042", -1e-5: "0.000"}
    assert {value: number(value) for value in wanted} == wanted


def test_rows_by_hand():
    griffin = PruneConfig.build("griffin", sparsity=0.5)
    cases = [
        Case("transformers"),
        Case("dense, slim", griffin.replace({"sparsity": 0.0, "executor": "slim"})),
        Case("griffin 50 %, slim", griffin, variant="griffin"),
    ]
    counted = {"achieved_sparsity": 0.5, "dense_token_share": 0.25, "ffn_bytes_share": 0.5}
    counted |= {"remasks": 1, "attach_s": 0.02, "extra_memory_bytes": 3 * 2**20}
    samples = [  # in the third repetition something else ran on the machine
        {"transformers": sample(plain), "dense, slim": sample([21, 21]),
         "griffin 50 %, slim": sample(own, **counted)}
        for plain, own in (([40, 40], [14, 16]), ([44, 44], [15, 15]), ([60, 60], [15, 15]))
    ]  # fmt: skip
    repetitions = [
        {"order": list(one), "sitting": "one", "read_bandwidth": speed, "samples": one}
        for speed, one in zip((50000.0, 55000.0, 90000.0), samples, strict=True)
    ]
    sizes = {"ffn_bytes": 600.0, "weight_bytes": 800, "cache_bytes_per_position": 10}
    about = {"weights": sizes, "prompt_tokens": 16, "tokens": 3}  # a mean context of 20
    found = summarise(cases, "dense, slim", repetitions, about)
    assert (found["ffn_share_of_bytes_read"], found["mean_context"]) == (0.6, 20)
    assert found["read_bandwidth"]["bytes_per_second"] == 55000
    plain, own, row = found["rows"]
    steps = [plain[f"token_ms_{at}"] for at in ("p5", "median", "p95")]
    assert steps == pytest.approx([40, 44, 60])
    assert (plain["tg_ms"], plain["tg_spread_ms"]) == (pytest.approx(44), pytest.approx(4))
    assert (plain["attach_ms"], plain["peak_growth_bytes"]) == (None, None)
    assert own["limit"] == 1.0 and own["share_of_limit"] is None
    wanted = {"tg_ms": 15, "pp_tokens_per_second": 160, "times_transformers": 44 / 15}
    wanted |= {"times_own_dense": 1.4, "limit": 1 / 0.7, "share_of_limit": 0.98}
    wanted |= {"bytes_per_token": 700, "bytes_per_second": 700 / 0.015}
    wanted |= {"share_of_read_bandwidth": 700 / 0.015 / 55000, "achieved_sparsity": 0.5}
    wanted |= {"dense_token_share": 0.25, "remasks": 1, "attach_ms": 20}
    # 100 for the prompt, 32 for two untimed tokens, and the timed ones: 30
    wanted |= {"all_ms": 162, "all_times_transformers": (132 + 88) / 162}
    wanted |= {"all_times_own_dense": (132 + 42) / 162, "extra_memory_bytes": 3 * 2**20}
    assert {key: row[key] for key in wanted} == pytest.approx(wanted)
    assert (row["disturbed"], row["scatter"]) == (None, 0.0)


GRIFFIN = PruneConfig.build("griffin", sparsity=0.5)
CASES = [
    Case("transformers"),
    Case("dense, slim", GRIFFIN.replace({"sparsity": 0.0, "executor": "slim"})),
    *(
        Case(f"griffin {share}, slim", GRIFFIN.replace({"executor": "slim"}), variant="griffin")
        for share in (50, 70)
    ),
]


def timed(transformers, dense, half, less):
    """The rows of a model whose FFN has 600 of 1000 bytes; ms per token by repetition."""
    repetitions = []
    for plain, base, *own in zip(transformers, dense, half, less, strict=True):
        counted = [
            {"achieved_sparsity": share, "dense_token_share": 0.0, "ffn_bytes_share": 1 - share}
            for share in (0.5, 0.7)
        ]
        found = [sample([ms], **one) for ms, one in zip(own, counted, strict=True)]
        samples = dict(
            zip((c.label for c in CASES), [sample([plain]), sample([base]), *found], strict=True)
        )
        one = {"order": list(samples), "sitting": "one", "read_bandwidth": 5e4, "samples": samples}
        repetitions.append(one)
    sizes = {"ffn_bytes": 600.0, "weight_bytes": 800, "cache_bytes_per_position": 10}
    about = {"weights": sizes, "prompt_tokens": 16, "tokens": 3}
    found = summarise(CASES, "dense, slim", repetitions, about)
    return {row["row"]: row for row in found["rows"]}


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
    rows = timed([2 * ms for ms in dense], dense, half, less)
    own = [rows[f"griffin {share}, slim"] for share in (50, 70)]
    for row, ratio in zip(own, ratios, strict=True):
        wanted = None if ratio is None else pytest.approx(ratio)
        assert row["times_own_dense"] == wanted, row
        share = ratio and pytest.approx(ratio / row["limit"])
        assert row["share_of_limit"] == share
        assert row["disturbed"] == (None if ratio else DISTURBED)
    assert rows["dense, slim"]["times_own_dense"] == 1.0


def test_what_scatters_is_disturbed_beside_transformers_alone():
    row = timed([40, 44, 90], [21] * 3, [15] * 3, [13] * 3)["griffin 50, slim"]
    assert (row["times_transformers"], row["all_times_transformers"]) == (None, None)
    assert row["times_own_dense"] == pytest.approx(1.4) and row["disturbed"] == DISTURBED


def test_a_disturbed_row_shows_no_ratio_anywhere():
    """An older file, which was never judged, and the same with a row that was."""
    path = ROOT / "benchmarks/results/speed-smollm2-methods.json"
    (document,) = json.loads(path.read_text(encoding="utf-8"))["runs"]
    name = "griffin 70 %, slim"
    rows = [dict(row) for row in document["rows"]]
    row = next(row for row in rows if row["row"] == name)
    ratio = f"{row['times_own_dense']:.2f}"
    texts = summary.markdown(document), summary.make(document)[0].alt
    assert (
        all(ratio in text for text in texts) and "not drawn" not in summary.make(document)[0].small
    )
    none = dict.fromkeys(("times_own_dense", "share_of_limit", "all_times_own_dense"))
    row |= {**none, "disturbed": DISTURBED}
    judged = {**document, "rows": rows}
    (plot,) = summary.make(judged)
    line = next(line for line in summary.markdown(judged).splitlines() if f"| {name} |" in line)
    assert line.count(" disturbed ") == 2
    assert f"{name} at 70 % removed: {DISTURBED}" in summary.sentences(judged)
    assert "repeat it on a quiet machine" in DISTURBED
    assert plot.small.startswith(f"disturbed, not drawn: {name} · ")
    drawn, judged_axes = (axes_of(summary.make(one)[0])[1] for one in (document, judged))
    assert len(drawn.lines) == len(judged_axes.lines) + 1 and not judged_axes.texts


def test_methods_have_their_own_marks_and_no_labels_that_overlap():
    path = ROOT / "benchmarks/results/speed-smollm2-methods.json"
    (document,) = json.loads(path.read_text(encoding="utf-8"))["runs"]
    axes = axes_of(summary.make(document)[0])[1]
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    methods = ["griffin", "published", "dart", "dart-token"]
    assert list(handles)[1:] == ["transformers", "dense", *methods]
    assert len({handles[name].get_marker() for name in methods}) == 4
    assert len({handles[name].get_color() for name in methods}) == 4
    assert not axes.texts and len(axes.lines) == 1 + len(document["rows"])


def test_the_order_follows_from_the_seed():
    labels = [str(number) for number in range(6)]
    first, again = ([shuffled(labels, 0, number) for number in range(4)] for _ in range(2))
    assert first == again and all(sorted(one) == labels for one in first)
    assert len(set(map(tuple, first))) == 4 and shuffled(labels, 1, 0) != first[0]


# cases and settings


def test_cases(tmp_path):
    config = rebuilding(PruneConfig.build("dart", sparsity=0.5), 64)
    assert config.drift.rule == "interval 64" and config.remask.observe_tokens == 1
    assert (config.drift.min_distance, config.drift.max_dense_share) == (0, None)
    assert config.remask.evidence == "decay"  # the rest is the method's
    dense = [one.label for one in dense_cases()]
    assert dense == ["transformers", "dense, slim", "dense, native", "dense, graph"]
    file = tmp_path / "v.yaml"
    file.write_text("calm: {drift: never}\ng2: {method: griffin}\n", encoding="utf-8")
    asked = settings(tmp_path, variants=str(file), sparsities="0.5,0.7")
    found = [(one.label, one.config.method) for one in asked.variant_list()]
    assert found == [("griffin", "griffin"), ("calm", "dart"), ("g2", "griffin")]
    assert asked.variant_list()[1].config.drift.rule == "never"
    cases = asked.case_list()
    assert len(cases) == 3 * 2 * 3
    assert cases[3].label == "griffin 70 %, compact" and cases[3].executor == "compact"
    named = merge(SpeedSettings, {"model": "Qwen/Qwen2.5-0.5B"}, environment={})
    assert (named.name, named.experiment) == ("qwen2.5-0.5b", "speed-qwen2.5-0.5b")
    assert not named.is_random and asked.is_random
    file.write_text("x: {executor: slim}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r'"x" of .* sets the executor, which --executors does'):
        settings(tmp_path, variants=str(file))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"executors": "slm"}, "unknown executor 'slm'; did you mean slim"),
        ({"executors": ","}, "--executors is empty: give some of masked, compact, native, slim"),
        ({"methods": "dense"}, "method dense removes nothing, and dense runs anyway"),
        ({"methods": ""}, "--methods is empty: give at least one"),
        ({"sparsities": "50"}, "--sparsities 50 must lie between 0 and 1"),
        ({"shape": "none.json"}, "--model-config none.json is no file"),
        ({"model": "gpt2"}, "--model-config stands in place of --model: give one of them"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, given, error):
    with pytest.raises((ConfigError, UnknownName)) as caught:
        settings(tmp_path, **given)
    assert str(caught.value).startswith(error) and "\n" not in str(caught.value)


# the model and the machine


def test_a_checkpoint_gives_its_shape_alone(tmp_path):
    asked = {"model": str(place() / "model"), "shape": None}
    random, real = ({**asked, "random_weights": random} for random in (True, False))
    made, again, known = (
        prepare_model(settings(tmp_path, **one), Ui(True)) for one in (random, random, real)
    )
    assert made[1] is None and made[0].config.model_type == "gpt2"
    first, second, third = (dict(model.named_parameters()) for model, _ in (made, again, known))
    assert {n: p.shape for n, p in first.items()} == {n: p.shape for n, p in third.items()}
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], third[name])


def test_prompts_have_the_length_that_was_asked_for():
    model, tokenizer = loaded()
    text = prompt_ids(model, tokenizer, 7, 0)
    assert text.tolist() == [tokenizer(texts.all_text()).input_ids[:7]]
    drawn, again = (prompt_ids(model, None, 50, 0) for _ in range(2))
    assert drawn.shape == (1, 50) and len(set(drawn[0].tolist())) > 10 and torch.equal(drawn, again)
    assert cache_bytes(model, drawn) == model.config.n_layer * 2 * model.config.n_embd * 4


def test_growth_sees_what_was_allocated_and_freed():
    growth = Growth(torch.device("cpu"))
    if growth.before is None:
        pytest.skip("this system does not say how much memory a process held")
    # Mapped directly: the allocator may hand out memory that the process already held.
    with mmap(-1, 64 * 2**20) as held:
        held.write(bytes(len(held)))
    assert growth.bytes is not None and 60 * 2**20 < growth.bytes < 128 * 2**20
    assert (Growth(torch.device("cpu")).bytes or 0) < 32 * 2**20  # the peak starts anew
    assert 1e7 < read_bandwidth(torch.device("cpu"), mib=4, reads=3) < 1e13
