"""What could not be tried is told once per reason."""

from dart_llm.studies.tune.report import sentences


def test_candidates_with_one_reason_share_a_sentence():
    best = {"row": "dense", "dense": True, "recommended": True, "loss": 0.0, "ms": 2.0}
    best |= {"loss_interval": [0.0, 0.0], "times_dense": 1.0, "disturbed": None}
    document = {"base": "dense", "recommended": "dense", "max_loss": 0.02, "noise": 0.03}
    document |= {"rows": [best], "left_out": {"a": "no room", "b": "no rank", "c": "no room"}}
    document |= {"quick": False, "undecided": []}
    assert sentences(document)[1:] == [
        "a; c were left out: no room",
        "b was left out: no rank",
    ]
