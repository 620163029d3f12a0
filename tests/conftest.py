"""Settings that must precede the import of torch, and the real default model."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes that spin stop each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DART_NATIVE", "0")  # auto is compact, but in the tests of what is native

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

torch.set_num_threads(2)

NOT_RUN = pytest.StashKey[list[str]]()
"""Commands of the documentation that the tests do not run, with the reason."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_RUN] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash[NOT_RUN]
    if lines:
        terminalreporter.section("commands of the documentation that are not run here")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def own_calibrations(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What tiny models teach is learnt anew: the user's cache may hold what older code learnt."""
    from dart_llm import cache
    from dart_llm.calibration import cache as calibration_cache

    if request.node.get_closest_marker("smollm2"):
        return
    outside, folder = os.environ.get("DART_CACHE"), tmp_path_factory.getbasetemp() / "calibrations"

    def chosen(cache_dir: str | None = None) -> object:
        unsaid = not cache_dir and os.environ.get("DART_CACHE") == outside
        return cache.cache_folder(folder if unsaid else cache_dir)

    monkeypatch.setattr(calibration_cache, "cache_folder", chosen)


@pytest.fixture(scope="module")
def native() -> Iterator[None]:
    """The native kernels are on, and are there."""
    from dart_llm.native import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.SWITCH, "1")
        build.why_not.cache_clear()
        assert build.why_not() == ""
        yield
    build.why_not.cache_clear()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded default in float32, from the cache or fetched once; do not change it."""
    from dart_llm.models.loading import load

    return load("smollm2-135m", dtype="float32")
