"""Settings that must precede torch, the list of promises, and the real default model."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two processes that spin stop each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DART_NATIVE", "0")  # auto is compact, but in the tests of what is native
os.environ.setdefault("TRITON_INTERPRET", str(int(not Path("/dev/nvidiactl").exists())))

import pytest
import torch
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

HERE = Path(__file__).parent
LISTED = (HERE / "contracts/README.md").read_text("utf-8")
CONTRACTS = re.findall(r"^\* \*\*(.+?)\*\*", LISTED, re.M)
"""The promises of contracts/README.md: none may be without a test."""

LONGEST = (
    "native/test_native_sanitized.py",
    "native/test_packed_kernels.py",  # compiles the kernels meanwhile
    "docs/test_commands.py",
    "docs/test_examples.py",
    "studies/sweep/test_sweep_ray.py",
    "cli/test_cli.py",
    "cli/test_chat_terminal.py",
)
"""Files of few tests that take long: begun last, one would keep one worker, and the other idle."""

COUNTED = pytest.StashKey[Counter[str]]()
"""How many tests of each promise ran."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTED] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The whole products run with ``-m full`` alone; reports carry the promises, xdist's too."""
    places = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if not config.option.markexpr:
        whole = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if item not in set(whole)]
    for item in items:
        item.user_properties += [("contract", m.args[0]) for m in item.iter_markers("contract")]


def _broken(config: pytest.Config) -> list[str]:
    """The promises without a test that passed, where every test was to run."""
    everything = all(Path(arg).resolve() in (HERE, HERE.parent) for arg in config.args)
    options = config.option
    whole = everything and not (options.keyword or options.markexpr or options.maxfail)
    counted = config.stash[COUNTED] if whole else dict.fromkeys(CONTRACTS)
    return [f"contract({name}): no test" for name in CONTRACTS if name not in counted]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """On the process that reports: a promise without a test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:
        return
    for report in reporter.stats.get("passed", []):
        if report.when == "call":
            names = {name for key, name in report.user_properties if key == "contract"}
            session.config.stash[COUNTED].update(names)
    if exitstatus == pytest.ExitCode.OK and _broken(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    counted, broken = config.stash[COUNTED], _broken(config)
    if counted or broken:
        terminalreporter.section("contracts")
        for name in sorted(counted):
            terminalreporter.write_line(f"contract({name}): {counted[name]} tests")
        for line in broken:
            terminalreporter.write_line(line, red=True)


@pytest.fixture(autouse=True)
def rows_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured when a model is attached would differ from run to run."""
    from dart_llm.patching.executors.native_ffn import SelectionTimes

    times = SelectionTimes(read_all=2.0, skip=1.0)
    monkeypatch.setattr(SelectionTimes, "measure", lambda *_: times)


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
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The native kernels are on, and are there."""
    from dart_llm.native import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.SWITCH, "1")
        build.why_not.cache_clear()
        # xdist's workers begin with files that want them: one compiles, the others wait for it
        with FileLock(tmp_path_factory.getbasetemp().parent / "native.lock"):
            assert build.why_not() == ""
        yield
    build.why_not.cache_clear()


@pytest.fixture
def dequantised_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of more than 16 tokens are multiplied with dequantised rows, tokens on the blocks.

    For tests that compare masks to the last bit: on blocks, inputs are rounded to 8 bits.
    """
    from dart_llm.models import packed
    from dart_llm.patching.executors import whole_step

    for module in (packed, whole_step):
        monkeypatch.setattr(module, "few", lambda: 16)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of cuda run as few programs in Triton's interpreter, which takes 10 ms for each."""
    if importlib.util.find_spec("triton") is not None:
        from dart_llm.patching.executors import cuda

        if cuda.INTERPRETED:
            monkeypatch.setattr(cuda, "ROWS", 64)
            monkeypatch.setattr(cuda, "CHUNK", 64)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded default in float32, from the cache or fetched once; do not change it."""
    from dart_llm.models.loading import load

    return load("smollm2-135m", dtype="float32")
