"""What a model's name may be, its dtype, what is known of it, and every sentence of a refusal."""

import gc
import hashlib
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dart_llm
from checkpoints import facts, write_folder, write_gguf
from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.files import size_text
from dart_llm.hub import plain, redact, weight_files
from dart_llm.models import checkpoint
from dart_llm.models.checkpoint import checkpoint_facts, weights_sha256
from dart_llm.models.loading import load, parse_dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny-llama"))


def sentence(error, *arguments, **keywords):
    """The message that ``load`` raises, on one line."""
    with pytest.raises(error, match=r"\A.*\Z") as caught:
        load(*arguments, **keywords)
    return str(caught.value)


def test_a_folder_loads_in_its_own_dtype_and_in_others(folder, caplog):
    assert dart_llm.load is load  # the function, not a module
    with caplog.at_level(logging.INFO, logger="dart_llm"):
        model, tokenizer = load(folder)
    assert caplog.messages == [f"loading {folder.name}"]
    assert model.dtype == torch.bfloat16 and not model.training
    ids = tokenizer("hi", return_tensors="pt")["input_ids"]
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact, _ = load(str(folder), dtype="fp32", attn_implementation="eager")
    assert exact.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.allclose(exact(ids).logits, reference(ids).logits, atol=1e-6)
    assert load(folder, dtype=torch.float16, device="cpu")[0].dtype == torch.float16


def test_the_facts_of_a_folder(folder):
    """They are kept beside the model, and go with it."""
    weights = folder / "model.safetensors"
    gc.collect()
    count = len(checkpoint._LOADED)
    model, _ = load(folder)
    before = set(vars(model))
    known = {"name": folder.name, "source": "folder", "path": str(folder), "dtype": "float32"}
    known["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    known["parameters"] = sum(tensor.numel() for tensor in load_file(weights).values())
    assert checkpoint_facts(model.float()) == facts(**known)
    assert set(vars(model)) == before and len(checkpoint._LOADED) == count + 1
    del model
    gc.collect()
    assert len(checkpoint._LOADED) == count
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    known = {"name": str(folder), "path": str(folder), "source": "not loaded by dart_llm"}
    known |= {"dtype": "float16", "sha256": None, "file_quantisation": None}
    assert checkpoint_facts(own).items() >= known.items()


def test_the_checksum_of_several_files_is_that_of_their_sha256sum_lines(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        save_file({"x": torch.full((3,), float(ord(name[0])))}, tmp_path / name)
    lines = "".join(
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.safetensors", "b.safetensors")
    )
    assert weights_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    assert weights_sha256(tmp_path / "nothing") is None


def test_names_that_mean_nothing(folder, tmp_path, monkeypatch):
    for name in ("smollm2-13m", "SmolLM2-135", "smolm2"):
        text = sentence(UnknownName, name)
        assert text.startswith(f"unknown model {name!r}; did you mean smollm2")
        assert text.endswith(", or a hub id (owner/name), a folder or a .gguf file?")
    assert sentence(UnknownName, "zzz") == (
        "unknown model 'zzz'; known: distilgpt2, gpt2, gpt2-large, gpt2-medium, gpt2-xl, "
        "openai-gpt, smollm2, smollm2-135m, or a hub id (owner/name), a folder or a .gguf file"
    )
    for name in ("./nothing", "~/nothing", "a/b/c", "gone.gguf", "/nothing"):
        assert sentence(LoadError, name) == (
            f"there is no file or folder {name}; give a hub id (owner/name), a folder, a .gguf "
            "file or smollm2-135m"
        )
    only_hub = "revision 'v1' applies to hub models only; "
    assert sentence(ConfigError, folder, revision="v1") == f"{only_hub}{folder} is a path"
    assert sentence(ConfigError, "SmolLM2", revision="v1") == f"{only_hub}smollm2-135m is pinned"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("owner/name", "gpt2"):
        assert sentence(LoadError, name, cache_dir=tmp_path) == (
            f"{name} is not in the hub's cache and HF_HUB_OFFLINE is set; unset it to download, "
            "or give a local folder, a .gguf file or smollm2-135m"
        )


def test_folders_that_are_no_whole_checkpoint(tmp_path):
    start = f"{tmp_path} is no checkpoint, for it has no config.json; "
    assert sentence(LoadError, tmp_path) == start + "give the folder that save_pretrained wrote"
    file = write_gguf(tmp_path / "inside.gguf")
    assert sentence(LoadError, tmp_path) == start + f"it holds inside.gguf: give {file}"
    copy = write_folder(tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]  # missing weights are never made up
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert sentence(LoadError, copy) == (
        "copy lacks 1 of the model's weights, such as model.layers.1.mlp.up_proj.weight; it is "
        "incomplete, or not a causal language model"
    )
    (copy / "model.safetensors").write_bytes(b"not a safetensors file")
    assert sentence(LoadError, copy).startswith("copy could not be loaded: ")
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert sentence(LoadError, copy) == (
        f"{copy} holds no tokenizer that can be read; copy the tokenizer files of the original "
        "model into it"
    )


def test_code_of_a_checkpoint_is_not_run_unless_it_is_trusted(tmp_path):
    copy = write_folder(tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('this code ran')\n")
    assert sentence(LoadError, copy) == (
        "copy brings its own Python code; read that code, then allow it with --trust-remote-code"
    )


def test_out_of_memory_while_loading(folder, monkeypatch):
    def full(*_arguments, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    text = sentence(LoadError, folder, attn_implementation="quick")
    assert text.startswith(f"{folder.name} could not be loaded: ")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    text = sentence(LoadError, folder, dtype="float32")
    assert text.startswith(f"{folder.name} does not fit in memory as float32; try --dtype bfloat16")
    assert "as it is stored" in sentence(LoadError, folder)


def test_dtypes():
    spellings = {
        "auto": (None, "auto"),
        torch.float32: ("fp32", "Float32"),
        torch.float16: ("half", "fp16", torch.float16),
        torch.bfloat16: ("bf16", "torch.bfloat16"),
    }
    for expected, values in spellings.items():
        assert [parse_dtype(value) for value in values] == [expected] * len(values)
    for value in ("int8", "double", torch.float64, torch.int8):
        with pytest.raises(ConfigError, match="; write float32, float16, bfloat16 or auto"):
            parse_dtype(value)


def test_cache_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("DART_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (cache_folder(), hub_cache()) == (tmp_path / "dart-llm", None)
    monkeypatch.setenv("DART_CACHE", str(tmp_path / "env"))
    assert (cache_folder(), hub_cache()) == (tmp_path / "env" / "dart-llm", tmp_path / "env")
    chosen = tmp_path / "argument"
    assert (cache_folder(chosen), hub_cache(chosen)) == (chosen / "dart-llm", chosen)


def test_what_is_said_of_the_hub(monkeypatch):
    """Secrets are removed, messages shortened, sizes in words; which weight files are fetched."""
    monkeypatch.setenv("HF_TOKEN", "letmein-42")
    assert redact("sent letmein-42 and hf_AbCdEf123") == "sent *** and ***"
    assert redact("see https://me:secret@index.test/simple") == "see https://***@index.test/simple"
    broken = OSError("It broke:\n hf_AbCdEf123 is wrong.\nLong story.")
    assert plain(broken) == "It broke: *** is wrong" and plain(KeyError()) == "KeyError"
    sizes = {400_000: "0.4 MB", 92_871_040: "93 MB", 16_060_000_000: "16.1 GB"}
    assert {size: size_text(size) for size in sizes} == sizes
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    both = ["pytorch_model.bin", *shards, "consolidated.safetensors", "onnx/model.safetensors"]
    assert weight_files(both) == shards
    assert weight_files(["pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin"]
    assert weight_files(["model.gguf"]) == []
