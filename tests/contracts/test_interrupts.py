"""Ctrl-C at any instruction of attaching and detaching: the model is exactly what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dart_llm
from dart_llm.patching.patch import ModelPatch as Attachment
from dart_llm.session.run import Run, prune
from interrupts import Kept, end, interrupted_at
from tiny import CONFIGS

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.contract("exact restore")]

HOOKED, PLAIN = ("native", "dart-prompt"), ("slim", "griffin")
"""Executor and method: with hooks on every layer and a signal that is watched, and with neither."""
STRESS = Path(__file__).parents[2] / "benchmarks" / "interrupts.py"


def _model() -> Any:
    kind, settings = CONFIGS["llama"]
    config = CONFIG_MAPPING[kind](**{**settings, "num_hidden_layers": 1})
    return AutoModelForCausalLM.from_config(config).eval()


def _run(model: Any, way: tuple[str, str]) -> Any:
    return prune(model, way[1], sparsity=0.5, executor=way[0])


ACTS: dict[str, Callable[[Run], Any]] = {
    "enter": Run.__enter__,
    "leave": lambda run: run.__exit__(None, None, None),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("way", "event"), [(PLAIN, "opcode"), (HOOKED, "line")])
def test_an_interrupt_before_any_instruction(way: tuple[str, str], event: str, act: str) -> None:
    model = _model()
    kept, moment, ended = Kept(model), 0, False
    while not ended:
        moment += 1
        run = _run(model, way)
        if act == "leave":
            run.attach()
        with interrupted_at(moment, event) as reached:
            try:
                ACTS[act](run)
                ended = reached[0] < moment
            except KeyboardInterrupt:
                pass
        end(run)
        assert not kept.changed(), f"{event} {moment}"
    assert moment > {"opcode": 500, "line": 100}[event]  # attaching and detaching are in them


def _interrupting(monkeypatch: pytest.MonkeyPatch, moments: Iterator[int]) -> None:
    """From now on each try to put the model back is interrupted at its moment, while there are."""
    whole = Attachment._remove

    def interrupted(attachment: Attachment) -> None:
        with interrupted_at(next(moments, None)):
            whole(attachment)

    monkeypatch.setattr(Attachment, "_remove", interrupted)


@pytest.mark.parametrize("first", [1, 150])
def test_one_interrupt_while_a_block_is_left_is_raised_when_all_is_done(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    model = _model()
    kept = Kept(model)
    _interrupting(monkeypatch, iter([first]))
    with pytest.raises(KeyboardInterrupt), _run(model, PLAIN) as run:
        assert kept.changed()
    assert not kept.changed() and run.executor == "slim"


@pytest.mark.parametrize("second", [60, 300])
def test_restore_finds_what_several_interrupts_left(
    monkeypatch: pytest.MonkeyPatch, second: int
) -> None:
    """Two while the block is left, two more inside ``restore``: each time values are in order."""
    model = _model()
    kept = Kept(model)
    _interrupting(monkeypatch, iter([200, second, 1, 40]))
    with pytest.raises(KeyboardInterrupt), _run(model, PLAIN):
        pass
    assert kept.changed() and kept.out_of_order() == 0
    with pytest.raises(KeyboardInterrupt):
        dart_llm.restore(model)
    assert kept.changed() and kept.out_of_order() == 0
    dart_llm.restore(model)
    assert not kept.changed()
    with _run(model, PLAIN):
        pass
    assert not kept.changed()


def test_signals_at_random_moments(tmp_path: Path) -> None:
    """The short form of the stress run: real SIGINTs."""
    command = [sys.executable, str(STRESS), "--count", "4", "--seconds", "10", "--out", "short"]
    subprocess.run(
        command, check=True, timeout=120, env={**os.environ, "DART_KEPT_RESULTS": str(tmp_path)}
    )
    rows = json.loads((tmp_path / "short.json").read_text("utf-8"))["rows"]
    assert [(row["executor"], row["act"]) for row in rows] == [
        (executor, act) for executor in ("slim", "native") for act in ("attach", "detach")
    ]
    for row in rows:
        assert row["interrupted"] >= 1 and row["out_of_order"] == row["not_as_before"] == 0
