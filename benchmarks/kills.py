"""Commands that are killed at random moments, and started again: what is lost, what differs?

Each command runs once to its end, undisturbed.  Then it is killed with SIGKILL at a random moment,
again and again, and started anew until it ends.  After every kill the parts and cells that were
finished must be the ones of the next look; at the end the results must equal those of the
undisturbed run, times aside.  A part of the runs meets a full disk on a small file system first
(mounting one needs root; without it a limit on the size of files stands for it).

Commands are forked from one process that has imported everything, so that kills hit work.

Usage: python benchmarks/kills.py [--kills 100] [--full 10] [--minutes 30] [--seed 0]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked threads would not come along

import argparse
import contextlib
import importlib
import itertools
import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import parser, save
from kills_place import COMMANDS, OPTIONS, SERVE, write_place

VOLATILE = {"seconds", "phases", "timing", "started", "finished", "date", "speed_up"}
"""Keys of results whose values are times."""
LEFT_OUT = ("config.json", "timing.json", ".lock")
LONGEST = 300.0
"""Seconds after which a run hangs."""
MOST = 10
"""Kills of one run before it may end."""
SHARES = {"run": 25, "eval": 15, "sweep": 20, "compare": 10, "drift": 20, "serve": 10}
"""Kills of each command, per hundred."""


def start(arguments: list[str], log: Path, limit: int | None = None) -> int:
    """Fork a child that becomes ``dart-llm ARGUMENTS``; its process number.

    ``limit``: bytes that a file of its may have.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["dart-llm", *arguments]
        from dart_llm.cli import run

        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child, negative for a signal; None while it runs after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(min(0.002, seconds))


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def finished(results: Path) -> dict[str, Any]:
    """What results folders hold of finished work: parts, and cells with the time of their file."""
    found: dict[str, Any] = {}
    for path in results.glob("*/*/parts.jsonl"):
        *lines, _ = path.read_bytes().split(b"\n")
        for line in lines:
            row = json.loads(line)
            assert f"part {row['key']}" not in found, f"computed twice: {row['key']}"
            found[f"part {row['key']}"] = row["value"]
    for path in results.glob("*/*/cells/*/result.json"):
        if not path.parent.name.startswith("."):
            found[f"cell {path.parent.name}"] = (path.stat().st_mtime_ns, path.read_text())
    return found


def complete(results: Path) -> bool:
    """Whether a run ended although it was killed: at its very last steps."""
    configs = list(results.glob("*/*/config.json"))
    done = [json.loads(path.read_text())["status"] == "complete" for path in configs]
    return all(done) and bool(done) and not list(results.glob("*/*/parts.jsonl"))


def outcome(results: Path) -> dict[str, Any]:
    """The files of the one folder of a run that began, without times."""
    (config,) = results.glob("*/*/config.json")
    folder = config.parent
    status = json.loads(config.read_text())["status"]
    assert status == "complete", f"{folder} is {status}"
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name in LEFT_OUT or path.suffix in (".log", ".html", ".png"):
            continue
        if path.suffix in (".json", ".jsonl"):
            texts = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [still(json.loads(text)) for text in texts if text]
        elif path.suffix not in (".svg", ".pdf", ".md"):
            found[name] = path.read_bytes().hex()
    return found


def still(data: Any) -> Any:
    """JSON without times."""
    if isinstance(data, dict):
        return {k: still(v) for k, v in data.items() if k not in VOLATILE and k[-2:] != "_s"}
    return [still(one) for one in data] if isinstance(data, list) else data


@dataclass
class Tally:
    """What happened to one command."""

    kills: int = 0
    full_disks: int = 0
    runs_to_the_end: int = 0
    kept: int = 0
    """Finished parts and cells that were looked for again after a kill or a full disk."""
    lost: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)


class Campaign:
    """One command in a folder of its own, killed and started again."""

    def __init__(self, name: str, place: Path, chance: random.Random) -> None:
        self.name, self.chance, self.tally = name, chance, Tally()
        self.results, self.log = place / f"results-{name}", place / f"{name}.log"
        began = time.monotonic()
        self.to_the_end()
        self.seconds = time.monotonic() - began
        self.expected = outcome(self.results)
        shutil.rmtree(self.results)

    def start(self, limit: int | None = None) -> int:
        place = ["--results-dir", str(self.results), *OPTIONS]
        return start([*COMMANDS[self.name], *place], self.log, limit)

    def to_the_end(self) -> None:
        code = wait(self.start(), LONGEST)
        assert code == 0, f"exit code {code}: {self.log.read_text()[-3000:]}"

    def kill(self, most: int) -> None:
        """Kill up to ``most`` times, then let it end."""
        seen: dict[str, Any] = {}
        for _ in range(most):
            child = self.start()
            began = time.monotonic()
            if wait(child, self.chance.uniform(0, 0.9 * self.seconds)) is not None:
                self.seconds = min(self.seconds, time.monotonic() - began)  # else kills come late
                break
            kill(child)
            self.tally.kills += 1
            if complete(self.results):
                break
            seen = self.look(seen)
        self.end(seen)

    def fill(self) -> None:
        """Let the disk be full at a random moment; make room and go on."""
        home = self.results
        with small_disk(home.with_name(f"disk-{self.name}")) as (disk, mounted):
            self.results = disk / "results"
            child = self.start(None if mounted else self.chance.randint(200, 20_000))
            code = wait(child, self.chance.uniform(0.1, 0.9) * self.seconds)
            filler = disk / "filler"
            if mounted:
                fill_up(filler)
            code = wait(child, LONGEST) if code is None else code
            filler.unlink(missing_ok=True)
            self.tally.full_disks += code != 0
            self.end(self.look({}))
        self.results = home

    def look(self, seen: dict[str, Any]) -> dict[str, Any]:
        """What is finished now; what was at the last look must be among it, unchanged."""
        now = finished(self.results)
        self.tally.kept += len(seen)
        self.tally.lost += [key for key, value in seen.items() if now.get(key) != value]
        return now

    def end(self, seen: dict[str, Any]) -> None:
        """Start until it ends; the results must be those of the undisturbed run."""
        if not complete(self.results):
            self.to_the_end()
        self.look({key: value for key, value in seen.items() if key.startswith("cell")})
        found = outcome(self.results)
        names = sorted({*found, *self.expected})
        self.tally.differ += [n for n in names if found.get(n) != self.expected.get(n)]
        self.tally.runs_to_the_end += 1
        shutil.rmtree(self.results)


class Serving:
    """``dart-llm serve``: killed while it starts or answers, then asked again."""

    def __init__(self, place: Path, chance: random.Random) -> None:
        self.chance, self.tally, self.log = chance, Tally(), place / "serve.log"
        began = time.monotonic()
        child, port = self.start()
        self.expected = ask(port)
        self.seconds = time.monotonic() - began
        kill(child)

    def start(self) -> tuple[int, int]:
        port = free_port()
        return start([*SERVE, "--port", str(port), *OPTIONS], self.log), port

    def kill(self, most: int) -> None:
        """Kill it up to ``most`` times, the last time after its answer was compared."""
        for _ in range(most - 1):
            child, port = self.start()
            moment = time.monotonic() + self.chance.uniform(0, self.seconds)
            with contextlib.suppress(OSError):
                ask(port, moment)
            wait(child, max(0.0, moment - time.monotonic()))
            kill(child)
            self.tally.kills += 1
        child, port = self.start()
        self.tally.differ += [] if ask(port) == self.expected else ["answer"]
        self.tally.runs_to_the_end += 1
        kill(child)
        self.tally.kills += 1


def ask(port: int, until: float | None = None) -> str:
    """What the server answers; it is asked until it listens, or until that moment."""
    body = {"prompt": "The bees fly from flower to flower", "max_tokens": 40, "temperature": 0}
    address = f"http://127.0.0.1:{port}/v1/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    end = time.monotonic() + LONGEST if until is None else until
    while True:
        try:
            with urllib.request.urlopen(request, timeout=max(0.01, end - time.monotonic())) as got:
                return str(json.load(got)["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the server answers {error.code}: {error.read()[:500]!r}") from None
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fill_up(path: Path) -> None:
    """Write a file until no byte more fits."""
    for block in (2**20, 1):
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * block)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A file system of 64 MiB at ``folder``; the folder and False where none can be mounted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def campaign(place: Path, names: Sequence[str], args: argparse.Namespace) -> dict[str, Tally]:
    """Kill and fill, the commands in turn, until the counts are reached or the time is over."""
    end = time.monotonic() + 60 * args.minutes
    shares = {name: SHARES[name] for name in names}
    found: dict[str, Tally] = {}
    waiting: list[tuple[Campaign | Serving, int]] = []
    for name, share in shares.items():
        chance = random.Random(f"{args.seed} {name}")
        one = Serving(place, chance) if name == "serve" else Campaign(name, place, chance)
        found[name] = one.tally
        waiting.append((one, round(args.kills * share / sum(shares.values()))))
    for name in itertools.islice(itertools.cycle([n for n in names if n in COMMANDS]), args.full):
        waiting.append((next(one for one, _ in waiting if one.tally is found[name]), -1))
    while waiting and time.monotonic() < end:
        one, wanted = waiting.pop(0)
        if wanted < 0 and isinstance(one, Campaign):
            one.fill()
        elif one.tally.kills < wanted:
            one.kill(min(MOST, wanted - one.tally.kills))
            waiting.append((one, wanted))
        print({n: (t.kills, t.full_disks) for n, t in found.items()}, file=sys.stderr, flush=True)
    return found


def import_everything() -> None:
    """What commands import, once, before they are forked; pictures are left out."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # they would take most of the time
    for module in ("cli job measure_job compare_job drift_job serve_app report").split():
        importlib.import_module(f"dart_llm.{module}")
    torch.set_num_threads(1)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=100, help="SIGKILLs, over all commands")
    made.add_argument("--full", type=int, default=10, help="full disks, over all but serve")
    made.add_argument("--seed", type=int, default=0, help="of the moments")
    made.add_argument("--commands", default=",".join(SHARES), help="which, with commas")
    made.add_argument("--minutes", type=float, default=30, help="no new round afterwards")
    args = made.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_place(Path(folder))
        found = campaign(Path(folder), args.commands.split(","), args)
    print("| command | SIGKILLs | full disks | ran to the end | kept | lost | differing files |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, tally in found.items():
        row = (tally.kills, tally.full_disks, tally.runs_to_the_end, tally.kept)
        print(
            f"| `{name}` | {' | '.join(map(str, row))} | {len(tally.lost)} | {len(tally.differ)} |"
        )
    commands = {name: asdict(tally) for name, tally in found.items()}
    print(save(args.out or "kills", None, {"commands": commands}))


if __name__ == "__main__":
    main()
