"""Settings that must precede vLLM, and the models and references of the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other make a busy machine ten times slower
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, in which tests can reach the model
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
import torch
from cases import Engine, make_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M-Instruct in float32."""
    from dart_llm import load

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load("smollm2-135m", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Maps the name of an architecture to the folder of a tiny random model."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder_of


@pytest.fixture
def engine() -> Iterator[Any]:
    """Makes engines; each is freed before the next, and at the end of the test."""
    made: list[Engine] = []

    def make(folder: Path, **options: Any) -> Engine:
        free()
        made.append(Engine(folder, **options))
        return made[0]

    def free() -> None:
        for old in made:  # now, not when a test's variable ends: it would end the next one's groups
            vars(old).clear()
        made.clear()
        gc.collect()

    yield make
    free()
