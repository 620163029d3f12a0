"""Commands that are killed at random moments, and started again: what is lost, what differs?

Each command runs once to its end, undisturbed.  Then it is killed with SIGKILL at a random moment,
again and again, and started anew until it ends.  After every kill the parts and cells that were
finished must be the ones of the next look; at the end there must be one folder, with every file of
the undisturbed run and the same contents.  Left out are times and the process's number; of logs and
pages, which hold times, it is only asked whether they are there.  Of a run killed after all was
written the file of its lock may stay, which no longer locks anything.  Moments are spread over the
whole life of a command.  A part of the runs meets a full disk on a small file system first
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

from dart_llm.experiments.folder_lock import LOCK

VOLATILE = {"seconds", "phases", "timing", "started", "finished", "date", "speed_up", "process"}
"""Keys of results whose values are times, or a process's number."""
THERE = {".log", ".html"}
"""Endings of files that hold times between words: these must be there."""
LONGEST = 300.0
"""Seconds after which a run hangs."""
MOST = 4
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
        from dart_llm.cli.app import run

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
    """The files of the one folder, without times."""
    folder, *more = sorted(results.glob("*/*"))
    assert not more, f"more than one folder or file: {[folder, *more]}"
    status = json.loads((folder / "config.json").read_text())["status"]
    assert status == "complete", f"{folder} is {status}"
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix().replace(folder.name, "TIME")
        if path.suffix in THERE or path.name == "timing.json":
            found[name] = path.stat().st_size > 0
        elif path.suffix in (".json", ".jsonl"):
            texts = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [still(json.loads(text)) for text in texts if text]
        elif path.is_file() and path.name != LOCK:
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
    moments: list[float] = field(default_factory=list)
    """When kills came, as shares of the time that the command takes undisturbed."""
    lost: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)


class Campaign:
    """One command in a folder of its own, killed and started again."""

    def __init__(self, name: str, place: Path, chance: random.Random) -> None:
        self.name, self.chance, self.tally = name, chance, Tally()
        self.disk, self.log, self.moments = place / name, place / f"{name}.log", spread(chance)
        self.results = self.disk / "results"
        self.disk.mkdir()
        self.expected, _ = self.undisturbed()
        again, self.seconds = self.undisturbed()  # the first one waits for files and caches
        assert again == self.expected, f"two undisturbed runs of {name} differ"

    def undisturbed(self) -> tuple[dict[str, Any], float]:
        """What a run of its own leaves, and how many seconds it takes."""
        began = time.monotonic()
        self.to_the_end()
        seconds = time.monotonic() - began
        found = outcome(self.results)
        shutil.rmtree(self.results)
        return found, seconds

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
            child, moment = self.start(), next(self.moments)
            if wait(child, moment * self.seconds) is not None:
                break
            kill(child)
            self.tally.kills += 1
            self.tally.moments.append(round(moment, 3))
            if complete(self.results):
                break
            seen = self.look(seen)
        self.end(seen)

    def fill(self) -> bool:
        """Let the disk be full at a random moment, make room and go on; whether the run met it."""
        with small_disk(self.disk) as mounted:
            child = self.start(None if mounted else self.chance.randint(200, 20_000))
            code = wait(child, next(self.moments) * self.seconds)
            filler = self.disk / "filler"
            if mounted:
                fill_up(filler)
            code = wait(child, LONGEST) if code is None else code
            filler.unlink(missing_ok=True)
            self.tally.full_disks += code != 0
            self.end(self.look({}))
        return code != 0

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
        self.moments, self.tally, self.log = spread(chance), Tally(), place / "serve.log"
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
            share = next(self.moments)
            moment = time.monotonic() + share * self.seconds
            with contextlib.suppress(OSError):
                ask(port, moment)
            wait(child, max(0.0, moment - time.monotonic()))
            kill(child)
            self.tally.kills += 1
            self.tally.moments.append(round(share, 3))
        child, port = self.start()
        self.tally.differ += [] if ask(port) == self.expected else ["answer"]
        self.tally.runs_to_the_end += 1
        kill(child)
        self.tally.kills += 1
        self.tally.moments.append(1.0)


def spread(chance: random.Random) -> Iterator[float]:
    """Random shares of a life: of every ten, one in each tenth."""
    while True:
        yield from ((tenth + chance.random()) / 10 for tenth in chance.sample(range(10), 10))


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
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 64 MiB at ``folder``; False where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


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
            waiting += [] if one.fill() else [(one, wanted)]
        elif one.tally.kills < wanted:
            one.kill(min(MOST, wanted - one.tally.kills))
            waiting.append((one, wanted))
        print({n: (t.kills, t.full_disks) for n, t in found.items()}, file=sys.stderr, flush=True)
    return found


def import_everything() -> None:
    """What commands import, once, before they are forked; pictures are left out."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # they would take most of the time
    studies = "generate.study evaluate.study sweep.study drift.study generate.report drift.report"
    others = "cli.app server.app experiments.stats experiments.comparison_report"
    for module in (*(f"studies.{name}" for name in studies.split()), *others.split()):
        importlib.import_module(f"dart_llm.{module}")
    importlib.import_module("scipy.stats")
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
