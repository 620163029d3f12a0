"""Files that people keep: whole or not at all, and two writers of one name never mix."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from checkpoints import write_gguf
from dart_llm.errors import ConfigError, ResultsError
from dart_llm.files import (
    append_row,
    read_rows,
    whole_rows,
    write_bytes,
    write_tensors,
    write_text,
)
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.gguf_write import NarrowLayer, write_narrow
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.pruning.setting_file import KeptSetting

NAMES = dict.fromkeys("abcdefgh", "")
WRITERS = {
    "text": lambda path, size: write_text(path, "x" * size),
    "setting": lambda path, size: KeptSetting(PruneConfig.build("griffin", seed=size)).save(path),
    "layer table": lambda path, size: write_table(path, [size], "note"),
    "tensors": lambda path, size: write_tensors(path, {"a": torch.ones(size)}, NAMES),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
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


@pytest.mark.parametrize("length", [57, 250])
def test_long_names(length, tmp_path):
    """Of four bytes a letter the file system takes 63, which the partial name must not exceed."""
    path = tmp_path / ("x" * length if length > 60 else "\U00010400" * length)
    write_text(path, "x")
    assert path.read_text() == "x"


def race(write, path, sizes):
    """Write both at once; returns what each raised."""
    start = threading.Barrier(len(sizes))

    def write_one(size):
        start.wait()
        write(path, size)

    with ThreadPoolExecutor(len(sizes)) as pool:
        return [future.exception() for future in [pool.submit(write_one, size) for size in sizes]]


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
        assert race(write, path, sizes) == [None, None]
        assert path.read_bytes() in wholes.values()
    assert os.listdir(tmp_path) == ["kept"]


BOMB = "a: &a [x, x]\nsetting: {method: griffin, drift: *a}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("setting: " + "[" * 3000, "is nested too deeply"),
        ("setting: " + "{a: " * 3000, "is nested too deeply"),
        (BOMB, r"has an alias \(\*name\)"),
        ("setting: {method: griffin}\nsetting: {method: dart}", 'name "setting" is given twice'),
        ("setting: {method: griffin, seed: 1, seed: 2}", 'the name "seed" is given twice'),
        (f"setting: {{method: griffin, drift: [{'x, ' * 9_000}]}}", r"drift = \['x'.*\.\.\.: "),
        ("setting: {method: griffin, seed: 2020-99-99}", "month must be in"),
        ("- a", "must hold names and values"),
    ],
)
def test_foreign_yaml_is_one_short_sentence_soon(text, problem, tmp_path):
    path = tmp_path / "setting.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=problem) as caught:
        PruneConfig.build(f"file:{path}")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert time.process_time() - start < 20


def test_rows_survive_a_torn_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')  # a kill, or a full disk
    append_row(path, {"a": 3})
    assert list(whole_rows(path)) == [{"a": 1}, {"a": 3}]
    assert list(whole_rows(tmp_path / "none")) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(path, {"a": float("nan")})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "EOF"),
        ("[1]", "not a JSON object"),
        ('{"a": NaN}', "JSON"),
        ('{"a": "\\ud83d"}', "JSON"),
    ],
)
def test_rows_that_are_not_objects_are_named(line, problem, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'\ufeff{{"text": "\u2028"}}\n\n{line}\n', encoding="utf-8")
    rows = read_rows(path)
    assert next(rows) == (1, {"text": "\u2028"})
    with pytest.raises(ConfigError, match=f"^line 3 of .*{problem}"):
        next(rows)
    path.write_bytes(b"\xff")
    for bad in (path, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
            next(read_rows(bad))
