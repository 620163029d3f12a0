"""The layer specification language: every form round-trips, every malformed one is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError
from dart_llm.pruning.layer_table import AUTO, parse_layer_spec, read_table, write_table

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
    with pytest.raises(ConfigError, match=r"use forms|a keep ratio lies|runs backwards") as caught:
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
    for data, message in (
        (b"\xff\xfe\x81", "cannot read the layer"),
        (b"# nothing\n", "use forms"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            read_table(path)
