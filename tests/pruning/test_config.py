"""Configurations and layer tables: round trips, ranges, and errors that suggest the mend."""

import json
from math import nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import PruneConfig, SelfStatsConfig, TokenConfig
from dart_llm.pruning.layer_table import AUTO, parse_layer_spec, read_table, write_table
from dart_llm.pruning.registry import METHODS
from prior_cases import CONFIG

FULL = PruneConfig(
    method="mine",
    sparsity=0.25,
    score={"name": "mean", "ema_decay": 1 / 3, "proxy_embedding": "input", "prior_weight": 0.5},
    budget={"name": "blend energy depth", "table": "2:auto"},
    drift={"rule": "interval 7", "signal": "hidden", "min_distance": 3, "max_dense_share": 1e-9},
    remask={"evidence": "decay", "decay": 0.7, "observe_tokens": 9},
    calibration={"source": "self", "sequences": 5, "length": 50, "purpose": "prior"},
    self_stats={"sequences": 5, "length": 50, "opening": 7, "temperature": 1.1, "top_p": 0.3},
    masking_step=4,
    release_step=99,
    min_evidence=8,
    skip_sinks=True,
    compensation=True,
    compensation_rank=4,
    batch="per_row",
    executor="masked",
    seed=2**40,
)
"""Another value than the default in nearly every field."""


@pytest.mark.contract("every parser round-trips")
@pytest.mark.parametrize(
    "config", [FULL, *map(METHODS.get, METHODS.names())], ids=lambda c: c.method
)
def test_round_trips(config):
    assert PruneConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config
    assert PruneConfig.build(config) == config == config.replace({})


REFUSED = (
    *({"sparsity": value} for value in (1.0, -0.1, 50, nan, "half")),
    *({"release_step": 0}, {"masking_step": 8, "release_step": 8}, {"score": {"ema_decay": 1}}),
    *({"budget": {"name": name}} for name in ("energy depth", "blend energy", "blend a b c")),
    *({"drift": f"interval{value}"} for value in ("", " 0", " -4", " 2.5")),
    *({"drift": f"windows {value}"} for value in ("10 1", "10 1 2 3", "1 1 2", "10 0 2")),
    *({"drift": f"windows {value}"} for value in ("10 1 -2", "10 1 nan", "10  1 2", "\u00b2 1 2")),
    *({"drift": "paper 5"}, {"drift": {"min_distanz": 4}}, {"self_stats": {"lenght": 3}}),
    *({"self_stats": {"length": 15}}, {"self_stats": {"opening": 128}}, {"token": {"bits": 5}}),
    # what excludes or needs something else
    {"sparsity": 0.5, "budget": {"table": "all:0.5"}},
    {"sparsity": 0.0, "budget": {"table": "0:#5"}},
    {"sparsity": 0.5, "score": {"strategy": "auto"}},
    {"score": {"strategy": "auto"}, "budget": {"table": "all:auto"}},
    {"score": {"strategy": "auto"}, "budget": "energy"},
    *({"score": {"prior_weight": 0.5}}, {"calibration": {"purpose": "prior"}}),
    {"skip_sinks": True},
    {"executor": "compact", "batch": "per_row"},
    {"compensation_rank": 8, "compensation": True},
    {"compensation_rank": 8, "self_stats": {}, "token": {}},
    {"token": {}, "drift": "paper"},
    # names
    *({"sparsty": 0.5}, {"compensate": True}, {"score": {"prior_weigt": 0.5}}),
    *({"score": "normalised"}, {"budget": "energie"}, {"budget": "blend energy dept"}),
    *({"drift": "publised"}, {"drift": "intervall 5"}),
)


def test_refused(snapshot):
    messages = {}
    for data in REFUSED:
        for make in (PruneConfig.from_mapping, lambda given: PruneConfig(**given)):
            with pytest.raises(ConfigError) as caught:
                make(data)
        messages[str(data)] = str(caught.value)
        assert "\n" not in messages[str(data)]
    assert messages == snapshot


def test_the_methods(snapshot):
    """What differs from the default configuration."""
    result = {name: METHODS.get(name).model_dump(exclude_defaults=True) for name in METHODS.names()}
    assert result == snapshot
    assert all(PruneConfig.build(name).method == name for name in result)
    with pytest.raises(UnknownName, match=r"unknown method 'grifin'; did you mean griffin"):
        PruneConfig.build("grifin")


def test_changes_are_laid_on_top():
    """A partial mapping changes only what it holds; a change to None is none."""
    base = PruneConfig.build("dart")
    result = PruneConfig.build("dart", sparsity=0.5, drift={"min_distance": 8}, remask="fresh")
    wanted = base.to_dict()
    wanted["sparsity"], wanted["drift"]["min_distance"] = 0.5, 8
    wanted["remask"]["evidence"] = "fresh"
    assert result.to_dict() == wanted
    longer = CONFIG.replace({"self_stats": {"tokens": 9}}).replace({"self_stats": {"length": 50}})
    assert longer.self_stats == SelfStatsConfig(sequences=2, length=50, opening=0, tokens=9)
    with pytest.raises(ConfigError, match="need learned statistics"):
        CONFIG.replace({"self_stats": None})
    token = PruneConfig.build("dart-token", sparsity=0.7, token={"bits": 8})
    assert token.token == TokenConfig(bits=8, group=32)
    assert token.replace({"token": None}).token is None
    # the preset's budget has no part in the strategy that sets the counts itself
    auto = PruneConfig.build("dart", score={"strategy": "auto"})
    assert (auto.budget.name, auto.score.strategy) == ("uniform", "auto")
    assert PruneConfig(executor="slim").executor == "native", "the earlier name"


LAYERS = 12
ranges = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, LAYERS - 1)).map(sorted)
ratios = st.floats(0, 1, exclude_min=True, allow_subnormal=False)
entries = st.lists(
    st.tuples(
        st.none() | st.lists(ranges, min_size=1, max_size=3),
        st.just(AUTO) | ratios | st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)


def text_of(parts, blank=""):
    """Write entries in the language, with ``blank`` wherever white space is allowed."""
    texts = []
    for layers, value in parts:
        names = [str(low) if low == high else f"{low}-{high}" for low, high in layers or ()]
        shown = f"#{value}" if isinstance(value, int) else str(value)
        texts.append(f"{f'{blank},{blank}'.join(names or ['all'])}{blank}:{blank}{shown}")
    return f"{blank},{blank}".join(texts)


def expected(parts, sizes):
    """What each layer keeps, straight from the definition: the last entry that names it wins."""
    result = [None] * len(sizes)
    for layers, value in parts:
        for layer, width in enumerate(sizes):
            if layers is None or any(low <= layer <= high for low, high in layers):
                ratio = isinstance(value, float)
                result[layer] = max(1, round(value * width)) if ratio else value
    return result


@pytest.mark.contract("every parser round-trips")
@settings(deadline=None, max_examples=200)
@given(
    entries,
    st.lists(st.integers(64, 300), min_size=LAYERS, max_size=LAYERS),
    st.sampled_from(["", " ", "  "]),
)
def test_every_form_means_what_it_says_and_round_trips(parts, sizes, blank):
    table = parse_layer_spec(text_of(parts, blank))
    assert table.resolve(sizes) == expected(parts, sizes)
    assert table.has_auto == any(value == AUTO for _, value in parts)
    assert parse_layer_spec(str(table)) == table and str(table) == text_of(parts)


SYNTAX = (
    *("", "   ", ",", ",all:0.5", "all:0.5,", "0:0.5,,1:0.5", "0.5", "all", "0:0.5,1,2", ":0.5"),
    *("0-:0.5", "-3:0.5", "0-1-2:0.5", "0 1:0.5", "1.5:0.5", "layer3:0.5", "0,all:0.5", "5-2:0.5"),
)
VALUES = (
    *("", "half", "50%", "0.5:0.6", "#", "#-3", "#2.5", "#0"),
    *("0", "-0.5", "1.5", "nan", "inf", "1000", "512.0", "1.2.3"),
)


@pytest.mark.parametrize("text", [*SYNTAX, *(f"1:0.5,0:{value}" for value in VALUES)])
def test_malformed(text):
    with pytest.raises(ConfigError, match=r"use forms|write a keep ratio|runs backwards") as caught:
        parse_layer_spec(text)
    assert "\n" not in str(caught.value)


def test_layers_and_counts_out_of_range_are_named_with_the_range():
    message = r'layer 4 is out of range: .* 4 layers \(0-3\); correct "2-4:0.25"'
    with pytest.raises(ConfigError, match=message):
        parse_layer_spec("all:0.5,2-4:0.25").resolve([8] * 4)
    with pytest.raises(ConfigError, match=r'"1-2:#49" .* layer 2 has 48: .*from #1 to #48'):
        parse_layer_spec("0:0.5,1-2:#49").resolve([48, 64, 48])


def test_table_files(tmp_path):
    path, kept = tmp_path / "table.txt", [*range(1, 40), 9999]
    write_table(path, kept, "made by a test\nsecond line: #5, all:0.1")
    assert parse_layer_spec(read_table(path)).resolve([9999] * 40) == kept
    path.write_text("# a comment\n\n0-1: #5   # ends of the model\n2:0.5,\n  3 : auto # later\n")
    assert parse_layer_spec(read_table(path)).resolve([10] * 4) == [5, 5, 5, AUTO]
    for data, message in ((b"\xff\xfe\x81", "cannot read"), (b"# nothing\n", "use forms")):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            read_table(path)
