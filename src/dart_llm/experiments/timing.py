"""Timed repetitions of decoding: with greedy ``generate`` (each step is timed) or llama-bench."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dart_llm.data import texts
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.calls import cache_of
from dart_llm.models.gguf_file import read_gguf
from dart_llm.pruning.records import RunReport
from dart_llm.session.run import Run

WARM = 2
"""Number of warm-up tokens at the start of a repetition, which are not timed."""

Make = Callable[[], Run | None]
"""A function that makes a run (not attached), or returns None for the untouched model."""

Sample = dict[str, Any]
"""The times of a repetition and its accounting (sparsity achieved, share of dense tokens, bytes
read, re-masks), as JSON-serialisable data; see ``repetition``."""


def repetition(model: Any, ids: Tensor, tokens: int, make: Make) -> Sample:
    """Run ``generate`` once; return the times in seconds and the accounting.

    ``first_token_s`` is the time to process the prompt ids [1, P] and select the first token.
    ``steps_s`` has one time per decode step: ``WARM`` steps run untimed, then ``tokens`` steps are
    timed.  Each time includes token selection and the overhead of ``generate``.  ``make()`` returns
    a run that is not attached, or None; without a run there is no accounting.
    """
    run = make()
    with run or contextlib.nullcontext():
        return _generate(model, ids, tokens, run)


class _Clock(BaseStreamer):
    """A streamer that records when ``generate`` passes it the prompt and each token."""

    def __init__(self, run: Run | None) -> None:
        self.run = run
        self.times: list[float] = []
        self.warm: RunReport | None = None

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        steps = len(self.times) - 2  # the first two calls pass the prompt and the first token
        if self.run is not None and steps == WARM:
            self.warm = self.run.report()
            self.times[-1] = time.perf_counter()

    def end(self) -> None:
        return


def _generate(model: Any, ids: Tensor, tokens: int, run: Run | None) -> Sample:
    clock = _Clock(run)
    model.generate(
        ids,
        max_new_tokens=1 + WARM + tokens,
        do_sample=False,
        eos_token_id=None,  # so that all repetitions have equally many tokens
        streamer=clock,
    )
    seconds = [after - before for before, after in pairwise(clock.times)]
    sample: Sample = {"first_token_s": seconds[0], "steps_s": seconds[1 + WARM :]}
    if run is not None and clock.warm is not None:
        sample |= _timed_accounting(clock.warm, run.report())
    return sample


def _timed_accounting(warm: RunReport, end: RunReport) -> Sample:
    """Accounting of only the timed tokens."""
    tokens_end, tokens_warm = end.decoded_tokens, warm.decoded_tokens
    names = ("achieved_sparsity", "dense_token_share", "ffn_bytes_share", "proxy_bytes_share")
    means = {
        name: timed_mean(getattr(end, name), tokens_end, getattr(warm, name), tokens_warm)
        for name in names
    }
    if end.head is not None and warm.head is not None:
        share_end, share_warm = end.head.read(tokens_end), warm.head.read(tokens_warm)
        share = timed_mean(share_end, tokens_end, share_warm, tokens_warm)
        means["head_bytes_share"] = share
    remasks = end.remasks - warm.remasks
    return {**means, "remasks": remasks, "extra_memory_bytes": end.extra_memory_bytes}


def timed_mean(end: float, tokens_end: int, warm: float, tokens_warm: int) -> float:
    """The mean of the timed tokens; ``end``: mean of all tokens; ``warm``: of warm-up tokens."""
    timed = tokens_end - tokens_warm
    return (end * tokens_end - warm * tokens_warm) / timed if timed else 0.0


def token_seconds(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean seconds per timed token, for each repetition."""
    return [statistics.fmean(sample["steps_s"]) for sample in samples]


def shuffled(labels: Sequence[str], seed: int, number: int) -> list[str]:
    """The order of ``labels`` in repetition ``number``: random, determined by seed and number."""
    return random.Random(f"{seed} {number}").sample(list(labels), len(labels))


def prompt_ids(model: Any, tokenizer: Any, length: int) -> Tensor:
    """Prompt ids [1, length] int64 on the model's device, from the embedded texts (repeated)."""
    text = tokenizer(texts.all_text(), return_tensors="pt", verbose=False).input_ids
    ids: Tensor = text.repeat(1, -(-length // text.shape[1]))[:, :length]
    return ids.to(model.device)


@torch.inference_mode()
def cache_bytes(model: Any, ids: Tensor) -> float:
    """Bytes of the KV cache per position, summed over all layers, measured with ids [1, T]."""
    cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))
    length = int(cache.get_seq_length())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / length


# llama.cpp's ``llama-bench``, run on a GGUF file.

LLAMA_CPP = "llama.cpp"

PROGRAM, VARIABLE = "llama-bench", "LLAMA_BENCH"

REFERENCE_FLAGS = {"": (), ", -fa 0": ("-fa", "0")}
"""Flags of llama-bench by the end of the row's label: its defaults, and without flash attention
(faster on some CPUs)."""

THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_")
"""Prefixes of environment variables for PyTorch's threads; llama.cpp runs without them."""


def find_bench() -> str | None:
    """The path of llama-bench, from ``LLAMA_BENCH`` or PATH; None if it is not found."""
    return shutil.which(os.environ.get(VARIABLE) or PROGRAM)


def require_bench() -> str:
    """The path of llama-bench; raises ``ConfigError`` if it is not found."""
    if bench := find_bench():
        return bench
    path = os.environ.get(VARIABLE)
    where = f"{VARIABLE}={path} is not a program" if path else f"{PROGRAM} is not on PATH"
    raise ConfigError(
        f"--reference {LLAMA_CPP} needs llama.cpp's {PROGRAM}, but {where}: build llama.cpp "
        f"and set {VARIABLE} to its {PROGRAM}"
    )


@dataclass(frozen=True)
class ReferenceFile:
    """A GGUF file that llama-bench runs.  ``kind``: the file's quantisation, e.g. Q4_K_M.

    ``bytes``: the bytes read per decoded token (all tensors, except an input embedding that is
    separate from the output head).  ``flags``: further flags of llama-bench.
    """

    path: Path
    kind: str
    bytes: int
    flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path) -> ReferenceFile:
        """Read a file's metadata; raises ``LoadError`` if it is not a GGUF file."""
        file = read_gguf(path)
        sizes = {name: tensor.size for name, tensor in file.tensors.items()}
        embedding = sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0
        return cls(path, file.quantisation, sum(sizes.values()) - embedding)


def reference_repetition(
    bench: str, file: ReferenceFile, threads: int, prompt: int, tokens: int
) -> Sample:
    """Like ``repetition``, but with llama-bench, which reports only the mean time per step."""
    (prefill,) = _run(bench, file.path, threads, "-p", str(prompt), "-n", "0", *file.flags)
    generated = decode_row(bench, file.path, threads, tokens, prompt + WARM, *file.flags)
    steps = [generated["avg_ns"] / 1e9 / tokens]
    build = {name: generated.get(name) for name in ("build_commit", "build_number", "backends")}
    return {"first_token_s": prefill["avg_ns"] / 1e9, "steps_s": steps, "build": build}


def decode_row(
    bench: str, file: Path, threads: int, tokens: int, depth: int, *flags: str
) -> dict[str, Any]:
    """The result row of llama-bench for ``tokens`` tokens after a context of ``depth`` tokens.

    ``avg_ns`` is the time for all ``tokens`` tokens together; there is only one repetition.
    """
    return _run(bench, file, threads, "-p", "0", "-n", str(tokens), "-d", str(depth), *flags)[0]


def _run(bench: str, file: Path, threads: int, *flags: str) -> list[dict[str, Any]]:
    """llama-bench's report, a list of result rows; raises ``DartError`` if the program fails."""
    command = [bench, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json", *flags]
    environment = program_environment(os.environ, bench)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise DartError(f"{PROGRAM} at {bench} could not be run: {error}") from error
    try:
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        if rows and all("avg_ns" in row for row in rows):
            return list(rows)
    except (ValueError, TypeError):  # not JSON, or not a list of rows
        pass
    output = " ".join((done.stderr.strip() or done.stdout.strip() or "no output").split())
    raise DartError(
        f"{PROGRAM} failed on {file.name} (exit code {done.returncode}): {output[-300:]}"
    )


def program_environment(environment: Mapping[str, str], bench: str) -> dict[str, str]:
    """The environment without thread variables, and with the program's folder as library path."""
    kept = {n: value for n, value in environment.items() if not n.startswith(THREAD_VARIABLES)}
    folders = [str(Path(bench).resolve().parent), kept.get("LD_LIBRARY_PATH", "")]
    return {**kept, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}
