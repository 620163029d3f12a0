"""Losses around a change, recomputed by hand, and what is said of them: like against like."""

from dart_llm.studies.drift.cell import recovery, topic_losses
from dart_llm.studies.drift.summary import comparable, headline


def test_means_per_topic_and_bins_from_each_change_on():
    losses = [None, *(float(k) for k in range(1, 70))]
    first, second, third = topic_losses(losses, [0, 30, 65], 20)
    assert (first["tokens"], first["mean_loss"]) == (29, 15.0)  # the first token has no loss
    assert first["first"] == [sum(range(1, 16)) / 15]
    assert (second["start"], second["tokens"], second["mean_loss"]) == (30, 35, 47.0)
    assert second["first"] == [37.5, 53.5]  # 30 to 45 and 46 to 61; 62 to 64 are no whole bin
    assert second["later"] == {"from": 20, "tokens": 15, "mean_loss": 57.0}
    assert (third["topic"], third["start"], third["tokens"]) == (2, 65, 5)
    assert (third["mean_loss"], third["first"], third["later"]) == (67.0, [], None)


def test_recovery_of_degenerate_losses():
    flat = [None, *[2.0] * 99]
    assert recovery(flat, flat, [0, 50])[0]["tokens"] == 0  # dense itself
    late = [2.0 if loss is None else loss + (50 <= k < 70) for k, loss in enumerate(flat)]
    found = recovery(late, flat, [0, 50])  # 3 of 32 tokens, not 4, are within 0.1
    assert found == [{"topic": 1, "tokens": 17, "within": 50}]
    higher = [2.0 if loss is None else loss + 0.11 * (k >= 50) for k, loss in enumerate(flat)]
    assert recovery(higher, flat, [0, 50])[0]["tokens"] is None
    short = recovery(flat[:80], flat[:80], [0, 50])
    assert short == [{"topic": 1, "tokens": None, "within": 30}]  # no window of 32 fits
    assert recovery(flat, flat, [0]) == []


def line(label, achieved, after, closeness=None):
    method, loss = label.partition("@")[0], {"after": {"mean": after}}
    metrics = None if closeness is None else {"document_similarity": {"mean": closeness}}
    row = {"label": label, "method": method, "achieved_sparsity": achieved}
    return {**row, "loss": None if metrics else loss, "metrics": metrics}


def test_a_method_that_removed_much_less_does_not_win():
    given = [("dense", 0.0, 3.0), ("never@0.5", 0.5, 4.0), ("dart@0.5", 0.46, 3.8)]
    given += [("interval:8@0.5", 0.2, 3.2)]
    rows = [line(*method) for method in given]
    assert [row["label"] for row in comparable(rows)] == ["never@0.5", "dart@0.5"]
    assert headline({"rows": rows}) == (
        "dart@0.5: loss after the changes 3.800 at 46 % achieved sparsity, the best of 2 methods "
        "that removed about as much."
    )
    free = [line(*method, close) for method, close in zip(given, (1.0, 0.6, 0.7, 0.9), strict=True)]
    assert headline({"rows": free}).startswith("dart@0.5: document_similarity 0.700 at 46 %")
    assert headline({"rows": rows[:1]}) == ""
