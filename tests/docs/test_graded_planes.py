"""The simulation of graded planes: its grids, what it counts, and the curves that it compares."""

from argparse import Namespace

import graded_answers
import graded_planes as planes
import pytest
import torch

from steps import shared_model
from tiny import tokens

WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def error(values):
    return float((values - WEIGHT).square().mean())


@pytest.mark.parametrize(
    ("how", "bits", "base", "both"),
    [
        (planes.Planes(extra=2), 4.5, 0.0068, 0.00046),
        (planes.Planes(bits=3, extra=3), 3.5, 0.0275, 0.00067),
        (planes.Planes(coding="scales", minimum=True, extra=2), 4.5, 0.0059, 0.00044),
        (planes.UNEVEN_PLANES, 4.25, 0.0059, 0.00044),
    ],
    ids=lambda one: str(one) if isinstance(one, float) else planes.label(planes.Setting(one)),
)
def test_planes_are_as_near_as_their_bits_allow(how, bits, base, both):
    values, more = planes.two_planes(WEIGHT, how, None, False)
    assert how.base_bits(256) == pytest.approx(bits, abs=0.13)  # scales of scales: one per row
    assert error(values) == pytest.approx(base, rel=0.05)
    assert error(values + more) == pytest.approx(both, rel=0.05)


def test_feedback_lowers_the_error_of_outputs():
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)).cumsum(1)
    hessian = x.t() @ x / len(x)

    def of_outputs(learnt):
        values, _ = planes.two_planes(WEIGHT, planes.Planes(learnt=learnt), hessian, False)
        return float(((values - WEIGHT) @ x.t()).square().mean())

    assert of_outputs("hessian") < 0.5 * of_outputs("none")


def test_bytes_are_those_that_a_token_reads():
    how = planes.UNEVEN_PLANES
    norms = 16 / (3 * 576)
    bits = how.base_bits(576)
    assert bits == 4 + 6 / 32 + 16 / 576
    whole = planes.Setting(how, 0.3)
    assert planes.read(whole, bits, 0.3, 576) == pytest.approx((bits + 0.6 + norms) / 16)
    half = planes.Setting(how, 0.3, inputs=0.5)
    assert planes.read(half, bits, 0.3, 576) == pytest.approx((bits + 0.4 + norms) / 16)
    dropped = planes.Setting(how, 0.3, drop=True)
    assert planes.read(dropped, bits, 0.3, 576) == pytest.approx(
        (bits * 2.3 / 3 + 0.6 + norms) / 16
    )
    assert planes.read(planes.Setting(how), bits, 0.0, 576) == bits / 16


def test_roundings_between_two_are_mixes_of_them():
    curve = planes.hull([(0.2, 0.4), (0.3, 0.1), (0.25, 0.3), (0.4, 0.05), (0.35, 0.2)])
    assert curve == [(0.2, 0.4), (0.3, 0.1), (0.4, 0.05)]
    assert planes.at(curve, 0.25) == pytest.approx(0.25)
    assert planes.at(curve, 0.5) is None


def test_mixing_channels_undoes_itself():
    assert torch.allclose(planes.mixed(planes.mixed(WEIGHT)), WEIGHT, atol=1e-6)


def test_a_model_generates_in_planes_and_is_itself_again():
    model, ids = shared_model(), tokens(2, 12)
    runner = planes.Runner(planes.unlearnt(model, Namespace(form="own", ggml=None, gguf=[])))
    whole = model(ids).logits
    halves = planes.Setting(planes.Planes(bits=8, extra=2), 0.5)
    with runner.running(halves) as read_by_a_token:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        error = (model(ids).logits - whole).std() / whole.std()
    assert 0.001 < error < 0.02  # of planes in bfloat16
    found = read_by_a_token()
    width = runner.layers[0].base[0].shape[1]
    assert found["share"] == 0.5
    assert found["bytes"] == pytest.approx((8.5 + 2 * 0.5 + 16 / (3 * width)) / 16)
    assert torch.equal(model(ids).logits, whole)


def test_answers_stand_beside_the_dense_ones():
    def row(*answers):
        said = [{"id": str(n), "exact": e, "text": t, "tokens": 4} for n, (e, t) in answers]
        return {**dict.fromkeys(("label", "setting", "share", "bytes", "seconds")), "answers": said}

    dense = row(*enumerate([(1.0, "a"), (1.0, "b"), (0.0, "c"), (0.0, "d")]))
    other = row(*enumerate([(1.0, "a"), (0.0, "x"), (0.0, "y"), (0.0, "d")]))
    found = graded_answers.facts_of(other, dense)
    assert (found["exact"], found["same_text"], found["right"]) == (0.25, 0.5, ["0"])
    assert (found["to_dense"]["estimate"], found["to_dense"]["differing"]) == (-0.25, 1)
