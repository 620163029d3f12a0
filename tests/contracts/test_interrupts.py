"""Ctrl-C at any instruction of attaching and detaching: the model is exactly what it was."""

import contextlib
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dart_llm
from dart_llm.models import agreement
from dart_llm.patching import changes, patch
from dart_llm.patching.executors import native_ffn
from dart_llm.session import run as session
from dart_llm.session.run import Run, prune
from steps import snapshot
from tiny import CONFIGS

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.contract("exact restore")]

HOOKED, PLAIN = ("native", "dart-prompt"), ("native", "griffin")
"""Executor and method: with hooks on every layer and a signal that is watched, and with neither."""
FILES = {str(module.__file__) for module in (agreement, changes, patch, native_ffn, session)}
"""Where a model is changed and put back."""


@pytest.fixture(autouse=True)
def gradients():
    """On again: a ``with torch.no_grad()`` that is interrupted as it ends leaves them off."""
    yield
    torch.set_grad_enabled(True)


@contextlib.contextmanager
def interrupted_at(moment, event="opcode"):
    """Interrupt before the ``moment``-th instruction or line of ``FILES``; yields their count."""
    count = [0]

    def trace(frame, kind, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = event == "opcode"
        if kind == event:
            count[0] += 1
            if count[0] == moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


class Kept:
    """A model, and whether it is what it was."""

    def __init__(self):
        kind, settings = CONFIGS["llama"]
        config = CONFIG_MAPPING[kind](**{**settings, "num_hidden_layers": 1})
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.before = snapshot(self.model)

    def in_order(self):
        """Whether every parameter has its values."""
        now, then = (one["state"].values() for one in (snapshot(self.model), self.before))
        return [values for *_, values in now] == [values for *_, values in then]

    def unchanged(self):
        return snapshot(self.model) == self.before

    def run(self, way):
        return prune(self.model, way[1], sparsity=0.5, executor=way[0])


ACTS = {"enter": Run.__enter__, "leave": lambda run: run.__exit__(None, None, None)}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("way", "event", "step"),
    [
        (PLAIN, "opcode", 53),
        (HOOKED, "line", 5),
        pytest.param(PLAIN, "opcode", 1, marks=pytest.mark.full),
    ],
)
def test_an_interrupt_before_any_instruction(way, event, step, act):
    """Before every fifth line and every 53rd instruction or, with ``-m full``, each."""
    kept, moment, ended = Kept(), 0, False
    while not ended:
        moment += step
        run = kept.run(way)
        if act == "leave":
            run.attach()
        with interrupted_at(moment, event) as reached, contextlib.suppress(KeyboardInterrupt):
            ACTS[act](run)
            ended = reached[0] < moment
        run.detach()
        dart_llm.restore(kept.model)  # what a user does after an interrupt
        assert kept.unchanged(), f"{event} {moment}"
    assert moment > {"opcode": 500, "line": 50}[event]  # attaching and detaching are in them


def _interrupting(monkeypatch, *moments):
    """From now on each try to put the model back is interrupted at its moment, while there are."""
    whole, left = patch.ModelPatch._remove, iter(moments)

    def interrupted(attachment):
        with interrupted_at(next(left, None)):
            whole(attachment)

    monkeypatch.setattr(patch.ModelPatch, "_remove", interrupted)


@pytest.mark.parametrize("second", [None, 60])
def test_restore_finds_what_several_interrupts_left(monkeypatch, second):
    """One interrupt while a block is left, or two, and two more in ``restore``."""
    kept = Kept()
    _interrupting(monkeypatch, *([150] if second is None else [200, second, 1, 40]))
    with pytest.raises(KeyboardInterrupt), kept.run(PLAIN):
        assert not kept.unchanged()
    assert kept.in_order() and kept.unchanged() == (second is None)
    if second is not None:
        with pytest.raises(KeyboardInterrupt):
            dart_llm.restore(kept.model)
        assert kept.in_order() and not kept.unchanged()
    dart_llm.restore(kept.model)
    assert kept.unchanged()
