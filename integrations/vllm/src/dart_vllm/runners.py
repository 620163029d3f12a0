"""Reads the tokens of each step in vLLM's model runners, V1 and V2.

The two runners keep the same facts in different places: which requests a batch has, in which order,
and how many of their tokens have run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Begin = Callable[[list[tuple[str, int, int]]], None]
"""Called with each request of the batch in order: its name, the position of its first token, and
the number of its tokens."""


def hook(runner: Any, begin: Begin, is_step: Callable[[], bool]) -> None:
    """Call ``begin`` just before the model's forward in each step.

    ``is_step``: False for forwards of no request, such as profiling runs.
    """
    if hasattr(runner, "model_state"):
        _hook_v2(runner.model_state, begin, is_step)
    else:
        _hook_v1(runner, begin, is_step)


def _hook_v1(runner: Any, begin: Begin, is_step: Callable[[], bool]) -> None:
    """Hook the runner in vllm/v1/worker/gpu_model_runner.py, which the CPU's inherits from."""
    forward = runner._model_forward

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        if is_step():
            batch = runner.input_batch
            names = batch.req_ids[: batch.num_reqs]
            begin(_tokens(names, batch.num_computed_tokens_cpu, runner.query_start_loc.np))
        return forward(*args, **kwargs)

    runner._model_forward = model_forward


def _hook_v2(state: Any, begin: Begin, is_step: Callable[[], bool]) -> None:
    """Hook the model's state object in vllm/v1/worker/gpu/model_runner.py."""
    prepare = state.prepare_inputs

    def prepare_inputs(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if is_step():
            names = batch.req_ids[: batch.num_reqs]
            begin(_tokens(names, batch.num_computed_tokens_np, batch.query_start_loc_np))
        return prepare(batch, *args, **kwargs)

    state.prepare_inputs = prepare_inputs


def _tokens(names: Any, computed: Any, starts: Any) -> list[tuple[str, int, int]]:
    return [
        (name, int(computed[row]), int(starts[row + 1] - starts[row]))
        for row, name in enumerate(names)
    ]
