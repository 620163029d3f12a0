"""Runs of methods that calibrate, without a tokenizer: their calibration is a few random tokens."""

from dart_llm.calibration.calibrate import choose, observe
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import Run
from tiny import tokens


def ready(model, method, **settings):
    """As ``prune``; a method that calibrates does so on 6 sequences of 24 tokens first."""
    config = PruneConfig.build(method, **settings)
    if config.calibration is None or config.target == 0:
        return Run(model, config)
    held, prior = choose(model, config, observe(model, config, tokens(6, 24, seed=9)))
    return Run(model, config, held=held, prior=prior)
