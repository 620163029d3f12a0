"""What a model's name may be, its dtype and device, and what is refused before weights are read."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dart_llm
from checkpoints import facts, write_folder, write_gguf
from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import ConfigError, DartError
from dart_llm.files import file_sha256, size_text
from dart_llm.hub import plain, redact, weight_files
from dart_llm.models.checkpoint import Checkpoint, checkpoint_facts, weights_sha256, weights_size
from dart_llm.models.loading import load, memory_failure, parse_device, parse_dtype, placement
from dart_llm.native import memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny-llama"))


def sentence(*arguments, root="ROOT", **keywords):
    """What ``load`` says on one line when it refuses; ``root`` is a folder of the test."""
    with pytest.raises(DartError, match=r"\A.*\Z") as caught:
        load(*arguments, **keywords)
    return str(caught.value).replace(str(root), "ROOT")


def test_a_folder_loads_in_its_own_dtype_and_in_others(folder, caplog):
    assert dart_llm.load is load  # the function, not a module
    with caplog.at_level(logging.INFO, logger="dart_llm"):
        model, tokenizer = load(folder)
    assert caplog.messages == [f"loading {folder.name}: 0.1 MB in bfloat16"]
    assert model.dtype == torch.bfloat16 and not model.training
    ids = tokenizer("hi", return_tensors="pt")["input_ids"]
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact, _ = load(str(folder), dtype="fp32", attn_implementation="eager")
    assert exact.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.allclose(exact(ids).logits, reference(ids).logits, atol=1e-6)
    assert load(folder, dtype=torch.float16, device="cpu")[0].dtype == torch.float16


def test_the_facts_of_a_folder(folder, tmp_path):
    """The checksum of several files is that of their ``sha256sum`` lines."""
    stated = {"name": folder.name, "source": "folder", "path": str(folder), "dtype": "float32"}
    stated |= {"sha256": file_sha256(folder / "model.safetensors")}
    stated |= {"parameters": parameters(folder)}
    assert checkpoint_facts(load(folder)[0].float()) == facts(**stated)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    stated = {"name": str(folder), "path": str(folder), "source": "not loaded by dart_llm"}
    stated |= {"dtype": "float16", "sha256": None, "file_quantisation": None}
    assert checkpoint_facts(own).items() >= stated.items()
    lines = ""
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.full((3,), float(ord(name[0])))}, tmp_path / name)
        lines += f"{file_sha256(tmp_path / name)}  {name}\n"
    assert weights_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    assert weights_sha256(tmp_path / "nothing") is None


def test_names_that_mean_nothing(folder, tmp_path, monkeypatch, snapshot):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = ("smollm2-13m", "smolm2", "zzz", "./nothing", "gone.gguf", "owner/name", "gpt2")
    said = [sentence(name, cache_dir=tmp_path) for name in names]
    said += [sentence(name, root=folder, revision="v1") for name in (folder, "SmolLM2")]
    assert said == snapshot


def test_folders_that_are_no_whole_checkpoint(tmp_path, snapshot):
    """Empty, a GGUF file in it, code of its own; missing weights are never made up."""
    said = [sentence(tmp_path, root=tmp_path)]
    write_gguf(tmp_path / "inside.gguf")
    said.append(sentence(tmp_path, root=tmp_path))
    copy = write_folder(tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    said.append(sentence(copy, root=tmp_path))
    (copy / "model.safetensors").write_bytes(b"not a safetensors file")
    assert sentence(copy).startswith("copy could not be loaded: ")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('this code ran')\n")
    said.append(sentence(copy, root=tmp_path))
    assert said == snapshot


def test_dtypes():
    spellings = {"auto": "auto", "fp32": torch.float32, "Float32": torch.float32}
    spellings |= {"half": torch.float16, "torch.bfloat16": torch.bfloat16, None: "auto"}
    assert {word: parse_dtype(word) for word in spellings} == spellings
    for value in ("int8", torch.float64, "Tensor"):
        with pytest.raises(ConfigError, match="; write float32, float16, bfloat16 or auto"):
            parse_dtype(value)


def test_devices(monkeypatch, caplog):
    """Of a machine with two GPUs, with MPS, and with neither, where a warning names the CPU."""
    names = (None, "auto", "cpu", "0", "cuda:3", "mps")
    assert [parse_device(text) for text in names] == ["cpu"] * 6 and len(caplog.messages) == 3
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = {**dict.fromkeys((None, "", "auto", "cuda", "0"), "cuda:0"), "CUDA:1": "cuda:1"}
    assert {text: parse_device(text) for text in gpus} == gpus
    for text, words in (("5", "this machine has 2"), ("gpu", "is not a device"), ("-1", "is not")):
        with pytest.raises(ConfigError, match=words):
            parse_device(text)
    table = '{"model": 0, "lm_head": "cpu"}'
    for device, device_map, expected in (
        (None, None, {}),
        ("mps", None, {"device_map": {"": "mps"}}),
        (None, {"": 1}, {"device_map": {"": 1}}),
        ("", table, {"device_map": {"model": 0, "lm_head": "cpu"}}),
    ):
        assert placement(device, device_map) == expected
    with pytest.raises(ConfigError, match="device and device_map exclude each other"):
        placement("cpu", "auto")
    with pytest.raises(ConfigError, match=r"is not JSON \(.* at character 1\); write auto"):
        placement(None, "{model: 0}")


def test_memory_failure_names_the_next_steps():
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), cpu, MemoryError()):
        outer = ValueError("loading failed")
        outer.__cause__ = error
        text = "big/model does not fit in memory as float32; try --dtype bfloat16"
        assert str(memory_failure(outer, "big/model", "float32")).startswith(text)
    assert memory_failure(RuntimeError("shapes differ"), "m", "float32") is None


def test_what_is_said_of_the_hub(monkeypatch):
    """Secrets are removed, messages shortened; which weight files are fetched, and to where."""
    monkeypatch.setenv("HF_TOKEN", "letmein-42")
    assert redact("sent letmein-42 and hf_AbCdEf123") == "sent *** and ***"
    assert redact("see https://me:secret@index.test/simple") == "see https://***@index.test/simple"
    assert plain(OSError("It broke:\n hf_AbCdEf123 is wrong.\nMore.")) == "It broke: *** is wrong"
    assert [size_text(size) for size in (400_000, 16_060_000_000)] == ["0.4 MB", "16.1 GB"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert weight_files(["pytorch_model.bin", *shards, "onnx/model.safetensors"]) == shards
    assert weight_files(["pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin"]
    monkeypatch.setenv("DART_CACHE", "/env")
    for chosen, place in ((None, Path("/env")), ("/argument", Path("/argument"))):
        assert (cache_folder(chosen), hub_cache(chosen)) == (place / "dart-llm", place)


def parameters(folder):
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_the_size_of_weights(folder, tmp_path, monkeypatch):
    """In memory, by the headers of the files; what does not fit is refused before a read."""
    checkpoint, weights = Checkpoint("tiny", "folder", str(folder), folder), parameters(folder)
    sizes = {
        ("auto", "dense"): 2 * weights,
        (torch.float32, "dense"): 4 * weights,
        ("auto", "q8_0"): int(34 / 32 * weights),
        (torch.float32, "q8_0"): 4 * weights,  # they change their dtype before they are rounded
    }
    assert {key: weights_size(checkpoint, *key).bytes for key in sizes} == sizes
    gguf = write_gguf(tmp_path / "tiny.gguf")
    packed = Checkpoint("tiny", "gguf", "", file=gguf, packed=True)
    assert 0 < weights_size(packed, "auto", "file").bytes < gguf.stat().st_size
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    for name in (tmp_path, tmp_path / "nothing"):
        assert weights_size(Checkpoint("x", "folder", str(name), name), "auto", "dense") is None
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(memory, "available", lambda: 2 * weights - 1)
    said = sentence(folder)
    assert said.startswith(f"{folder.name} needs 0.1 MB of memory in bfloat16, and 0.1 MB are free")
    assert "give --dtype bfloat16, --weights q8_0 or q4_0" in said
    said = sentence(gguf, weights="dense", dtype="float32", cache_dir=tmp_path)
    assert said.startswith("tiny needs 0.4 MB of memory in float32, and 0.1 MB are free: give ")
