"""Files that people keep: whole or not at all, and two writers of one name never mix."""

import os
import threading
import time

import pytest
import torch

from checkpoints import write_gguf
from dart_llm.errors import ConfigError, DartError, ResultsError
from dart_llm.files import read_yaml, write_bytes, write_tensors, write_text
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.gguf_write import NarrowLayer, write_narrow
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.pruning.setting_file import KeptSetting
from lm_cases import call

WRITERS = {
    "text": lambda path, size: write_text(path, "x" * size),
    "configuration": lambda path, size: PruneConfig.build("griffin", seed=size).save(path),
    "setting": lambda path, size: KeptSetting(PruneConfig.build("griffin", seed=size)).save(path),
    "layer table": lambda path, size: write_table(path, [size], "note"),
    "tensors": lambda path, size: write_tensors(path, {"a": torch.ones(size)}, {"size": str(size)}),
    "settings of a command": lambda path, size: call(
        *("run", "--prompt", "x", "--generation", size, "--model", path.with_name("none")),
        *("--save-config", path),
    ),
}
each_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@each_writer
def test_a_full_disk_keeps_what_was_there(write, tmp_path, monkeypatch):
    """Also one that says so as late as it may; of what was begun nothing stays."""
    path = tmp_path / "kept"
    write(path, 3)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    try:
        said = write(path, 7000).err  # of a command
    except ResultsError as error:
        said = f"{error}\n"
    assert said.endswith(f"cannot write {path}: No space left on device\n")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["kept"]


def test_links_stay_and_permissions_too(tmp_path):
    link, path = tmp_path / "link", tmp_path / "real"
    link.symlink_to(path)
    write_text(link, "new", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    write_bytes(link, b"again")
    assert link.is_symlink() and path.read_text() == "again"
    assert path.stat().st_mode & 0o777 == 0o640
    write_text(tmp_path / "usual", "x")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "usual").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_not_a_file_is_written_to(tmp_path):
    """A pipe that another program reads: nothing takes its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "said")
    reader.join()
    assert found == ["said"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(ResultsError, match="Is a directory"):
        write_text(tmp_path, "x")


@pytest.mark.parametrize("length", [57, 250, 300])
def test_long_names(length, tmp_path):
    """Of four bytes a letter the file system takes 63, which the partial name must not exceed."""
    path = tmp_path / ("x" * length if length > 60 else "\U00010400" * length)
    if length < 256:
        write_text(path, "x")
        assert path.read_text() == "x"
        return
    with pytest.raises(ResultsError, match=r"cannot write .*: File name too long"):
        write_text(path, "x")


def race(write, path, sizes):
    """Write both at once; what each said."""
    start, said = threading.Barrier(len(sizes)), {}

    def one(size):
        start.wait()
        try:
            write(path, size)
            said[size] = "written"
        except DartError as error:
            said[size] = str(error)

    threads = [threading.Thread(target=one, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def exporter(folder):
    """Writes a GGUF file whose layers keep some neurons."""
    source = read_gguf(write_gguf(folder / "tiny.gguf", width=256))

    def write(path, keep):
        write_narrow(source, [NarrowLayer(torch.arange(keep), keep)] * 2, path, "{}")

    return write


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("text", (200_000, 400_000)), ("tensors", (200_000, 400_000)), ("export", (64, 224))],
)
def test_two_writers_at_once(name, sizes, tmp_path, tmp_path_factory):
    path, wholes = tmp_path / "kept", {}
    write = WRITERS.get(name) or exporter(tmp_path_factory.mktemp("source"))
    for size in sizes:
        write(path, size)
        wholes[size] = path.read_bytes()
    for _ in range(15):
        assert race(write, path, sizes) == dict.fromkeys(wholes, "written")
        assert path.read_bytes() in wholes.values()
    assert os.listdir(tmp_path) == ["kept"]


def bomb(levels, last):
    """Nine times the level before in each: nine to the power of all in the last."""
    names = "abcdefghi"
    lines = [f"a: &a [{', '.join('x' * 9)}]"]
    for before, name in zip(names, names[1 : levels + 1], strict=False):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join([*lines, last.format(names[levels])])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("setting: " + "[" * 3000, "is nested too deeply"),
        ("setting: " + "{a: " * 3000, "is nested too deeply"),
        (bomb(5, "setting: {{method: griffin, drift: *{}}}"), "holds more than 100000 values"),
        (bomb(8, "setting: {{method: griffin, drift: *{}}}"), "holds more than 100000 values"),
        ("setting: &x\n  method: griffin\n  score: *x\n", "holds more than 100000 values"),
        ("setting: {method: griffin}\nsetting: {method: dart}", 'name "setting" is given twice'),
        ("setting: {method: griffin, seed: 1, seed: 2}", 'the name "seed" is given twice'),
        (f"setting: {{method: griffin, drift: [{'x, ' * 9_000}]}}", r"drift = \['x'.*\.\.\.: "),
        ("setting: {method: griffin, seed: 2020-99-99}", "month must be in"),
    ],
)
def test_yaml_of_strangers_is_one_short_sentence_soon(text, said, tmp_path):
    path = tmp_path / "setting.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=said) as found:
        PruneConfig.build(f"file:{path}")
    assert len(str(found.value)) < 600 and "\n" not in str(found.value)
    assert time.process_time() - start < 20  # minutes, and megabytes, without a bound


def test_aliases_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b {x: 1}\nown: {<<: *b, y: 2}\nlist: [*b, *b]\n")
    x = {"x": 1}
    assert read_yaml(path) == {"base": x, "own": {**x, "y": 2}, "list": [x, x]}
