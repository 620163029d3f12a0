"""``--save-activations``: how large the files will be, whether they fit, and writing them."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dart_llm.activations import Recording
from dart_llm.arch import describe
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.errors import ConfigError, ResultsError
from dart_llm.report_tables import bytes_text
from dart_llm.results import MIN_FREE_BYTES
from dart_llm.settings_activations import ActivationSettings, Wanted
from dart_llm.tensor_file import write_tensors


@dataclass(frozen=True)
class Saver:
    """Keeps the activations of texts of at most ``tokens`` tokens in ``folder``."""

    model: Any
    wanted: Wanted
    folder: Path
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of one text's tensors, at most: all layers, tokens and tensors, and token ids."""
        kept, total = self.wanted.tokens(self.tokens), 0
        for block in describe(self.model).blocks:
            if block.index in self.wanted.layers:
                down = block.matrices()[2]
                widths = [down.shape[1] if n == "u" else down.shape[0] for n in self.wanted.tensors]
                total += kept * sum(widths) * down.element_size()
        return total + 4 * kept

    def announce(self, texts: int, say: Callable[[str], None]) -> None:
        """Say how much ``texts`` texts will take; raises ``ResultsError`` when it does not fit."""
        if not self.wanted.tokens(self.tokens):
            raise ConfigError(
                f"no token lies in --activation-tokens {self.wanted.range}: there are "
                f"{self.tokens}; give a range that begins earlier"
            )
        need, free = texts * self.nbytes, shutil.disk_usage(self.folder).free
        if need + MIN_FREE_BYTES > free:
            raise ResultsError(
                f"--save-activations needs {bytes_text(need)} in {self.folder}, where "
                f"{bytes_text(free)} are free: choose fewer layers, tokens or tensors"
            )
        layers = len(self.wanted.layers)
        say(
            f"--save-activations writes up to {bytes_text(need)} to {self.folder}: "
            f"{', '.join(self.wanted.tensors)} of {layers} layer{'' if layers == 1 else 's'}, "
            f"tokens {self.wanted.range}; recording takes time that the measured times include"
        )

    def path(self, name: str) -> Path:
        """The file of the text called ``name``."""
        return self.folder / f"activations-{name}.safetensors"

    @contextlib.contextmanager
    def recording(self, name: str, text: str) -> Iterator[None]:
        """Record the sequence that runs inside; written when the block ends without an error.

        ``text``: what was given to the tokenizer; its sha256 goes into the metadata.
        """
        with Recording(self.model, self.wanted) as recording:
            yield
        self._write(name, text, recording.tensors())

    def _write(self, name: str, text: str, tensors: dict[str, Tensor]) -> None:
        facts, path = checkpoint_facts(self.model), self.path(name)
        kept = max((len(tensor) for tensor in tensors.values()), default=0)
        metadata = {
            "checkpoint": str(facts.get("name")),
            "checkpoint_sha256": str(facts.get("sha256")),
            "dtype": str(facts.get("dtype")),
            "layers": ",".join(map(str, self.wanted.layers)),
            "tensors": ",".join(self.wanted.tensors),
            "tokens": f"{self.wanted.start}:{self.wanted.start + kept}",
            "text": name,
            "text_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "format": "layer{l}.{tensor}: [tokens, width]; token_ids: int32 [tokens]",
        }
        write_tensors(path, tensors, metadata)


def saver(settings: ActivationSettings, model: Any, folder: Path, tokens: int) -> Saver | None:
    """A ``Saver`` when activations were asked for.  ``tokens``: the longest text, all told."""
    if not settings.save_activations:
        return None
    return Saver(model, settings.wanted(len(describe(model).blocks)), folder, tokens)
