"""Which cases of a product of architectures, methods, dtypes, budgets … always run."""

from itertools import product

import pytest
import torch

SHAPES = ("llama-bias", "phi3", "gpt2", "falcon", "opt")
"""One architecture per shape of FFN: gated with biases, fused, Conv1D, parallel, flattened."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(chosen, *axes):
    """The product of ``axes``: the chosen ones always, the others with ``-m full``."""
    always, every = set(chosen), list(product(*axes))
    assert always <= set(every)
    return [pytest.param(*case, marks=() if case in always else pytest.mark.full) for case in every]


def in_turn(first, second):
    """Each of ``first`` with one of ``second``, in turn."""
    second = tuple(second)
    return [(one, second[place % len(second)]) for place, one in enumerate(first)]
