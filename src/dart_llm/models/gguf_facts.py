"""How GGUF files differ from transformers' weights, and settings that transformers does not read.

Without these settings a model would run but compute something else: other angles, no window.
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
    """How the weights of a file differ from transformers', apart from their names.

    ``pairs``: rows of q and k are in the order of rotary pairs, as in llama.cpp, not of halves;
    ``plus_one``: norms include the 1 that transformers adds itself.
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
"""Keys of a configuration and their values, as in JSON."""

SIZES = {
    "embedding_length": ("token_embd.weight", 1),
    "vocab_size": ("token_embd.weight", 0),
    "feed_forward_length": ("blk.0.ffn_down.weight", 1),
    "context_length": ("position_embd.weight", 0),
}
"""Facts that are the size of a tensor, and which of its dimensions."""

SMALL = (
    "rope.dimension_count",
    *(
        f"attention.{name}"
        for name in ("key_length", "value_length", "head_count", "head_count_kv")
    ),
)
"""Facts that are sizes or numbers of heads."""

LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Common to Llama 3.1 to 3.3; a file stores the factors of frequencies that follow from it."""


def is_mistral(file: GgufFile) -> bool:
    """Whether transformers treats a file as Mistral's; its architecture is Llama's."""
    return file.architecture == "llama" and file.metadata.get("general.name") == "mistral"


def check_facts(file: GgufFile) -> None:
    """Raise ``LoadError`` for facts that are larger than the file's tensors, or for fewer layers.

    A model of these would be built only to find that no weight fits; fewer layers would run.
    """
    layers = [re.match(r"blk\.(\d+)\.", tensor) for tensor in file.tensors]
    count = 1 + max((int(match[1]) for match in layers if match), default=-1)
    most = {"block_count": (count, "its layers"), **dict.fromkeys(SMALL, (LONGEST, "any model"))}
    for fact, (tensor, dimension) in SIZES.items():
        stored = file.tensors.get(tensor)
        if stored is not None and len(stored.shape) == 2:
            most[fact] = (stored.shape[dimension], tensor)
    if (stated := file.number("block_count")) and stated < count:
        raise LoadError(
            f"{file.path.name} is damaged: it states block_count {stated} but has {count} "
            "layers; fetch it again"
        )
    for fact, (size, what) in most.items():
        if (stated := file.number(fact) or 0) > size:
            raise LoadError(
                f"{file.path.name} is damaged: it states {fact} {stated}, more than the {size} of "
                f"{what}; fetch it again"
            )


def left_out(file: GgufFile) -> Settings:
    """Settings that transformers leaves out, mostly none; raises ``LoadError`` for bad factors."""
    settings: Settings = {}
    if file.architecture not in ARCHITECTURES:  # whose facts may mean something else
        return settings
    window = file.number("attention.sliding_window")
    if window and (is_mistral(file) or file.architecture == "phi3"):
        settings["sliding_window"] = window
    if file.architecture == "gpt2":
        settings |= _gpt2(file)
    if rope := {**_rotated_part(file), **_scaling(file), **_factors(file)}:
        settings[ROPE] = rope
    return settings


def complete(config: Any, settings: Settings) -> Any:
    """``config`` with the settings of ``left_out``; itself, if there are none."""
    if not settings:
        return config
    values = config.to_dict()
    rope = settings.get(ROPE, {})
    before = values.get(ROPE) or {}
    if "full_attention" in before:  # layers of sliding attention keep their own angles
        after = {**before, "full_attention": {**before["full_attention"], **rope}}
    else:
        after = {**before, **rope}
    original = rope.get("original_max_position_embeddings")
    if original and "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = original
    values |= {**settings, **({ROPE: after} if rope else {})}
    return type(config).from_dict(values)


def _gpt2(file: GgufFile) -> Settings:
    """Its context, and neurons where they are not four times the hidden size."""
    length, width = file.number("context_length"), file.number("embedding_length")
    neurons = file.number("feed_forward_length")
    narrow = neurons and width and neurons != 4 * width
    return {
        **({"n_positions": length} if length else {}),
        **({"n_inner": neurons} if narrow else {}),
    }


def _rotated_part(file: GgufFile) -> Settings:
    """Which part of a head is rotated."""
    rotated, width = file.number("rope.dimension_count"), file.number("embedding_length")
    heads = file.number("attention.head_count")
    if file.architecture != "phi3" or not (rotated and width and heads):
        return {}
    share = rotated * heads / width
    return {"partial_rotary_factor": share} if share < 1 else {}


def _scaling(file: GgufFile) -> Settings:
    """Positions beyond those of the training: ``linear`` and ``yarn``."""
    kind, factor = file.fact("rope.scaling.type"), file.number("rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        return {}
    settings: Settings = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn" and (original := file.number("rope.scaling.original_context_length")):
        settings["original_max_position_embeddings"] = original
    return settings


def _factors(file: GgufFile) -> Settings:
    """Factors of frequencies: Llama 3's, or any others, for short and for long sequences."""
    factors, long, short = (
        _numbers(file, name) for name in ("freqs", "factors_long", "factors_short")
    )
    if factors:
        factor = max(factors)
        if factor == min(factors) == 1:
            return {}
        wanted = _llama_3(len(factors), factor, float(file.number("rope.freq_base") or 10000.0))
        if all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(factors, wanted, strict=True)):
            return {"rope_type": "llama3", "factor": factor, **LLAMA_3}
        return _longrope(factors, factors, file.number("context_length"), 1.0)
    if not (long and short):
        return {}
    original = file.number("rope.scaling.original_context_length") or file.number("context_length")
    return _longrope(short, long, original, file.number("rope.scaling.attn_factor"))


def _numbers(file: GgufFile, name: str) -> list[float]:
    """Factors of frequencies; raises ``LoadError`` unless they are numbers above 0."""
    tensor = file.tensors.get(f"rope_{name}.weight")
    if tensor is None:
        return []
    fits = tensor.is_known and math.prod(tensor.shape) <= LONGEST
    numbers = [float(number) for number in tensor.values().flatten()] if fits else []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise LoadError(
            f"{tensor.path.name}: tensor {tensor.name} must have factors of frequencies, "
            "numbers above 0"
        )
    return numbers


def _longrope(short: list[float], long: list[float], original: Any, attention: Any) -> Settings:
    settings: Settings = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    settings["original_max_position_embeddings"] = original
    return {**settings, **({"attention_factor": float(attention)} if attention else {})}


def _llama_3(count: int, factor: float, base: float) -> list[float]:
    """The factors of Llama 3's frequencies, as llama.cpp's converter makes them."""
    low, high = LLAMA_3["low_freq_factor"], LLAMA_3["high_freq_factor"]
    turns = [8192 / (2 * math.pi * base ** (i / count)) for i in range(count)]
    smooth = [min(1.0, max(0.0, (period - low) / (high - low))) for period in turns]
    return [1 / ((1 - period) / factor + period) for period in smooth]
