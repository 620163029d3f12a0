"""Rates of triggers against known changes: by hand, and for a rule that fires blindly."""

import pytest

from dart_llm.studies.drift.replay import Outcome, auc, outcome, rates


@pytest.mark.parametrize(
    ("triggers", "delays", "false_alarms", "late", "stationary"),
    [
        ([], (None, None), 0, 0, 100),
        ([200], (None, None), 1, 0, 100),  # of the old topic alone
        ([201], (1, None), 0, 0, 100 + 199),
        ([328], (128, None), 0, 0, 100 + 72),
        ([329], (None, None), 0, 1, 100 + 71),  # late, and stationary from then on
        ([329, 350], (None, None), 1, 1, 100 + 71),
        ([450], (None, 50), 0, 0, 100 + 150),  # the first change was missed
        ([400], (None, None), 0, 1, 100),  # 200 late; the second change comes at once
        ([600], (None, None), 0, 1, 100),
    ],
)
def test_where_a_trigger_belongs(triggers, delays, false_alarms, late, stationary):
    found = outcome(triggers, [200, 400], 100, 600, 128)
    wanted = delays, false_alarms, late, stationary
    assert (found.delays, found.false_alarms, found.late, found.stationary) == wanted


def test_pooled_rates_by_hand():
    one = Outcome((128, 128), (30, None), 2, 1, 4, 1000, 1500)
    two = Outcome((128,), (50,), 1, 0, 2, 500, 500)
    assert rates([one, two])["no_interval"] == "too few (n = 2)"
    found = rates([one, two] * 3)
    wanted = {"changes": 3, "detected": 2, "rate": 2 / 3, "gain": 2 / 3 - 0.384}
    wanted |= {"delay_median": 40, "delay_with_misses": (30 + 128 + 50) / 3, "late": 1}
    wanted |= {"false_alarms": 3, "false_alarms_per_1000": 2.0, "tokens": 1500, "decoded": 2000}
    wanted |= {"alarms": 6, "alarms_per_1000": 3.0, "blind_rate": 128 * 0.003}
    counts = ("changes", "detected", "late", "false_alarms", "tokens", "decoded", "alarms")
    wanted |= {name: 3 * wanted[name] for name in counts}
    own = {name: value for name, value in found.items() if "interval" not in name}
    assert own == pytest.approx(wanted) and found["no_interval"] is None
    for name in ("fa_interval", "gain_interval"):
        assert found[name][0] <= found[name][1]
    low, high = found["rate_interval"]
    assert 0.5 <= low < 2 / 3 < high <= 1.0
    assert found == rates([one, two] * 3)  # the same seed, the same intervals


def test_nothing_detected_and_one_text_have_defined_values():
    silent = outcome([], [200], 100, 400, 128)
    found = rates([silent])
    names = "rate delay_median delay_with_misses false_alarms_per_1000 blind_rate gain"
    assert [found[name] for name in names.split()] == [0.0, None, 128.0, 0.0, 0.0, 0.0]
    assert {found[name] for name in found if name.endswith("_interval")} == {
        None,
        "too few (n = 1)",
    }
    both = rates([silent] * 6)
    assert both["rate_interval"] == [0.0, 0.0]
    always = rates([outcome(list(range(101, 601)), [250], 100, 600, 128) for _ in range(3)])
    assert (always["rate"], always["blind_rate"], always["gain"]) == (1.0, 1.0, 0.0)
    assert always["false_alarms_per_1000"] == pytest.approx(1000, rel=0.01)


def test_blind_rate_by_hand():
    texts = [
        Outcome((128, 64), (None, None), 0, 0, 3, 500, 500),
        Outcome((64,), (1,), 0, 0, 4, 500, 500),
    ]
    assert rates(texts[:1])["blind_rate"] == pytest.approx((128 * 0.006 + 64 * 0.006) / 2)
    # 7 alarms in 1,000 tokens: 0.896, 0.448, 0.448
    assert rates(texts)["blind_rate"] == pytest.approx(0.007 * 256 / 3)
    often = Outcome((128, 64), (None, None), 0, 0, 6, 500, 500)
    assert rates([often])["blind_rate"] == pytest.approx((1 + 64 * 0.012) / 2)


def test_auc_by_hand():
    assert auc([3, 4], [1, 2]) == 1.0
    assert auc([1, 2], [3, 4]) == 0.0
    assert auc([1, 3], [2, 3]) == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert auc([], [1]) is None and auc([1], []) is None
