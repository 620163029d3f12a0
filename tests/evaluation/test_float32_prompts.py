"""Truth on the default model, dense in bfloat16, where the CPU emulates it: fast, and as exact."""

import copy

import pytest
import torch

from dart_llm.data import texts
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.models.float32_products import emulates
from dart_llm.models.loading import load

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(not emulates(torch.bfloat16), reason="this CPU has bfloat16 arithmetic"),
]


@pytest.fixture(scope="module")
def models():
    """As ``load`` gives it, and as transformers alone would compute it."""
    model, tokenizer = load("smollm2-135m", weights="dense")
    plain = copy.deepcopy(model)
    del plain.forward
    return model, plain, tokenizer


def test_perplexity_is_the_same_but_for_rounding(models):
    model, plain, tokenizer = models
    windows = slices(tokenizer(texts.all_text(), return_tensors="pt").input_ids[0], 2, 64, 64)
    found, slow, exact = (
        score(one, None, windows, 64).perplexity
        for one in (model, plain, copy.deepcopy(plain).float())
    )
    assert found == pytest.approx(slow, rel=0.01) and found == pytest.approx(exact, rel=0.01)
