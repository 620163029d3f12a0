"""A short form of benchmarks/kills.py: commands killed at random moments lose nothing."""

import os
import subprocess
import sys

import pytest

from shells import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_commands_go_on_and_end_alike(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/kills.py"), "--kills", "3", "--full", "1"]
    done = subprocess.run(
        [*command, "--commands", "run,sweep"],
        env={**os.environ, "DART_KEPT_RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| `")]
    found = {name.strip(" `"): [int(cell) for cell in cells] for name, *cells in rows}
    assert list(found) == ["run", "sweep"]
    for kills, full, ended, kept, lost, differ in found.values():
        assert ended >= 1 and (lost, differ) == (0, 0), (kills, full, kept)
    assert [sum(row[place] for row in found.values()) for place in (0, 1)] == [3, 1]
