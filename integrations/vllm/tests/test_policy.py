"""The masks of requests, without vLLM."""

from __future__ import annotations

import pytest
import torch
from dart_vllm.ffn import STEADY, StepState
from dart_vllm.policy import PrunedRequest, RunningRequests, Step, Unexpected

from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.weights import FfnWeights

WIDTH, HIDDEN = 8, 4
CONFIG = PruneConfig.build(
    "griffin-refresh", sparsity=0.5, drift="interval 2", remask={"observe_tokens": 1}
)


def layers() -> tuple[FfnWeights, ...]:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn((WIDTH, HIDDEN), generator=generator)
    return tuple(FfnWeights(n, float(n), up, up, up.t()) for n in range(2))


def run(running: RunningRequests, *tokens: tuple[str, int, int]) -> Step:
    """Run one step, in which position p activates the neurons p and p + 1 most."""
    step = running.plan(tokens)
    for request, span in step.observed("observe"):
        first = next(first for name, first, _ in tokens if running.requests[name] is request)
        positions = range(first, first + span.stop - span.start)
        u = torch.full((1, len(positions), WIDTH), 0.01)
        for row, position in enumerate(positions):
            u[0, row, [position % WIDTH, (position + 1) % WIDTH]] = 1.0
        for layer in range(2):
            request.observe(layer, LayerObservation(u))
    running.end(step)
    return step


def masks_of(step: Step) -> list[tuple[int, int, list[int] | None]]:
    """Start, end and kept neurons of each span of a step."""
    return [
        (
            span.tokens.start,
            span.tokens.stop,
            None if span.masks is None or span.masks[0] is None else span.masks[0].ids.tolist(),
        )
        for span in step.spans
    ]


@pytest.fixture
def running() -> RunningRequests:
    requests = RunningRequests()
    requests.requests = {"a": PrunedRequest(CONFIG, layers(), 4), "dense": None}
    return requests


def test_a_request_among_others(running: RunningRequests) -> None:
    assert masks_of(run(running, ("dense", 9, 3), ("a", 0, 3))) == [(3, 6, None)]
    assert masks_of(run(running, ("a", 3, 1), ("dense", 12, 1))) == [(0, 1, None)]
    first = [1, 2, 3, 4]  # positions 0 to 3 activate 0 to 4; of equals, the sums decide
    step = run(running, ("dense", 13, 1), ("a", 4, 1))
    assert step.tokens == 2
    ((start, stop, kept),) = masks_of(step)
    assert (start, stop, len(kept or ())) == (1, 2, 4)
    assert set(first[:3]) <= set(kept or ())
    assert step.shared is None  # the other request is dense


def test_tokens_that_run_again_have_their_old_masks(running: RunningRequests) -> None:
    run(running, ("a", 0, 4))
    kept = [masks_of(run(running, ("a", position, 1)))[0][2] for position in range(4, 11)]
    assert kept[0] == kept[1] is not None
    assert kept[2] is None  # dense and observed, for a new mask
    assert kept[3] == kept[4] is not None
    assert kept[3] != kept[0]
    request = running.requests["a"]
    assert request is not None
    before = request.controller.sequences[0].decoded
    again = masks_of(run(running, ("a", 0, 11)))
    assert again == [
        *[(0, 4, None), (4, 6, kept[0]), (6, 7, None)],
        *[(7, 9, kept[3]), (9, 10, None), (10, 11, kept[6])],
    ]
    assert running.replayed == 11
    assert request.controller.sequences[0].decoded == before
    step = run(running, ("a", 8, 4))  # the rest again, and a new token
    assert masks_of(step)[-1][:2] == (3, 4)
    assert request.done == 12


def test_tokens_that_never_ran_are_an_error(running: RunningRequests) -> None:
    with pytest.raises(Unexpected, match="2 tokens of a pruned request came from a cache"):
        run(running, ("a", 2, 1))
    run(running, ("a", 0, 4))
    with pytest.raises(Unexpected, match="3 tokens were scheduled at once after a prompt's end"):
        run(running, ("a", 4, 3))
    with pytest.raises(KeyError):
        run(running, ("unknown", 0, 1))


def test_narrow_weights_only_after_steady_steps() -> None:
    requests = RunningRequests()
    config = PruneConfig.build("griffin", sparsity=0.5)
    requests.requests = {"a": PrunedRequest(config, layers(), 1)}
    run(requests, ("a", 0, 1))
    state, ways = StepState(), []
    for position in range(1, STEADY + 3):
        step = requests.plan([("a", position, 1)])
        state.begin(step)
        ways.append(state.shared is not None)
        requests.end(step)
        state.end()
    assert ways == [False] * STEADY + [True] * 2
    request = requests.drop(["a", "gone"])["a"]
    for masks in request.used_masks():
        state.forget(masks)
    assert not state._narrow
    assert not requests.requests
