"""Kept files: whole or absent, checked when read, and nothing left over from killed writers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from damage import DAMAGES
from dart_llm import cache as kept
from dart_llm.errors import LoadError

DATA = bytes(range(256)) * 64


def test_what_is_written_is_read(tmp_path):
    key = kept.key_of("a", 1, [2.5, None])
    assert kept.read(tmp_path / "new", key, ".bin") is None
    path = kept.write(tmp_path / "new", key, ".bin", DATA)
    assert path.name == f"{key}-{kept.digest_of(DATA)}.bin"
    assert kept.read(tmp_path / "new", key, ".bin") == DATA
    assert kept.find(tmp_path / "new", key, ".bin") == path
    assert kept.read(tmp_path / "new", key, ".other") is None
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_keys_tell_their_parts_apart():
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
        f"a damaged file in {tmp_path} is not used: its content is made anew"
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
