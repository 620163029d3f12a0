"""Models whose weights are held in one format or another, and the GGUF files behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dart_llm.cache import cache_folder
from dart_llm.experiments.timed_cases import Format
from dart_llm.models.block_types import ROUNDED
from dart_llm.models.bundled import MEMBER, default_folder
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import is_default

KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What GGUF calls a dtype."""


@dataclass(frozen=True)
class Held:
    """A model whose weights are held in one format; ``tokenizer`` None: random weights."""

    form: Format
    model: Any
    tokenizer: Any
    asked: bool = True
    """Whether our own rows are wanted of it, too."""

    @property
    def blocks(self) -> str | None:
        """How it is held in blocks, in words; None where it is dense."""
        held: str | None = checkpoint_facts(self.model).get("weights")
        return held

    @property
    def words(self) -> str:
        """How it is held: in blocks, or in a dtype."""
        return self.blocks or str(checkpoint_facts(self.model)["dtype"])

    @property
    def dtype(self) -> str:
        """Of what is not in blocks."""
        return str(checkpoint_facts(self.model)["dtype"])

    @property
    def width(self) -> float:
        """Bytes of a weight that is not in blocks over those of bfloat16, as accounting has it."""
        return 1.0 if self.blocks else self.model.dtype.itemsize / 2

    @property
    def suffix(self) -> str:
        """What labels call it."""
        return self.form.name if self.blocks else self.words

    @property
    def kind(self) -> str:
        """GGUF's name for what it holds: Q8_0, BF16; of a file what ``load`` says of it."""
        if self.form.weights in ROUNDED:
            return str(self.form.weights).upper()
        return (
            str(checkpoint_facts(self.model)["file_quantisation"])
            if self.blocks
            else (KINDS.get(self.words, self.words))
        )


def named(held: Held) -> Held:
    """What ``auto`` became, by its name."""
    if held.form.name != "auto":
        return held
    return replace(held, form=replace(held.form, name="file" if held.blocks else "dense"))


def own_file(model: str, cache_dir: str | None, say: Callable[[str], None]) -> Path | None:
    """The model's own GGUF file, if it is one; the default's lies in the cache."""
    if is_default(model):
        cache = cache_folder(cache_dir)
        return default_folder(cache, progress=say) / Path(MEMBER).name
    path = Path(model).expanduser()
    return path if path.is_file() else None
