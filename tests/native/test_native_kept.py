"""The native kernels' library: verified before it is loaded, built again where damaged."""

import sys
from pathlib import Path

import pytest

from damage import DAMAGES
from dart_llm import cache as kept
from dart_llm.native import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native kernels are Linux's")

LIBRARY = b"a library" * 1000


@pytest.fixture(autouse=True)
def loaded(monkeypatch, tmp_path):
    """What is loaded instead of a library; builds write ``LIBRARY``."""
    monkeypatch.setenv("DART_CACHE", str(tmp_path))
    monkeypatch.setenv(build.SWITCH, "1")
    libraries = []

    def load(name, files, build_directory, **settings):
        (Path(build_directory) / f"{name}.so").write_bytes(LIBRARY)

    monkeypatch.setattr(build, "_registered", lambda: False)
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    monkeypatch.setattr(
        "torch.ops.load_library", lambda path: libraries.append(Path(path).read_bytes())
    )
    yield libraries
    build.why_not.cache_clear()


def _why_not():
    build.why_not.cache_clear()
    return build.why_not()


@pytest.mark.parametrize("damage", [DAMAGES["flip"], DAMAGES["cut"]])
def test_a_damaged_library_is_never_loaded(loaded, damage, caplog):
    """A whole one is built once."""
    assert _why_not() == "" and loaded == []
    assert _why_not() == "" and loaded == [LIBRARY]
    loaded.clear()
    (path,) = (build.cache_folder() / "native").iterdir()
    damage(path)
    assert _why_not() == "" and loaded == []
    assert len(caplog.records) == 1 and "a damaged file" in caplog.text
    assert _why_not() == "" and loaded == [LIBRARY] and len(caplog.records) == 1


def test_a_library_that_does_not_load_is_built_again(loaded, monkeypatch, caplog):
    folder = build.cache_folder() / "native"
    other = kept.write(folder, build.built_name(), ".so", b"of another system")

    def load(path):
        if Path(path) == other:
            raise OSError(f"{path}: cannot open shared object file")
        loaded.append(Path(path).read_bytes())

    monkeypatch.setattr("torch.ops.load_library", load)
    assert _why_not() == ""
    assert "cannot be loaded; building again" in caplog.text and len(caplog.records) == 1
    assert not other.exists()
    assert _why_not() == "" and loaded == [LIBRARY] and len(caplog.records) == 1


def test_what_is_missing_is_said_before_anything_is_built(monkeypatch):
    assert build.state().startswith("not built yet")
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = "there is no C++ compiler no-such-compiler: install g++, or set CXX"
    assert build.state() == f"none: {missing}" and missing in _why_not()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build.state() == f"none: {_why_not()}"
