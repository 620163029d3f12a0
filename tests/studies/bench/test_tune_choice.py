"""What is recommended, from rows and lines that are made by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dart_llm.studies.bench.rows import REFERENCE, clearly_over, quality_row, recommend, undecided

FACTS = {"decoded_tokens": 10, "remasks": 1, "extra_memory_bytes": 5}


def row(name, loss, ms, dense=False, **more):
    found = {"row": name, "loss": loss, "ms": ms, "dense": dense, "loss_interval": None}
    times = None if ms is None else 10.0 / ms
    found |= {"loss_range": [loss, loss], "times_dense": times, "scatter": 0.0, "disturbed": None}
    return {**found, **more}


def line(candidate, text, number, loss, kl=0.0, achieved=0.0, tokens=10):
    shares = {"achieved_sparsity": achieved, "dense_token_share": 0.0, "token_bytes_share": None}
    accounting = None if candidate == REFERENCE else {**FACTS, **shares}
    own = {"loss": loss, "kl": kl, "tokens": tokens, "accounting": accounting}
    return {"candidate": candidate, "text": text, "slice": f"{text}/{number}", **own}


def lines(ratios):
    """Losses such that perplexity is ``ratios[text]`` times dense, slice by slice."""
    found = []
    for text, own in ratios.items():
        for number, ratio in enumerate(own):
            found.append(line(REFERENCE, text, number, 1.0 + number))
            loss = 1.0 + number + math.log(ratio)
            found.append(line("dart", text, number, loss, kl=(ratio - 1) / 2, achieved=0.5))
    return found


def test_the_loss_is_that_of_the_worse_text():
    found = quality_row("dart", lines({"own": [1.01] * 6, "mine": [1.03, 1.05] * 3}), 0)
    assert found["worse_text"] == "mine"
    assert found["loss"] == pytest.approx(math.sqrt(1.03 * 1.05) - 1)
    low, high = found["loss_interval"]
    assert 0.025 < low < found["loss"] < high < 0.055
    assert found["texts"]["own"]["loss_interval"] == pytest.approx([0.01, 0.01])
    assert found["kl"] == pytest.approx(0.02) and found["achieved_sparsity"] == 0.5
    assert found["remasks"] == 12 and found["bytes_share"] is None
    assert found["perplexity"] == pytest.approx(math.exp(3.5) * math.sqrt(1.03 * 1.05))
    assert clearly_over(found, 0.02) and not clearly_over(found, 0.035)


@pytest.mark.parametrize(("slices", "loss"), [(6, 0.99), (2, 1.3)])
def test_the_loss_is_no_less_than_what_the_divergence_gives(slices, loss):
    """Tokens that happen to be likelier do not hide that the model differs; with few slices their
    losses count neither way."""
    kls = [0.02, 0.03] * (slices // 2)
    lines = [line(REFERENCE, "own", n, 1.0) for n in range(slices)]
    lines += [line("dart", "own", n, loss, kl=kl, achieved=0.5) for n, kl in enumerate(kls)]
    scored = quality_row("dart", lines, 0)
    assert scored["loss"] == pytest.approx(math.expm1(0.025))
    assert scored["loss_range"] == pytest.approx([math.expm1(0.02), math.expm1(0.03)])
    assert scored["perplexity"] == pytest.approx(math.exp(loss))
    if slices == 2:
        assert scored["loss_interval"] is None
    else:
        low, high = scored["loss_interval"]
        assert math.expm1(0.02) <= low < scored["loss"] < high <= math.expm1(0.03)


ROWS = [
    row("dense", 0.0, 10.0, dense=True),
    row("q8", 0.001, 6.0, dense=True),
    row("token", 0.015, 5.0),
    row("griffin", 0.3, 2.0),
]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "token"),
        ({"token": (0.021, 5.0)}, "q8"),  # loses too much
        ({"token": (0.015, 5.9)}, "q8"),  # is no faster than the noise
        ({"token": (0.015, None), "q8": (0.001, 9.9)}, "dense"),
        ({"token": (0.05, 5.0), "q8": (0.04, 6.0)}, "dense"),
        # without any within: as it is loaded
        ({"dense": (0.03, 3.0), "token": (0.05, 2.0), "q8": (0.03, 6.0)}, "dense"),
    ],
)
def test_the_fastest_within_the_loss_that_beats_simpler_ones(change, wanted):
    values = {one["row"]: (one["loss"], one["ms"]) for one in ROWS} | change
    rows = [row(one["row"], *values[one["row"]], one["dense"]) for one in ROWS]
    assert recommend(rows, "dense", 0.02, 0.03) == wanted


MEASURED = st.tuples(st.floats(0, 1), st.none() | st.floats(0.1, 100), st.booleans())


@given(st.lists(MEASURED, min_size=1, max_size=8), st.floats(0.001, 0.5), st.floats(0, 0.2))
def test_what_is_recommended_is_within_and_worth_it(found, most, noise):
    rows = [row("base", 0.0, 10.0, True)]
    rows += [row(str(n), *one) for n, one in enumerate(found)]
    best = next(one for one in rows if one["row"] == recommend(rows, "base", most, noise))
    assert best["loss"] <= most and best["ms"] is not None
    if best["row"] != "base":
        assert best["ms"] * (1 + noise) < 10.0
    if not best["dense"]:
        dense = [r["ms"] for r in rows if r["dense"] and r["ms"] and r["loss"] <= most]
        assert best["ms"] * (1 + noise) < min(dense)


DENSE = row("dense", 0.0, 10.0, True)


@pytest.mark.parametrize(
    ("other", "recommended", "left"),
    [
        (row("token", 0.005, 8.0, loss_range=[0.004, 0.006]), "token", []),  # clearly good
        (row("token", 0.005, 8.0, scatter=0.2), "token", ["token"]),  # may be as slow as dense
        (row("token", 0.015, 8.0, loss_range=[0.01, 0.03]), "token", ["token"]),  # may lose more
        (row("token", 0.05, 8.0, loss_range=[0.04, 0.06]), "dense", []),  # loses too much
        (row("token", 0.005, 9.9), "dense", []),  # is no faster
        (row("token", 0.005, 9.8, scatter=0.1), "dense", ["token"]),
        (row("token", 0.3, None), "dense", []),
        (row("token", 0.005, 8.0, times_dense=None, disturbed="disturbed"), "dense", ["token"]),
    ],
)
def test_few_slices_decide_only_what_is_clear(other, recommended, left):
    rows = [DENSE, other]
    assert recommend(rows, "dense", 0.02, 0.03) == recommended
    assert undecided(rows, "dense", recommended, 0.02, 0.03) == left
