"""Settings that must precede the import of torch, and the real default model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes that spin stop each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded default in float32, from the cache or fetched once; do not change it."""
    from dart_llm.loading import load

    return load("smollm2-135m", dtype="float32")
