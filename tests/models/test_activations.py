"""``--save-activations``: kept values are those of our own hooks; the model is restored."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.artifacts import Saver
from dart_llm.models.capture import Recording, Wanted
from dart_llm.models.loading import load
from dart_llm.session.run import prune
from dart_llm.studies.generate.settings import RunSettings
from lm_cases import call, place
from observed_cases import Recorder, stream
from steps import Same, decode, shared_model
from tiny import HIDDEN, NAMES, WIDTH, tokens

EVERY = ("u", "x", "z", "r")
PROMPT, LENGTH = 9, 30


def record(model, ids, wanted):
    with Recording(model, wanted) as recording:
        decode(model, ids, PROMPT)
    return recording.tensors()


@pytest.mark.parametrize("name", NAMES)
def test_kept_values_are_those_of_direct_hooks(name):
    """Prompt and decode tokens of two layers, from the middle of the prompt on."""
    model, ids = shared_model(name), tokens(1, LENGTH, seed=6)
    with Recorder(model) as outside:
        kept = record(model, ids, Wanted((1, 3), 4, 20, EVERY))
    assert kept.keys() == {"token_ids"} | {f"layer{n}.{t}" for n in (1, 3) for t in EVERY}
    assert torch.equal(kept["token_ids"], ids[0, 4:20].int())
    for layer in (1, 3):
        for key in ("u", "z", "r"):
            wanted = outside.get(layer, key)[4:20]
            assert torch.equal(kept[f"layer{layer}.{key}"].double(), wanted), key
        x = stream(outside, name, layer)[4:20]
        torch.testing.assert_close(kept[f"layer{layer}.x"].double(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "opt"])
def test_the_model_is_exactly_what_it_was(name):
    model, ids = shared_model(name), tokens(1, 12)
    with Same(model):
        plain = decode(model, ids, PROMPT)
        with Recording(model, Wanted((0, 3), tensors=EVERY)):
            assert torch.equal(decode(model, ids, PROMPT), plain)
    refused = pytest.raises(ConfigError, match=r"not computed: .* use executor masked|cannot run")
    with Same(model), refused, prune(model, "griffin", sparsity=0.5, executor="compact"):
        record(model, tokens(1, LENGTH, seed=3), Wanted((0,)))
    with Same(model), pytest.raises(RuntimeError), Recording(model, Wanted((0,))):
        raise RuntimeError
    with Same(model), pytest.raises(ConfigError, match="a batch of one row, not of 2"):
        record(model, tokens(2, 12), Wanted((0,)))


def test_what_is_kept_is_chosen():
    chosen = {"activation_layers": "3,0-1, 1", "activation_tokens": "2:"}
    chosen |= {"activation_tensors": "x,u"}
    assert RunSettings(**chosen).wanted(4) == Wanted((0, 1, 3), 2, None, ("x", "u"))
    assert RunSettings().wanted(2) == Wanted((0, 1), 0, 256)
    for name, value, problem in (
        ("layers", "5-2", "is not a layer or a range"),
        ("layers", "2-4", "layer 4 is out of range: this model has 4 layers"),
        ("tokens", "9:9", "is not a range of tokens"),
        ("tensors", "u,w", "unknown activation 'w'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            RunSettings(**{f"activation_{name}": value}).wanted(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_announced_size_is_that_of_the_tensors(tmp_path, dtype):
    model, ids, said = shared_model(dtype=dtype), tokens(1, LENGTH), []
    saver = Saver(model, Wanted((0, 2), 5, 25, ("u", "x")), tmp_path, LENGTH)
    saver.announce(2, said.append)
    assert "writes up to" in said[0] and "u, x of 2 layers" in said[0]
    with pytest.raises(DartError), saver.recording("b", ""):
        raise DartError  # then nothing is written
    with saver.recording("a", "héllo"):
        decode(model, ids, PROMPT)
    (path,) = tmp_path.iterdir()
    kept = load_file(path)
    assert sum(t.numel() * t.element_size() for t in kept.values()) == saver.nbytes
    assert saver.nbytes == 20 * (2 * (WIDTH + HIDDEN) * dtype.itemsize + 4)
    assert kept["layer2.u"].dtype == dtype
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["text_sha256"] == hashlib.sha256("héllo".encode()).hexdigest()
    assert (metadata["layers"], metadata["tokens"]) == ("0,2", "5:25")
    assert (metadata["dtype"], metadata["tensors"]) == (str(dtype).removeprefix("torch."), "u,x")


def test_run_keeps_those_of_both_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ("--model", place() / "model", "--device", "cpu")
    text = ("--prompt", "the sea and the moon", "--generation", 12, "--sparsity", 0.5)
    keep = ("--save-activations", "--activation-layers", 1, "--activation-tokens", "4:26")
    done = call("run", *model, *text, "--method", "griffin", *keep)
    assert done.code == 0 and "--save-activations writes up to" in done.err, done.err
    (folder,) = (tmp_path / "results").glob("*/*")
    rows = [json.loads(line) for line in (folder / "generation.jsonl").read_text().splitlines()]
    net, tokenizer = load(place() / "model", device="cpu")
    prompt = tokenizer("the sea and the moon").input_ids
    for row in rows:
        kept = load_file(folder / f"activations-{row['variant']}.safetensors")
        fed = [*prompt, *row["token_ids"]][:-1]
        assert kept["token_ids"].tolist() == fed[4:26] and len(kept) == 2
        with Recording(net, Wanted((1,), 4, 26)) as again, torch.no_grad():
            net(torch.tensor([fed]))
        u, plain = kept["layer1.u"], again.tensors()["layer1.u"]
        dense = len(u) if row["variant"] == "dense" else len(prompt) - 4  # the prompt ran dense
        torch.testing.assert_close(u[:dense], plain[:dense], rtol=1e-3, atol=1e-4)
        assert int((u[dense:] == 0).all(0).sum()) in (WIDTH, WIDTH // 2)  # of no token: all
