"""What GGUF files hold otherwise than transformers does, and state beside what transformers reads.

Without these settings a model would run and be another: with other angles, or without its window.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from dart_llm.errors import LoadError
from dart_llm.models.gguf_file import GgufFile


@dataclass(frozen=True)
class Stored:
    """In what the weights of a file differ from transformers', apart from their names.

    ``pairs``: rows of q and k lie by rotary pairs (llama.cpp's order), not by halves of a head;
    ``plus_one``: norms hold the one that transformers adds by itself.
    """

    pairs: bool = False
    plus_one: bool = False


ARCHITECTURES = {
    "llama": Stored(pairs=True),
    **dict.fromkeys(("qwen2", "qwen3", "phi3", "gpt2"), Stored()),
    **dict.fromkeys(("gemma2", "gemma3"), Stored(plus_one=True)),
}
"""The architectures whose files are read in blocks, by ``general.architecture``."""

ROPE = "rope_parameters"

LONGEST = 4096
"""Heads, and values and frequencies of one, more than any model has."""

Settings = dict[str, Any]
"""Keys of a configuration and their values, as JSON holds them."""

SIZES = {
    "embedding_length": ("token_embd.weight", 1),
    "vocab_size": ("token_embd.weight", 0),
    "feed_forward_length": ("blk.0.ffn_down.weight", 1),
    "context_length": ("position_embd.weight", 0),
}
"""Facts that a tensor bears out, and by which of its dimensions."""

SMALL = (
    "rope.dimension_count",
    *(f"attention.{one}" for one in ("key_length", "value_length", "head_count", "head_count_kv")),
)
"""Facts that are sizes or numbers of heads."""

LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all of Llama 3.1 to 3.3 share; a file holds factors of frequencies that were made of it."""


def is_mistral(file: GgufFile) -> bool:
    """Whether transformers takes a file for Mistral's: files of it are otherwise Llama's."""
    return file.architecture == "llama" and file.metadata.get("general.name") == "mistral"


def check_facts(file: GgufFile) -> None:
    """Raise ``LoadError`` for facts that are larger than what the file holds, or fewer layers.

    A model of these would be made, only to see that no weight fits; one of fewer layers would run.
    """
    layers = [re.match(r"blk\.(\d+)\.", tensor) for tensor in file.tensors]
    count = 1 + max((int(one[1]) for one in layers if one), default=-1)
    most = {"block_count": (count, "its layers"), **dict.fromkeys(SMALL, (LONGEST, "any model"))}
    for fact, (tensor, dimension) in SIZES.items():
        found = file.tensors.get(tensor)
        if found is not None and len(found.shape) == 2:
            most[fact] = (found.shape[dimension], tensor)
    if (stated := file.number("block_count")) and stated < count:
        raise LoadError(
            f"{file.path.name} is damaged: it states block_count {stated} and holds {count} "
            "layers; fetch it again"
        )
    for fact, (size, what) in most.items():
        if (stated := file.number(fact) or 0) > size:
            raise LoadError(
                f"{file.path.name} is damaged: it states {fact} {stated}, more than the {size} of "
                f"{what}; fetch it again"
            )


def left_out(file: GgufFile) -> Settings:
    """Mostly nothing; raises ``LoadError`` for factors that are none."""
    found: Settings = {}
    if file.architecture not in ARCHITECTURES:  # which may mean something else by these words
        return found
    window = file.number("attention.sliding_window")
    if window and (is_mistral(file) or file.architecture == "phi3"):
        found["sliding_window"] = window
    if file.architecture == "gpt2":
        found |= _gpt2(file)
    if rope := {**_turned_part(file), **_scaling(file), **_factors(file)}:
        found[ROPE] = rope
    return found


def complete(config: Any, found: Settings) -> Any:
    """``config`` with what ``left_out`` found; itself, if that is nothing."""
    if not found:
        return config
    known = config.to_dict()
    rope = found.get(ROPE, {})
    before = known.get(ROPE) or {}
    if "full_attention" in before:  # layers of sliding attention keep their own angles
        after = {**before, "full_attention": {**before["full_attention"], **rope}}
    else:
        after = {**before, **rope}
    original = rope.get("original_max_position_embeddings")
    if original and "original_max_position_embeddings" in known:
        known["original_max_position_embeddings"] = original
    known |= {**found, **({ROPE: after} if rope else {})}
    return type(config).from_dict(known)


def _gpt2(file: GgufFile) -> Settings:
    """Its context, and neurons where they are not four times the hidden size."""
    length, width = file.number("context_length"), file.number("embedding_length")
    neurons = file.number("feed_forward_length")
    narrow = neurons and width and neurons != 4 * width
    return {
        **({"n_positions": length} if length else {}),
        **({"n_inner": neurons} if narrow else {}),
    }


def _turned_part(file: GgufFile) -> Settings:
    """How much of a head is turned by angles."""
    turned, width = file.number("rope.dimension_count"), file.number("embedding_length")
    heads = file.number("attention.head_count")
    if file.architecture != "phi3" or not (turned and width and heads):
        return {}
    share = turned * heads / width
    return {"partial_rotary_factor": share} if share < 1 else {}


def _scaling(file: GgufFile) -> Settings:
    """Positions beyond those of the training: ``linear`` and ``yarn``."""
    kind, factor = file.fact("rope.scaling.type"), file.number("rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        return {}
    found: Settings = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn" and (original := file.number("rope.scaling.original_context_length")):
        found["original_max_position_embeddings"] = original
    return found


def _factors(file: GgufFile) -> Settings:
    """Of each frequency: Llama 3's, or any others, for short and for long texts."""
    own, long, short = (_numbers(file, name) for name in ("freqs", "factors_long", "factors_short"))
    if own:
        factor = max(own)
        if factor == min(own) == 1:
            return {}
        wanted = _llama_3(len(own), factor, float(file.number("rope.freq_base") or 10000.0))
        if all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(own, wanted, strict=True)):
            return {"rope_type": "llama3", "factor": factor, **LLAMA_3}
        return _longrope(own, own, file.number("context_length"), 1.0)
    if not (long and short):
        return {}
    original = file.number("rope.scaling.original_context_length") or file.number("context_length")
    return _longrope(short, long, original, file.number("rope.scaling.attn_factor"))


def _numbers(file: GgufFile, name: str) -> list[float]:
    """Factors of frequencies; raises ``LoadError`` for what can be none."""
    tensor = file.tensors.get(f"rope_{name}.weight")
    if tensor is None:
        return []
    fits = tensor.is_known and math.prod(tensor.shape) <= LONGEST
    found = [float(one) for one in tensor.values().flatten()] if fits else []
    if not found or not all(0 < one < math.inf for one in found):
        raise LoadError(
            f"{tensor.path.name}: tensor {tensor.name} holds no factors of frequencies, which are "
            "numbers above 0"
        )
    return found


def _longrope(short: list[float], long: list[float], original: Any, attention: Any) -> Settings:
    found: Settings = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    found["original_max_position_embeddings"] = original
    return {**found, **({"attention_factor": float(attention)} if attention else {})}


def _llama_3(count: int, factor: float, base: float) -> list[float]:
    """The factors of Llama 3's frequencies, as llama.cpp's converter makes them."""
    low, high = LLAMA_3["low_freq_factor"], LLAMA_3["high_freq_factor"]
    turns = [8192 / (2 * math.pi * base ** (i / count)) for i in range(count)]
    smooth = [min(1.0, max(0.0, (one - low) / (high - low))) for one in turns]
    return [1 / ((1 - one) / factor + one) for one in smooth]
