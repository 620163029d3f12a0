"""GGUF files of which bytes were changed: a model, or one of our sentences, and soon."""

import random
import re
import struct

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig

from checkpoints import write_gguf
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256
from dart_llm.models import gguf as conversion
from dart_llm.models.cached import converted_folder, read_source
from dart_llm.models.gguf_file import ARCHITECTURES, left_out, read_gguf
from dart_llm.models.loading import load
from dart_llm.models.packed_loading import load_packed

pytestmark = pytest.mark.usefixtures("native")

TIMES = 60
FACTS = {
    "llama": {"tensors": {"rope_freqs.weight": [2.0] * 16}},
    "qwen2": {"facts": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}},
    "phi3": {"facts": {"attention.sliding_window": 24, "rope.dimension_count": 24}},
}
"""So that there is something to damage."""

NUMBERS = (0, 1, 7, 8, 9, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)


def damaged(whole, start, draw):
    """One to four changes, mostly before the weights, which begin at ``start``; or a cut."""
    data = bytearray(whole)
    if draw.random() < 0.05:
        return data[: draw.randrange(len(data))]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, size = (
            draw.randrange(start if draw.random() < 0.85 else len(whole)),
            draw.choice((4, 8)),
        )
        change = draw.randrange(4)
        if change == 0:
            data[at : at + 1] = [data[at] ^ 1 << draw.randrange(8)] if at < len(data) else []
        elif change == 1:
            data[at : at + 1] = [draw.randrange(256)]
        elif change == 2:
            del data[at : at + size]
        else:
            data[at : at + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return data


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_changes_anywhere(architecture, tmp_path):
    """The reader of the header, and that of the weights into a model that is known."""
    file = write_gguf(
        tmp_path / "tiny.gguf", architecture=architecture, **FACTS.get(architecture, {})
    )
    whole, start = file.read_bytes(), int(GGUFReader(file).data_offset)
    load(file, cache_dir=tmp_path, weights="file")
    folder = converted_folder(tmp_path / "dart-llm", file_sha256(file), packed=True)
    names, config = read_source(folder)["tensors"], AutoConfig.from_pretrained(folder)
    draw, loaded, said = random.Random(architecture), 0, []
    for _ in range(TIMES):
        file.write_bytes(damaged(whole, start, draw))
        try:
            known = read_gguf(file)
            read_gguf(file)
            left_out(known)
            if known.architecture == architecture:
                load_packed(file, config, torch.float32, names)
            loaded += 1
        except LoadError as error:
            said.append(str(error))
    assert min(loaded, len(said)) > TIMES // 10
    assert not [one for one in said if "\n" in one]


@pytest.mark.parametrize(
    ("architecture", "fact", "most"),
    [
        ("llama", "block_count", "the 2 of its layers"),
        ("llama", "embedding_length", "the 64 of token_embd.weight"),
        ("gemma3", "vocab_size", "the 300 of token_embd.weight"),
        ("qwen2", "feed_forward_length", "the 96 of blk.0.ffn_down.weight"),
        ("gpt2", "context_length", "the 128 of position_embd.weight"),
        ("llama", "rope.dimension_count", "the 4096 of any model"),
        ("gemma2", "attention.key_length", "the 4096 of any model"),
        ("phi3", "attention.head_count_kv", "the 4096 of any model"),
    ],
)
def test_facts_that_the_tensors_do_not_bear_out(architecture, fact, most, tmp_path, monkeypatch):
    """A model of these is not even made without weights, which takes memory too."""

    def made(_gguf):
        raise AssertionError("a configuration was made")

    monkeypatch.setattr(conversion, "_config", made)
    file = write_gguf(
        tmp_path / "tiny.gguf", architecture=architecture, facts={"rope.dimension_count": 32}
    )
    whole, key = file.read_bytes(), f"{architecture}.{fact}".encode()
    at = whole.index(key) + len(key) + 4  # behind its type
    for stated in (1 << 24, (1 << 32) - 1):
        file.write_bytes(whole[:at] + stated.to_bytes(4, "little") + whole[at + 4 :])
        for weights in ("file", "dense"):
            with pytest.raises(LoadError) as caught:
                load(file, cache_dir=tmp_path, weights=weights)
            assert str(caught.value) == (
                f"tiny.gguf is damaged: it states {fact} {stated}, more than {most}; fetch it again"
            )


def sentence(file, folder):
    """What is said in its place, by both ways to load a file."""
    said = set()
    for weights in ("file", "dense"):
        with pytest.raises(LoadError) as caught:
            load(file, cache_dir=folder, weights=weights)
        said.add(str(caught.value))
    (found,) = said
    return found


def test_a_file_of_fewer_layers_than_it_holds(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    whole, key = file.read_bytes(), b"llama.block_count"
    at = whole.index(key) + len(key) + 4
    file.write_bytes(whole[:at] + (1).to_bytes(4, "little") + whole[at + 4 :])
    assert sentence(file, tmp_path) == (
        "tiny.gguf is damaged: it states block_count 1 but has 2 layers; fetch it again"
    )


@pytest.mark.parametrize("change", ["type", "place"])
def test_tensors_that_overlap(change, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    whole, key = bytearray(file.read_bytes()), b"blk.1.attn_q.weight"
    at = whole.index(key) + len(key) + 4 + 16
    if change == "type":  # F16 takes more than the Q4_1 of before
        whole[at : at + 4] = (1).to_bytes(4, "little")
    else:
        whole[at + 4 : at + 12] = (0).to_bytes(8, "little")
    file.write_bytes(whole)
    said = sentence(file, tmp_path)
    assert re.fullmatch(r"tiny.gguf is damaged: tensors \S+ and \S+ overlap; fetch it again", said)
    assert "blk.1.attn_q.weight" in said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_norms_that_are_no_numbers(value, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    place = read_gguf(file).tensors["output_norm.weight"].begin
    whole = bytearray(file.read_bytes())
    whole[place : place + 4] = struct.pack("<f", float(value))
    file.write_bytes(whole)
    assert sentence(file, tmp_path)
    with pytest.raises(LoadError, match=r"weights of output_norm\.weight are not finite; fetch it"):
        load(file, cache_dir=tmp_path, weights="file")
