"""``--save-activations``: kept values are those of our own hooks; the model is restored."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dart_llm.errors import ConfigError, DartError, ResultsError
from dart_llm.experiments.artifacts import Saver
from dart_llm.models.capture import Recording
from dart_llm.models.capture_spec import Wanted, parse_layers, parse_tensors, parse_tokens
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from dart_llm.studies.generate.settings import RunSettings
from lm_cases import call, place
from observed_cases import Recorder, decoder_layers, stream
from steps import Same, decode, new_cache, shared_model, step
from tiny import HIDDEN, LAYERS, NAMES, WIDTH, tokens

EVERY = ("u", "x", "z", "r")
PROMPT, LENGTH = 9, 30


def record(model: Any, ids: Tensor, wanted: Wanted) -> dict[str, Tensor]:
    with Recording(model, wanted) as recording:
        decode(model, ids, PROMPT)
    return recording.tensors()


@pytest.mark.parametrize("name", NAMES)
def test_kept_values_are_those_of_direct_hooks(name: str) -> None:
    """Prompt and decode tokens of two layers, from the middle of the prompt on."""
    model, ids = shared_model(name), tokens(1, LENGTH, seed=6)
    outside = Recorder(model)
    if name == "opt-postnorm":
        for index, layer in enumerate(decoder_layers(model)):
            outside._before(layer.fc1, index, "fc1")
    try:
        found = record(model, ids, Wanted((1, 3), 4, 20, EVERY))
    finally:
        for handle in outside.handles:
            handle.remove()
    assert found.keys() == {"token_ids"} | {f"layer{n}.{t}" for n in (1, 3) for t in EVERY}
    assert torch.equal(found["token_ids"], ids[0, 4:20].int())
    for layer in (1, 3):
        wanted = {key: outside.get(layer, key) for key in ("u", "z", "r")}
        for key, value in wanted.items():
            assert torch.equal(found[f"layer{layer}.{key}"].double(), value[4:20]), key
        x = stream(outside, name, layer)[4:20]
        torch.testing.assert_close(found[f"layer{layer}.x"].double(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("start", "end", "kept"), [(0, None, 30), (28, 400, 2), (0, 1, 1)])
def test_ranges_of_tokens(start: int, end: int | None, kept: int) -> None:
    model, ids = shared_model(), tokens(1, LENGTH, seed=6)
    wanted = Wanted((0,), start, end)
    found = record(model, ids, wanted)["layer0.u"]
    whole = record(model, ids, Wanted((0,)))["layer0.u"]
    assert found.shape == (kept, WIDTH) and wanted.tokens(LENGTH) == kept
    assert torch.equal(found, whole[start:end])


def test_a_range_that_no_token_reaches_is_empty() -> None:
    assert record(shared_model(), tokens(1, LENGTH), Wanted((0,), 30)) == {}
    assert Wanted((0,), 30).tokens(LENGTH) == 0


def test_rolled_back_tokens_are_forgotten_and_a_new_sequence_starts_anew() -> None:
    model, ids, other = shared_model(), tokens(1, 20, seed=1), tokens(1, 20, seed=2)
    with Recording(model, Wanted((2,), 3)) as recording:
        step(model, tokens(1, 7, seed=9), new_cache(model))
        cache = new_cache(model)
        step(model, ids, cache)
        cache.crop(-8)
        step(model, other[:, :6], cache)
    found = recording.tensors()
    joined = torch.cat([ids[:, :12], other[:, :6]], 1)
    plain = record(model, joined, Wanted((2,), 3))
    assert torch.equal(found["token_ids"], joined[0, 3:].int())
    torch.testing.assert_close(found["layer2.u"], plain["layer2.u"], rtol=1e-4, atol=1e-5)


def test_pruned_tokens_under_the_masked_executor() -> None:
    """u is 0 where a neuron is removed, and z is what the kept ones give."""
    model, ids = shared_model(), tokens(1, LENGTH, seed=3)
    with prune(model, "griffin", sparsity=0.5, executor="masked") as run:
        found = record(model, ids, Wanted(tuple(range(LAYERS)), tensors=("u", "z")))
        kept = run.masks()
    for layer, block in enumerate(describe(model).blocks):
        u, z = found[f"layer{layer}.u"], found[f"layer{layer}.z"]
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[kept[layer]] = False
        assert bool((u[PROMPT:, gone] == 0).all()) and bool((u[:PROMPT, gone] != 0).all())
        torch.testing.assert_close(z, u @ block.down.weight.T)


def test_what_the_compact_executor_skips_cannot_be_kept() -> None:
    model, ids = shared_model(), tokens(1, LENGTH, seed=3)
    with (
        Same(model),
        pytest.raises(ConfigError, match=r"layer 0 were not computed: .* use the masked one"),
        prune(model, "griffin", sparsity=0.5, executor="compact"),
    ):
        record(model, ids, Wanted((0,)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "opt"])
def test_the_model_is_exactly_what_it_was(name: str) -> None:
    model = shared_model(name)
    with Same(model):
        record(model, tokens(1, 12), Wanted((0, 1), tensors=EVERY))
    with Same(model), pytest.raises(RuntimeError), Recording(model, Wanted((0,))):
        raise RuntimeError
    with Same(model), pytest.raises(ConfigError, match="one row at a time, not of 2"):
        record(model, tokens(2, 12), Wanted((0,)))


def test_recording_changes_no_output() -> None:
    model, ids = shared_model("gemma3"), tokens(1, LENGTH)
    plain = decode(model, ids, PROMPT)
    with Recording(model, Wanted((0, 3), tensors=EVERY)):
        assert torch.equal(decode(model, ids, PROMPT), plain)


def test_specifications() -> None:
    assert parse_layers("all") is None and parse_layers("all", 3) == (0, 1, 2)
    assert parse_layers("5,0-2, 1", 6) == (0, 1, 2, 5)
    assert parse_tokens("0:256") == (0, 256) == parse_tokens(":256")
    assert parse_tokens(" 128: ") == (128, None) and parse_tokens(":") == (0, None)
    assert parse_tensors("x, u,x") == ("x", "u")
    assert Wanted((0,), 4, None).range == "4:" and Wanted((0,), 4, 9).range == "4:9"


@pytest.mark.parametrize(
    ("read", "text", "problem"),
    [
        (parse_layers, "5-2", "is not a layer or a range"),
        (parse_layers, "", "is not a layer or a range"),
        (lambda text: parse_layers(text, 4), "2-4", "layer 4 is out of range: .* 4 layers"),
        (parse_tokens, "256", '"256" is not a range of tokens'),
        (parse_tokens, "9:9", "is not a range of tokens"),
        (parse_tensors, "u,w", '"w" is no activation: choose among u, x, z, r'),
    ],
)
def test_bad_specifications(read: Any, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_announced_size_is_that_of_the_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    model, ids = shared_model(dtype=dtype), tokens(1, LENGTH)
    saver = Saver(model, Wanted((0, 2), 5, 25, ("u", "x")), tmp_path, LENGTH)
    said: list[str] = []
    saver.announce(2, said.append)
    with saver.recording("a", "héllo"):
        decode(model, ids, PROMPT)
    path = tmp_path / "activations-a.safetensors"
    found = load_file(path)
    assert sum(t.numel() * t.element_size() for t in found.values()) == saver.nbytes
    assert saver.nbytes == 20 * (2 * (WIDTH + HIDDEN) * dtype.itemsize + 4)
    assert found["layer2.u"].dtype == dtype
    assert said[0].startswith("--save-activations writes up to ")
    assert "u, x of 2 layers, tokens 5:25" in said[0]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["text_sha256"] == hashlib.sha256("héllo".encode()).hexdigest()
    assert (metadata["layers"], metadata["tokens"]) == ("0,2", "5:25")
    assert (metadata["dtype"], metadata["tensors"]) == (str(dtype).removeprefix("torch."), "u,x")
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_noticed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(shared_model(), Wanted((0,), 0, 10), tmp_path, LENGTH)
    usage = namedtuple("usage", "total used free")
    free = 50 * 2**20 + 2 * saver.nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    saver.announce(2, lambda text: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free - 1))
    with pytest.raises(ResultsError, match=r"needs 3\.8 KiB in .* are free: choose fewer layers"):
        saver.announce(2, lambda text: None)
    late = Saver(shared_model(), Wanted((0,), 40), tmp_path, LENGTH)
    with pytest.raises(ConfigError, match="no token lies in --activation-tokens 40:"):
        late.announce(1, lambda text: None)


def test_nothing_is_written_when_the_block_fails(tmp_path: Path) -> None:
    saver = Saver(shared_model(), Wanted((0,)), tmp_path, LENGTH)
    with pytest.raises(DartError), saver.recording("a", ""):
        raise DartError
    assert list(tmp_path.iterdir()) == []


def test_run_keeps_those_of_both_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", place() / "model", "--device", "cpu")
    asked = ("--prompt", "the sea and the moon", "--generation", 12, "--sparsity", 0.5)
    keep = ("--save-activations", "--activation-layers", "1-2", "--activation-tokens", "4:26")
    done = call("run", *model, *asked, "--method", "griffin", *keep)
    assert done.code == 0, done.err
    assert "--save-activations writes up to" in done.err
    (folder,) = (tmp_path / "results").glob("*/*")
    rows = [json.loads(line) for line in (folder / "generation.jsonl").read_text().splitlines()]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["prune"]["executor"] == "masked"
    from dart_llm.models.loading import load

    net, tokenizer = load(place() / "model", device="cpu")
    prompt = tokenizer("the sea and the moon").input_ids
    for row in rows:
        found = load_file(folder / f"activations-{row['variant']}.safetensors")
        fed = [*prompt, *row["token_ids"]][:-1]
        assert found["token_ids"].tolist() == fed[4:26]
        assert found["layer1.u"].shape == (22, WIDTH)
        if row["variant"] == "dense":
            with Recording(net, Wanted((1, 2), 4, 26)) as again, torch.no_grad():
                net(torch.tensor([fed]))
            plain = again.tensors()
            torch.testing.assert_close(found["layer2.u"], plain["layer2.u"], rtol=1e-3, atol=1e-4)
        else:
            gone = torch.ones(WIDTH, dtype=torch.bool)
            gone[load_file(folder / "masks.safetensors")["remask0.layer1.ids"].long()] = False
            u, decoded = found["layer1.u"][:, gone], len(prompt) - 4
            assert gone.sum() == WIDTH // 2 and bool((u[decoded:] == 0).all())
            assert float((u[:decoded] == 0).float().mean()) < 0.2  # the prompt ran dense


def test_settings_that_cannot_be_recorded() -> None:
    with pytest.raises(ConfigError, match="--executor masked"):
        RunSettings(prompt="x", save_activations=True, executor="compact")
    with pytest.raises(ConfigError, match="nothing is generated"):
        RunSettings(save_activations=True, eval_perplexity=True)
    with pytest.raises(ConfigError, match="no activation"):
        RunSettings(activation_tensors="v")
    assert RunSettings(save_activations=True).prune_config().executor == "masked"
    assert RunSettings().prune_config().executor == "auto"
