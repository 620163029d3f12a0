"""Files of people and the cache: whole or absent, two writers at once, damage, names that stay."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from checkpoints import write_gguf
from damage import DAMAGES
from dart_llm import cache as kept
from dart_llm.calibration.cache import key_of, rule_of
from dart_llm.errors import ConfigError, LoadError, ResultsError
from dart_llm.evaluation import perplexity
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.cell import Cell
from dart_llm.files import append_row, read_rows, whole_rows, write_bytes, write_tensors, write_text
from dart_llm.models.describe import describe
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.gguf_write import NarrowLayer, write_narrow
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.layer_table import write_table
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.setting_file import KeptSetting
from dart_llm.session.run import BoundMethod
from tiny import tiny

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
    texts = []
    reader = threading.Thread(target=lambda: texts.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "said")
    reader.join()
    assert texts == ["said"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
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
        (BOMB, r"aliases \(\*name\) are not supported"),
        ("setting: {method: griffin}\nsetting: {method: dart}", 'key "setting" appears twice'),
        ("setting: {method: griffin, seed: 1, seed: 2}", 'key "seed" appears twice: remove'),
        (f"setting: {{method: griffin, drift: [{'x, ' * 9_000}]}}", r"drift = \['x'.*\.\.\.: "),
        ("setting: {method: griffin, seed: 2020-99-99}", "month must be in"),
        ("- a", "must contain a mapping of names to values"),
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


DATA = bytes(range(256)) * 64


def test_what_is_written_is_read_by_its_key(tmp_path):
    key = kept.key_of("a", 1, [2.5, None])
    assert kept.read(tmp_path / "new", key, ".bin") is None
    path = kept.write(tmp_path / "new", key, ".bin", DATA)
    assert path.name == f"{key}-{kept.digest_of(DATA)}.bin"
    assert kept.read(tmp_path / "new", key, ".bin") == DATA
    assert kept.find(tmp_path / "new", key, ".bin") == path
    assert kept.read(tmp_path / "new", key, ".other") is None
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    parts = [("a",), ("a", 1), ("a", "1"), ("a", 1.0), (("a", 1),), ("a", None), ()]
    assert len({kept.key_of(*one) for one in parts}) == len(parts)
    assert kept.key_of("a", 1) == kept.key_of("a", 1)
    assert all(len(kept.key_of(*one)) == kept.DIGITS for one in parts)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_said_and_mended(tmp_path, damage, caplog):
    other = kept.write(tmp_path, kept.key_of("other"), ".bin", DATA)
    path = kept.write(tmp_path, kept.key_of("this"), ".bin", DATA)
    damage(path)
    assert kept.read(tmp_path, kept.key_of("this"), ".bin") is None
    assert [one.getMessage() for one in caplog.records] == [
        f"a damaged file in {tmp_path} was removed; its content is made again"
    ]
    assert [one.name for one in tmp_path.iterdir()] == [other.name]
    assert kept.write(tmp_path, kept.key_of("this"), ".bin", DATA) == path
    assert kept.read(tmp_path, kept.key_of("this"), ".bin") == DATA
    assert len(caplog.records) == 1


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    names = (".tmp-old", ".key-1.bin.abc.part", ".tmp-folder", ".tmp-new")
    old, part, folder, new = (tmp_path / name for name in names)
    folder.mkdir()
    for path in (old, part, folder / "part", new):
        path.touch()
    for path in (old, part, folder):
        os.utime(path, (0, 0))
    assert kept.read(tmp_path, "key", ".bin") is None
    assert [one.name for one in tmp_path.iterdir()] == [new.name]


def test_content_is_on_the_disk_before_its_name_and_a_full_disk_leaves_nothing(
    tmp_path, monkeypatch
):
    """File, rename, folder: in this order, or a power cut leaves a name without its content."""
    done, sync, replace = [], os.fsync, Path.replace

    def synced(handle):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *two: done.append("rename") or replace(*two))
    kept.write(tmp_path / "a", "key", ".bin", DATA)
    assert done == ["file", "rename", "folder"]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoadError, match=r"cannot write .*: No space left on device"):
        kept.write(tmp_path / "b", "key", ".bin", DATA)
    assert list((tmp_path / "b").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from dart_llm import cache as kept
folder, who = Path(sys.argv[1]), sys.argv[2]
for turn in range(60):
    kept.write(folder, "key", ".bin", (who * 5000 + str(turn % 3)).encode())
    found = kept.read(folder, "key", ".bin")
    assert found is not None and len(found) == 5001 and len(set(found[:-1])) == 1, found
"""


def test_two_processes_at_once(tmp_path):
    both = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), who], stderr=subprocess.PIPE)
        for who in "ab"
    ]
    for one in both:
        _, wrong = one.communicate(timeout=60)
        assert (one.returncode, wrong) == (0, b"")
    assert not list(tmp_path.glob(".tmp-*"))


# Keys are in people's folders: a change here needs a line in the changelog.


@pytest.mark.contract("keys of kept work stay")
def test_keys_of_results_and_of_what_was_learnt():
    options, changes = MeasureOptions(limit=2), {"masking_step": 3}
    cell = Cell("m", "griffin", "perplexity:embedded", 0.5, 1, options=options, overrides=changes)
    assert cell.key == "m-griffin@0.5-perplexity-embedded-decode-7a298b2eef"
    method = BoundMethod(None, None, PruneConfig.build("griffin", sparsity=0.5))
    key = perplexity.part_key(method, "text", "decode", Window(torch.arange(6), 2))
    assert key == "ppl/text/griffin@0.5/decode/0-6-2/0f840037c483c8c53acaf76b"
    assert key_of("f" * 64, "a", 1) == "ffffffffffff-155e18f16de7d2d23c7e8120662f8d7e"


@pytest.mark.contract("keys of kept work stay")
@pytest.mark.parametrize(
    ("method", "name"), [("dart", "squared"), ("flap", "squared"), ("griffin", "squared_share")]
)
def test_a_score_keeps_its_name_where_its_file_moves(method, name):
    config = PruneConfig.build(method, sparsity=0.5)
    layers = describe(tiny()).weights(config.score.proxy_embedding, config.seed)
    rule = rule_of(MaskSelector(config, layers).statistics)
    assert isinstance(rule, list) and rule[0] == f"dart_llm.statistics.{name}"
