"""Loading from a hub that answers 401, 403 and 404, cuts downloads, or is not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import write_folder
from dart_llm.models.bundled import MODEL_HUB_ID as HUB_ID
from fake_hub import ALWAYS, COMMIT, FakeHub, Repository, repository, serve

CLIENT = Path(__file__).parents[1] / "helpers" / "hub_client.py"
TOKEN = "hf_fakeTokenThatMustStaySecret123"
CASES = {
    "good": ("tiny/llama", None),
    "again": ("tiny/llama", COMMIT),
    "gated with a token": ("meta/gated", None),
    "gated without": ("meta/gated-401", None),
    "forbidden": ("meta/forbidden", None),
    "private": ("meta/private", None),
    "bad token": ("meta/bad-token", None),
    "missing": ("nobody/nothing", None),
    "missing revision": ("tiny/llama", "v9"),
    "cut once": ("tiny/cut-once", None),
    "cut always": ("tiny/cut-always", None),
    "too large": ("tiny/huge", None),
    "down": ("tiny/down", None),
    "no config": ("tiny/only-gguf", None),
    "default": ("smollm2-135m", None),
}


@dataclass
class Outcome:
    """What the client printed, the hub it talked to, and the folder the hub serves."""

    answers: dict[str, dict[str, Any]]
    everything: str
    hub: FakeHub
    folder: Path
    home: Path

    def error(self, case: str) -> str:
        """The one sentence that a case ended in."""
        text = self.answers[case]["error"]
        assert isinstance(text, str), self.answers[case]
        assert "\n" not in text
        return text


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = write_folder(tmp_path_factory.mktemp("llama"))
    home = tmp_path_factory.mktemp("home")
    bad_token = "Invalid credentials in Authorization header"
    repositories = {
        "tiny/llama": repository(folder),
        "meta/gated": repository(folder, status=403, code="GatedRepo"),
        "meta/gated-401": repository(folder, status=401, code="GatedRepo"),
        "meta/forbidden": repository(folder, status=403),
        "meta/private": Repository(status=401, api_status=401),
        "meta/bad-token": Repository(status=401, api_status=401, message=bad_token),
        "tiny/cut-once": repository(folder, cuts=1),
        "tiny/cut-always": repository(folder, cuts=ALWAYS),
        "tiny/huge": repository(folder, claimed_size=10**16),
        "tiny/down": Repository(status=503, api_status=503),
        "tiny/only-gguf": Repository({"model.gguf": b"GGUF"}),
        HUB_ID: repository(folder),
    }
    with serve(repositories) as hub:
        answers, everything = run_client(hub.endpoint, home, list(CASES.values()))
        yield Outcome(dict(zip(CASES, answers, strict=True)), everything, hub, folder, home)


def run_client(
    endpoint: str, home: Path, cases: list[tuple[str, str | None]]
) -> tuple[list[dict[str, Any]], str]:
    """Answers of one client process, and all that it printed or logged."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(home / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    environment.pop("DART_CACHE", None)
    asked = json.dumps([{"model": model, "revision": revision} for model, revision in cases])
    done = subprocess.run(
        [sys.executable, str(CLIENT), asked],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)
    return printed["answers"], done.stdout + done.stderr + printed["log"]


def test_a_hub_model_loads_as_from_pretrained_does(outcome: Outcome) -> None:
    reference = AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(outcome.folder)("tiny", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = reference(ids).logits[0, -1].float().tolist()
    assert outcome.answers["good"]["logits"] == expected
    weights = (outcome.folder / "model.safetensors").read_bytes()
    facts = outcome.answers["good"]["facts"]
    assert facts["name"] == "tiny/llama"
    assert facts["source"] == "hub"
    assert facts["revision"] == COMMIT
    assert facts["sha256"] == hashlib.sha256(weights).hexdigest()
    assert facts["dtype"] == "bfloat16"
    assert facts["file_quantisation"] == "none"
    assert outcome.answers["good"]["said"] == [
        f"downloading tiny/llama: {len(weights) / 1e6:.1f} MB",
        "loading tiny/llama",
    ]


def test_a_second_load_takes_the_weights_from_the_cache(outcome: Outcome) -> None:
    assert outcome.answers["again"]["logits"] == outcome.answers["good"]["logits"]
    assert outcome.answers["again"]["said"] == ["loading tiny/llama"]
    assert outcome.hub.downloads["tiny/llama/model.safetensors"] == 1


GATED = (
    "{model} is gated: accept the licence on {hub}/{model}, then run `hf auth login` or set "
    "HF_TOKEN"
)
NOT_THERE = (
    "the hub has no model {model!r} that you may read; check the name, and if it is private run "
    "`hf auth login` or set HF_TOKEN"
)
SENTENCES = {
    "gated with a token": GATED,
    "gated without": GATED,
    "forbidden": GATED,
    "private": NOT_THERE,
    "missing": NOT_THERE,
    "bad token": "the hub refused the access token while loading {model}; run `hf auth login` "
    "again or correct HF_TOKEN",
    "missing revision": "{model} has no revision 'v9' on the hub; check --revision",
    "cut always": "the download of {model} was cut off; run the same command again, it continues "
    "where it stopped",
    "down": "the hub answered 503 while loading {model}; try again later, or give a local folder, "
    "a .gguf file or smollm2-135m",
    "no config": "{model} holds no transformers checkpoint (no config.json); if it holds a .gguf "
    "file, download that and give its path",
}


@pytest.mark.parametrize("case", SENTENCES)
def test_a_failure_is_one_sentence(outcome: Outcome, case: str) -> None:
    expected = SENTENCES[case].format(model=CASES[case][0], hub=outcome.hub.endpoint)
    assert outcome.error(case) == expected


def test_a_cut_download_is_taken_up_again(outcome: Outcome) -> None:
    assert outcome.answers["cut once"]["logits"] == outcome.answers["good"]["logits"]
    assert outcome.hub.downloads["tiny/cut-once/model.safetensors"] == 2
    assert 2 <= outcome.hub.downloads["tiny/cut-always/model.safetensors"] <= 10


def test_a_download_larger_than_the_disk_does_not_start(outcome: Outcome) -> None:
    pattern = (
        r"the download of tiny/huge needs 10000000\.0 GB on disk and only [\d.]+ [MG]B are free "
        r"in .+; free some space or move the cache with --cache-dir or DART_CACHE"
    )
    assert re.fullmatch(pattern, outcome.error("too large"))
    assert "tiny/huge/model.safetensors" not in outcome.hub.downloads


def test_the_default_comes_from_the_hub_where_pip_has_nothing_and_says_so(
    outcome: Outcome,
) -> None:
    assert outcome.answers["default"]["logits"] == outcome.answers["good"]["logits"]
    facts = outcome.answers["default"]["facts"]
    assert (facts["name"], facts["source"], facts["revision"]) == (HUB_ID, "hub", COMMIT)
    assert facts["file_quantisation"] == "none"
    assert f"smollm2-135m: loaded the hub's original {HUB_ID} instead" in outcome.everything


def test_the_token_is_sent_to_the_hub_and_shown_nowhere(outcome: Outcome) -> None:
    assert f"Bearer {TOKEN}" in outcome.hub.authorizations
    assert TOKEN not in outcome.everything
    for path in outcome.home.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert TOKEN.encode() not in path.read_bytes()


def test_without_a_hub_the_cache_still_serves_and_the_rest_is_one_sentence(
    outcome: Outcome,
) -> None:
    nowhere = "http://127.0.0.1:9"
    asked: list[tuple[str, str | None]] = [("tiny/llama", None), ("tiny/cut-always", None)]
    (cached, absent), _ = run_client(nowhere, outcome.home, asked)
    assert cached["error"] is None
    assert cached["logits"] == outcome.answers["good"]["logits"]
    assert absent["error"] == (
        f"the hub at {nowhere} could not be reached to load tiny/cut-always; check the network, "
        "or give a local folder, a .gguf file or smollm2-135m"
    )
    assert absent["seconds"] < 10
