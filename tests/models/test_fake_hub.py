"""Loading from a hub that answers 401, 403 and 404, cuts downloads, or is not there at all."""

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fake_hub
from checkpoints import write_folder
from fake_hub import ALWAYS, COMMIT, Repository, repository, serve

TOKEN = "hf_fakeTokenThatMustStaySecret123"
GOOD = ("tiny/llama", f"tiny/llama@{COMMIT}", "tiny/cut-once")
FAILS = ("meta/gated", "meta/gated-401", "meta/forbidden", "meta/private", "nobody/nothing")
FAILS += ("meta/bad-token", "tiny/llama@v9", "tiny/cut-always", "tiny/down", "tiny/only-gguf")
"""Model and revision."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The client's answers, all that it printed, the hub, the folder it serves, and a home."""
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
        "tiny/down": Repository(status=503, api_status=503),
        "tiny/only-gguf": Repository({"model.gguf": b"GGUF"}),
    }
    with serve(repositories) as hub:
        answers, everything = run_client(hub.endpoint, home, *GOOD, *FAILS)
        given = {"answers": answers, "everything": everything, "folder": folder, "home": home}
        yield SimpleNamespace(**given, hub=hub)


def run_client(endpoint, home, *cases):
    settings = f"""
        HF_HUB_OFFLINE=0 HF_HUB_DISABLE_TELEMETRY=1 DISABLE_SAFETENSORS_CONVERSION=1
        HF_HUB_DOWNLOAD_TIMEOUT=5 HF_HUB_ETAG_TIMEOUT=5 HF_ENDPOINT={endpoint}
        HF_HOME={home} HF_TOKEN={TOKEN} XDG_CACHE_HOME={home / "cache"} DART_CACHE=
        NO_PROXY=127.0.0.1 PIP_NO_INDEX=1 PIP_FIND_LINKS=
    """
    environment = {**os.environ, **dict(entry.split("=", 1) for entry in settings.split())}
    command = [sys.executable, fake_hub.__file__, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)
    return printed["answers"], done.stdout + done.stderr + printed["log"]


def test_a_hub_model_loads_as_from_pretrained_does(outcome):
    reference = AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(outcome.folder)("tiny", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = reference(ids).logits[0, -1].float().tolist()
    good, again = (outcome.answers[name] for name in GOOD[:2])
    assert expected == good["logits"] == again["logits"]
    weights = (outcome.folder / "model.safetensors").read_bytes()
    stated = {"name": "tiny/llama", "source": "hub", "revision": COMMIT}
    stated["sha256"] = hashlib.sha256(weights).hexdigest()
    assert good["facts"].items() >= stated.items()
    size, loading = f"{len(weights) / 1e6:.1f} MB", "loading tiny/llama"
    assert good["said"] == [f"downloading tiny/llama: {size}", loading]
    assert again["said"] == [f"{loading}: {size} in bfloat16"]  # from the cache
    assert outcome.hub.downloads["tiny/llama/model.safetensors"] == 1


def test_failures_are_one_sentence(outcome, snapshot):
    """And a download that is cut off once is resumed."""
    hub = outcome.hub.endpoint
    assert {one: outcome.answers[one]["error"].replace(hub, "HUB") for one in FAILS} == snapshot
    assert outcome.answers["tiny/cut-once"]["logits"] == outcome.answers["tiny/llama"]["logits"]
    assert outcome.hub.downloads["tiny/cut-once/model.safetensors"] == 2
    assert 2 <= outcome.hub.downloads["tiny/cut-always/model.safetensors"] <= 10


def test_the_token_is_sent_to_the_hub_and_shown_nowhere(outcome):
    assert f"Bearer {TOKEN}" in outcome.hub.authorizations
    assert TOKEN not in outcome.everything
    for path in outcome.home.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert TOKEN.encode() not in path.read_bytes()


def test_without_a_hub_the_cache_still_serves_and_the_rest_is_one_sentence(outcome):
    nowhere = "http://127.0.0.1:9"
    answers, _ = run_client(nowhere, outcome.home, "tiny/llama", "tiny/cut-always")
    cached, absent = answers.values()
    assert cached["error"] is None
    assert cached["logits"] == outcome.answers["tiny/llama"]["logits"]
    assert absent["error"].startswith(f"the hub at {nowhere} could not be reached to load tiny/cut")
    assert absent["seconds"] < 10
