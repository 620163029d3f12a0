"""Replayed detectors: by hand on made-up signals, and equal to the live tracer on the same text."""

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.pruning.drift import Rule, guards_allow
from dart_llm.studies.drift.replay import (
    Watcher,
    make_watcher,
    replay,
)
from dart_llm.studies.drift.signals import Recorded
from synthetic import HIDDEN, Driver, Stream, config, make_layers

PROMPT = 84


def shifting(*at, length=600, noise=0.3, seed=7):
    """[T, D]: a direction with noise; the next direction from each of ``at`` on."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.bucketize(torch.arange(length), torch.tensor(at), right=True)
    return torch.eye(HIDDEN)[axis] + noise * torch.randn(length, HIDDEN, generator=generator)


def test_a_change_is_noticed_after_three_windows_and_the_reference_is_renewed():
    """Reference: 80 tokens after the sinks.  Windows end at 94, 104, ..., the third low at 234."""
    signal = Recorded(shifting(204, 454))
    steady = Rule(10, lambda mu, sigma: mu - 6 * sigma, 3)
    found = replay(signal, PROMPT, Watcher("steady", steady, 50))
    # after the first: 50 tokens observed, windows from 284 on: 464 holds the change at 454 alone
    assert found.triggers == [234, 484]
    seen = [at for at, _ in found.checks]
    assert seen == [*range(94, 235, 10), *range(294, 485, 10), *range(544, 601, 10)]
    assert [check.window for _, check in found.checks][:15] == list(range(1, 16))
    assert found.checks[15][1].window == 1


def test_guards_by_hand():
    """With an allowance of 32: 64 when 5 % of n + 32 are 32, at n = 608."""
    for allowed, arguments in (
        (True, (5, None, 0, 99, 64, None)),
        (False, (73, 10, 0, 1, 64, None)),
        (True, (74, 10, 0, 1, 64, None)),
        (False, (287, None, 0, 32, 0, 0.1)),
        (True, (288, None, 0, 32, 0, 0.1)),
        (False, (288, None, 1, 32, 0, 0.1)),
        (True, (0, None, 0, 32, 64, 0.05, 32)),
        (False, (0, None, 0, 33, 64, 0.05, 31)),
        (False, (607, 0, 32, 32, 64, 0.05, 32)),
        (True, (608, 0, 32, 32, 64, 0.05, 32)),
        (False, (608, 545, 32, 32, 64, 0.05, 32)),  # the distance holds all the same
        (True, (63, None, 999, 999, 64, None, 0)),  # no share, no cap
    ):
        assert guards_allow(*arguments) is allowed, arguments


def test_rules_and_methods_by_name():
    dart = make_watcher("dart-prompt", 7)
    assert (dart.rule.window, dart.rule.count, dart.observe) == (10, 3, 32)
    assert dart.guards[:2] == (64, 0.1)
    for name in ("paper", "published", "dart"):  # the rule, not the method
        watcher = make_watcher(name, 7)
        assert (watcher.observe, watcher.guards) == (7, (0, None, 0))
    for name, error in (
        ("griffin", "never re-masks"),
        ("interval", "interval N"),
        ("interval 0", "must be a whole"),
        ("paper 3", 'write "paper"'),
        ("papr", "did you mean paper"),
    ):
        with pytest.raises(ConfigError, match=error):
            make_watcher(name, 7)
    rule = make_watcher("windows:10:2:1.5", 7).rule
    mu, sigma = torch.tensor([0.9]), torch.tensor([0.1])
    assert (rule.window, rule.count) == (10, 2)
    assert rule.threshold(mu, sigma).tolist() == pytest.approx([0.75])


@pytest.mark.parametrize(
    ("rule", "guards", "observe"),
    [
        ("published", (0, None), 1),
        ("published", (90, None), 50),
        ("paper", (64, 0.1), 32),
        ("interval 40", (0, None), 32),
        ("interval 40", (64, 0.1), 50),
    ],
)
def test_equal_to_the_tracer_on_the_same_values(rule, guards, observe):
    layers = make_layers()
    stream = Stream(layers, 1, 600)
    stream.v = shifting(204, 454)[None]
    distance, share = guards
    drift = {"rule": rule, "min_distance": distance, "max_dense_share": share}
    own = config(drift=drift, remask={"observe_tokens": observe})
    live = Driver(own, layers=layers, stream=stream)
    live.prefill(PROMPT)
    live.steps(600 - PROMPT)
    watcher = Watcher(rule, make_watcher(rule, observe).rule, observe, (*guards, 0))
    found = replay(Recorded(stream.v[0]), PROMPT, watcher)
    triggers = [check.step + PROMPT for check in live.tracer.checks if check.trigger]
    if rule.startswith("interval"):
        # a mask is built observe tokens after each trigger
        triggers = [remask.step + PROMPT - observe for remask in live.announced[1:]]
        found.triggers = [at for at in found.triggers if at + observe < 600]
    assert found.triggers == triggers
    assert len(triggers) >= 1
    checks = [(check.step + PROMPT, check.window, check.counter) for check in live.tracer.checks]
    assert [(at, check.window, check.counter) for at, check in found.checks] == checks
    for (_, one), other in zip(found.checks, live.tracer.checks, strict=True):
        assert one.similarity == pytest.approx([other.similarity], abs=1e-5)
        assert one.threshold == (other.threshold and pytest.approx([other.threshold], abs=1e-5))
