"""The layer specification language: every form round-trips, every malformed one says where."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError
from dart_llm.pruning.layer_table import AUTO, LayerTable, parse_layer_spec, read_table, write_table

LAYERS = 12

ranges = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, LAYERS - 1)).map(
    lambda pair: tuple(sorted(pair))
)
where = st.one_of(st.just(None), st.lists(ranges, min_size=1, max_size=3).map(tuple))
ratios = st.floats(0, 1, exclude_min=True, allow_subnormal=False)
values = st.one_of(st.just(AUTO), ratios, st.integers(1, 64))
Entries = list[tuple[tuple[tuple[int, int], ...] | None, float | int | str]]
entries = st.lists(st.tuples(where, values), min_size=1, max_size=4)
widths = st.lists(st.integers(64, 300), min_size=LAYERS, max_size=LAYERS)
blanks = st.sampled_from(["", " ", "  "])


def text_of(parts: Entries, blank: str = "") -> str:
    """Write entries in the language, with ``blank`` wherever white space is allowed."""
    texts = []
    for layers, value in parts:
        names = "all"
        if layers is not None:
            names = f"{blank},{blank}".join(
                str(low) if low == high else f"{low}-{high}" for low, high in layers
            )
        shown = f"#{value}" if isinstance(value, int) else str(value)
        texts.append(f"{names}{blank}:{blank}{shown}")
    return f"{blank},{blank}".join(texts)


def expected(parts: Entries, sizes: list[int]) -> list[int | str | None]:
    """What each layer keeps, straight from the definition: the last entry that names it wins."""
    found: list[int | str | None] = [None] * len(sizes)
    for layers, value in parts:
        for layer, width in enumerate(sizes):
            if layers is None or any(low <= layer <= high for low, high in layers):
                if isinstance(value, float):
                    found[layer] = max(1, round(value * width))
                else:
                    found[layer] = value
    return found


@pytest.mark.contract("every parser round-trips")
@settings(deadline=None, max_examples=200)
@given(entries, widths, blanks)
def test_every_form_means_what_it_says_and_round_trips(
    parts: Entries, sizes: list[int], blank: str
) -> None:
    table = parse_layer_spec(text_of(parts, blank))
    assert table.resolve(sizes) == expected(parts, sizes)
    assert table.has_auto == any(value == AUTO for _, value in parts)
    again = parse_layer_spec(str(table))
    assert again == table
    assert str(again) == str(table) == text_of(parts)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("all:auto", [AUTO] * 4),
        ("0-1:0.6,2-3:0.8", [6, 6, 8, 8]),
        ("0,1,2:0.6", [6, 6, 6, None]),
        ("3:#7", [None, None, None, 7]),
        ("all:0.5,1:1", [5, 10, 5, 5]),
        ("1:1,all:0.5", [5, 5, 5, 5]),
        ("all:auto,2-3:#10", [AUTO, AUTO, 10, 10]),
        ("0-3:0.04", [1, 1, 1, 1]),
        ("  all : 0.5 \n", [5, 5, 5, 5]),
        ("0:0.5\n1:#3", [5, 3, None, None]),
        ("3-3:1e-1", [None, None, None, 1]),
    ],
)
def test_golden(text: str, kept: list[int | str | None]) -> None:
    assert parse_layer_spec(text).resolve([10] * 4) == kept


RATIO = "(0, 1]"
FORMS = '"0-5:0.6,6-11:0.8"'


@pytest.mark.parametrize(
    ("text", "offending", "valid"),
    [
        ("", '""', FORMS),
        ("   ", '"   "', FORMS),
        (",", '","', FORMS),
        (",all:0.5", '",all:0.5"', FORMS),
        ("all:0.5,", '"all:0.5,"', FORMS),
        ("0:0.5,,1:0.5", '"0:0.5,,1:0.5"', FORMS),
        ("0.5", '"0.5"', FORMS),
        ("all", '"all"', FORMS),
        ("0:0.5,1,2", '"1,2"', FORMS),
        (":0.5", '""', FORMS),
        ("0-:0.5", '"0-"', FORMS),
        ("-3:0.5", '"-3"', FORMS),
        ("0-1-2:0.5", '"0-1-2"', FORMS),
        ("0 1:0.5", '"0 1"', FORMS),
        ("1.5:0.5", '"1.5"', FORMS),
        ("layer3:0.5", '"layer3"', FORMS),
        ("0,all:0.5", '"all"', FORMS),
        ("ALL:0.5", '"ALL"', FORMS),
        ("5-2:0.5", '"5-2"', "2-5"),
        ("0:", '""', RATIO),
        ("0:half", '"half"', RATIO),
        ("0:50%", '"50%"', RATIO),
        ("0:0.5:0.6", '"0.5:0.6"', RATIO),
        ("0:#", '"#"', RATIO),
        ("0:#-3", '"#-3"', RATIO),
        ("0:#2.5", '"#2.5"', RATIO),
        ("0:0", '"0:0"', RATIO),
        ("0:-0.5", '"0:-0.5"', RATIO),
        ("0:1.5", '"0:1.5"', RATIO),
        ("0:nan", '"0:nan"', RATIO),
        ("0:inf", '"0:inf"', RATIO),
        ("1:0.5,0:1000", '"0:1000"', "write #1000"),
        ("0:512.0", '"0:512.0"', "write #512 "),
        ("0:#0", '"0:#0"', "#1 up"),
    ],
)
def test_malformed(text: str, offending: str, valid: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layer_spec(text)
    message = str(caught.value)
    assert offending in message
    assert valid in message
    assert "\n" not in message


@settings(deadline=None, max_examples=300)
@given(st.text("0123456789-:,.#alut \n", max_size=14))
@example("#:#")
def test_nothing_but_a_config_error(text: str) -> None:
    table: LayerTable | None = None
    with contextlib.suppress(ConfigError):
        table = parse_layer_spec(text)
    if table is not None:
        assert parse_layer_spec(str(table)) == table


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 50))
def test_a_layer_out_of_range_is_named_with_the_range(count: int, low: int, span: int) -> None:
    table = parse_layer_spec(f"all:0.5,{low}-{low + span}:0.25")
    if low + span < count:
        kept = table.resolve([8] * count)
        assert kept == [2 if low <= layer <= low + span else 4 for layer in range(count)]
        return
    with pytest.raises(ConfigError) as caught:
        table.resolve([8] * count)
    wrong = low + span if low < count else low
    message = str(caught.value)
    assert f"layer {wrong} is out of range" in message
    assert f"{count} layers (0-{count - 1})" in message
    assert f'"{low}-{low + span}:0.25"' in message


def test_a_count_above_the_width_is_named_with_the_range() -> None:
    table = parse_layer_spec("0:0.5,1-2:#49")
    assert table.resolve([48, 64, 49]) == [24, 49, 49]
    with pytest.raises(ConfigError) as caught:
        table.resolve([48, 64, 48])
    assert '"1-2:#49"' in str(caught.value)
    assert "layer 2 has 48" in str(caught.value)
    assert "#1 to #48" in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9999), min_size=1, max_size=40))
def test_table_files_round_trip(tmp_path_factory: pytest.TempPathFactory, kept: list[int]) -> None:
    path = tmp_path_factory.mktemp("tables") / "table.txt"
    write_table(path, kept, "made by a test\nsecond line: #5, all:0.1")
    assert parse_layer_spec(read_table(path)).resolve([9999] * len(kept)) == kept


def test_table_files_for_people(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text(
        "# a comment\n\n0-1: #5   # ends of the model\n2:0.5,\n  3 : auto # later\n",
        encoding="utf-8",
    )
    assert parse_layer_spec(read_table(path)).resolve([10] * 4) == [5, 5, 5, AUTO]


def test_table_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the layer table .*none\.txt"):
        read_table(tmp_path / "none.txt")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not a text file"):
        read_table(binary)
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="empty part"):
        read_table(empty)
