"""Loading from a hub that answers 401, 403 and 404, cuts downloads, or is not there at all."""

import hashlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fake_hub
from checkpoints import facts, write_folder
from dart_llm.models.bundled import MODEL_HUB_ID as HUB_ID
from fake_hub import ALWAYS, COMMIT, Repository, repository, serve

TOKEN = "hf_fakeTokenThatMustStaySecret123"
GATED = (
    "{model} is gated: accept the licence on {hub}/{model}, then run `hf auth login` or set "
    "HF_TOKEN"
)
NOT_THERE = (
    "the hub has no model {model!r} that you may read; check the name, and if it is private run "
    "`hf auth login` or set HF_TOKEN"
)
CASES = {
    "tiny/llama": "",
    f"tiny/llama@{COMMIT}": "",
    "tiny/cut-once": "",
    "smollm2-135m": "",
    "tiny/huge": "",
    "meta/gated": GATED,
    "meta/gated-401": GATED,
    "meta/forbidden": GATED,
    "meta/private": NOT_THERE,
    "nobody/nothing": NOT_THERE,
    "meta/bad-token": "the hub refused the access token while loading {model}; run `hf auth login` "
    "again or correct HF_TOKEN",
    "tiny/llama@v9": "{model} has no revision 'v9' on the hub; check --revision",
    "tiny/cut-always": "the download of {model} was cut off; run the same command again, it "
    "continues where it stopped",
    "tiny/down": "the hub answered 503 while loading {model}; try again later, or give a local "
    "folder, a .gguf file or smollm2-135m",
    "tiny/only-gguf": "{model} holds no transformers checkpoint (no config.json); if it holds a "
    ".gguf file, download that and give its path",
}
"""Model and revision, and the sentence in which loading it ends."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The client's answers, all that it printed, the hub, the folder it serves, and a home."""
    folder = write_folder(tmp_path_factory.mktemp("llama"))
    home = tmp_path_factory.mktemp("home")
    bad_token = "Invalid credentials in Authorization header"
    repositories = {
        **dict.fromkeys(("tiny/llama", HUB_ID), repository(folder)),
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
    }
    with serve(repositories) as hub:
        answers, everything = run_client(hub.endpoint, home, *CASES)
        given = {"answers": answers, "everything": everything, "folder": folder, "home": home}
        yield SimpleNamespace(**given, hub=hub)


def run_client(endpoint, home, *cases):
    """Answers of one client process, and all that it printed or logged."""
    said = f"""
        HF_HUB_OFFLINE=0 HF_HUB_DISABLE_TELEMETRY=1 DISABLE_SAFETENSORS_CONVERSION=1
        HF_HUB_DOWNLOAD_TIMEOUT=5 HF_HUB_ETAG_TIMEOUT=5 HF_ENDPOINT={endpoint}
        HF_HOME={home} HF_TOKEN={TOKEN} XDG_CACHE_HOME={home / "cache"} DART_CACHE=
        NO_PROXY=127.0.0.1 PIP_NO_INDEX=1 PIP_FIND_LINKS=
    """
    environment = {**os.environ, **dict(one.split("=", 1) for one in said.split())}
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
    names = ("tiny/llama", f"tiny/llama@{COMMIT}", "smollm2-135m")
    good, again, default = (outcome.answers[name] for name in names)
    assert expected == good["logits"] == again["logits"] == default["logits"]
    weights = (outcome.folder / "model.safetensors").read_bytes()
    known = {"name": "tiny/llama", "source": "hub", "revision": COMMIT}
    known["sha256"] = hashlib.sha256(weights).hexdigest()
    found = good["facts"]
    assert found == facts(**known, path=found["path"], parameters=found["parameters"])
    loading = "loading tiny/llama"
    assert good["said"] == [f"downloading tiny/llama: {len(weights) / 1e6:.1f} MB", loading]
    # the second time from the cache; the default from the hub where pip has nothing, and says so
    assert again["said"] == [loading]
    assert outcome.hub.downloads["tiny/llama/model.safetensors"] == 1
    known = {"name": HUB_ID, "source": "hub", "revision": COMMIT, "file_quantisation": "none"}
    assert default["facts"].items() >= known.items()
    assert f"smollm2-135m: loaded the hub's original {HUB_ID} instead" in outcome.everything


def test_failures_are_one_sentence(outcome):
    for case, sentence in CASES.items():
        if sentence:
            expected = sentence.format(model=case.partition("@")[0], hub=outcome.hub.endpoint)
            assert outcome.answers[case]["error"] == expected
    pattern = (
        r"the download of tiny/huge needs 10000000\.0 GB on disk and only [\d.]+ [MG]B are free "
        r"in .+; free some space or move the cache with --cache-dir or DART_CACHE"
    )
    assert re.fullmatch(pattern, outcome.answers["tiny/huge"]["error"])
    assert "tiny/huge/model.safetensors" not in outcome.hub.downloads


def test_a_cut_download_is_taken_up_again(outcome):
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
    assert absent["error"] == (
        f"the hub at {nowhere} could not be reached to load tiny/cut-always; check the network, "
        "or give a local folder, a .gguf file or smollm2-135m"
    )
    assert absent["seconds"] < 10
