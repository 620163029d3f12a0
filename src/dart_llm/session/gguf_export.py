"""One mask of a sequence, of a prompt or of many texts, as a GGUF file that llama.cpp loads."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.files import file_sha256
from dart_llm.models.checkpoint import blocks_file
from dart_llm.models.describe import context_length
from dart_llm.models.gguf_file import GgufFile, read_gguf
from dart_llm.models.gguf_write import (
    DOWN,
    NarrowLayer,
    block_of,
    layer_widths,
    rounded_columns,
    write_narrow,
    written_architecture,
    written_kind,
)
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import USER_MASKS, LayerMask, Masks
from dart_llm.pruning.statistics import LayerStatistics, summed
from dart_llm.session.export import check_plain
from dart_llm.session.prepare import prepare
from dart_llm.session.run import Run

logger = logging.getLogger("dart_llm")

METHOD = "griffin"
"""What chooses the neurons of an exported file unless something else is said."""


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Per layer: ``neurons`` of the model, how many the method ``asked`` to keep, and how many are
    ``written``: a multiple of ``block``.  ``kinds``: types of the down projections, and those that
    they are written in; ``rounded``: fraction of their columns that lie in another block than
    before, and are rounded for that.
    Bytes are those of the files.
    """

    path: Path
    source: Path
    architecture: str
    method: str
    neurons: tuple[int, ...]
    asked: tuple[int, ...]
    written: tuple[int, ...]
    block: int
    compensated: bool
    kinds: Mapping[str, str]
    rounded: float
    bytes_before: int
    bytes: int

    @property
    def achieved_sparsity(self) -> float:
        """Fraction of the neurons that the file has no more."""
        return 1 - sum(self.written) / sum(self.neurons)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        names = {"path": str(self.path), "source": self.source.name}
        return {**asdict(self), **names, "achieved_sparsity": self.achieved_sparsity}


def export_gguf(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    texts: Sequence[str] = (),
    method: str | PruneConfig = METHOD,
    *,
    sparsity: float | None = None,
    masks: Mapping[int, Sequence[int] | Tensor] | None = None,
    source: str | Path | None = None,
    calibration: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = logger.info,
    **settings: Any,
) -> GgufExport:
    """Choose one mask for ``texts`` and write it to ``path``, a GGUF file that llama.cpp loads.

    Every text is read on its own, as a prompt, up to the model's context, and what is observed of
    them is added up.  Counts are rounded up to whole blocks of the file's down projections.
    ``masks``: {layer: ids to keep} of your own instead.  ``source``: the GGUF file that is
    narrowed; None: that whose blocks the model holds.  ``calibration``, ``cache_dir``: for methods
    that calibrate, as of the command line.  ``settings``: fields of ``PruneConfig``.

    Raises ``ConfigError`` for what no such file can hold: neurons that every token chooses, layers
    of unequal widths or compensation in an architecture without them, a mixture of experts; and
    ``ResultsError`` where ``path`` cannot be written.
    """
    file = source_file(model, source)
    layer_widths(file)  # raises for a file of another kind, before anything is learnt
    config = exportable(PruneConfig.build(method, sparsity=sparsity, **settings), say)
    ready = prepare(model, tokenizer, config, calibration, cache_dir, say, masks)
    run = ready.run(likelihood=True)
    if run is None or not run.asks_for_pruning:
        raise ConfigError(f"method {ready.label} removes nothing: give a sparsity above 0")
    chosen, asked = choose_masks(run, _prompts(model, tokenizer, texts), block_of(file))
    return write_masks(file, chosen, path, asked, ready.label)


def source_file(model: Any, source: str | Path | None = None) -> GgufFile:
    """The file to narrow: ``source``, or what ``model`` was loaded from.

    Raises ``ConfigError`` where the model holds no file's blocks.
    """
    path = blocks_file(model) if source is None else Path(source).expanduser()
    if path is None:
        raise ConfigError(
            f"{type(model).__name__} was not loaded from the blocks of a GGUF file, and only such "
            "a file is narrowed: load one with weights='file' or give source=FILE.gguf, which "
            "llama.cpp's convert_hf_to_gguf.py makes of a checkpoint"
        )
    return read_gguf(path)


def exportable(config: PruneConfig, say: Callable[[str], None]) -> PruneConfig:
    """``config`` without what no file holds; raises ``ConfigError`` where nothing is left."""
    if config.token is not None:
        raise ConfigError(
            f"method {config.method} chooses neurons for every token, and a file holds one mask: "
            "choose a method of the sequence, such as griffin or dart"
        )
    if config.compensation_rank:
        say("low-rank compensation has no place in a GGUF file: the mean alone is written")
    return config.replace({"compensation_rank": 0, "head": "full"})


def _prompts(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    most = context_length(model)
    found = [tokenizer(text, return_tensors="pt", verbose=False).input_ids for text in texts]
    return [ids[:, :most].to(model.device) for ids in found if ids.shape[1]]


def choose_masks(
    run: Run, prompts: Sequence[Tensor], block: int = 1
) -> tuple[Masks, tuple[int, ...]]:
    """The masks of a run for several prompts, ids [1, T] each, and the counts that it asks for.

    Counts are rounded up to multiples of ``block``, but masks that are held stay as they are.
    Raises ``ConfigError`` where a prompt is needed and none is there.
    """
    if run.fixed_masks is not None:
        kept = zip(run.fixed_masks, run.layers, strict=True)
        return run.fixed_masks, tuple(w.width if m is None else m.kept for m, w in kept)
    if not prompts and run.controller.selector.needs_evidence:
        raise ConfigError(
            f"method {run.config.method} chooses neurons by what it reads: give --prompt or --text"
        )
    with torch.no_grad(), run:
        selector, layers = run.controller.selector, run.layers
        evidence = summed(_observed(run, prompts), [layer.device for layer in layers])
        with torch.inference_mode(False):
            asked = selector.select(evidence).counts
            whole = [math.ceil(count / block) * block for count in asked]
            counts = [min(n, layer.width) for n, layer in zip(whole, layers, strict=True)]
            return selector.select(evidence, counts).masks, asked


def _observed(run: Run, prompts: Sequence[Tensor]) -> Iterator[Sequence[LayerStatistics]]:
    for ids in prompts:
        run.model(ids, use_cache=False, logits_to_keep=1)
        yield run.controller.sequences[-1].evidence


def write_masks(
    file: GgufFile,
    masks: Masks,
    path: str | Path,
    asked: Sequence[int] | None = None,
    label: str = USER_MASKS,
) -> GgufExport:
    """Narrow ``file`` to ``masks`` and write it to ``path``; ``asked``: counts, ``label``: method.

    Raises ``ConfigError`` for masks that no such file can hold, as ``export_gguf``.
    """
    check_plain(masks)
    neurons, block, path = layer_widths(file), block_of(file), Path(path)
    known = [None if mask is None else mask.width for mask in masks]
    if len(known) != len(neurons) or any(
        one not in (None, width) for one, width in zip(known, neurons, strict=True)
    ):
        raise ConfigError(
            f"{file.path.name} has {len(neurons)} layers of {neurons[0]} neurons, and these masks "
            "are of another model: give its file"
        )
    layers = [None if mask is None else _narrow(mask, block) for mask in masks]
    pairs = list(zip(neurons, layers, strict=True))
    written = tuple(width if one is None else one.width for width, one in pairs)
    kept = tuple(width if one is None else len(one.ids) for width, one in pairs)
    downs = [file.tensors[DOWN.format(layer)].kind for layer in range(len(layers))]
    narrow = [(kind, one) for kind, one in zip(downs, layers, strict=True) if one is not None]
    if written == tuple(neurons):
        raise ConfigError(
            f"in whole blocks of {block} neurons no layer loses any: give a higher sparsity"
        )
    rounded = sum(rounded_columns(kind, one) for kind, one in narrow)
    facts = {"method": label, "kept": sum(kept), "of": sum(neurons)}
    write_narrow(file, layers, path, json.dumps({**facts, "source": file_sha256(file.path)}))
    return GgufExport(
        path=path,
        source=file.path,
        architecture=written_architecture(file, layers),
        method=label,
        neurons=tuple(neurons),
        asked=tuple(asked or kept),
        written=written,
        block=block,
        compensated=any(one is not None and one.bias is not None for one in layers),
        kinds={kind.upper(): written_kind(kind).upper() for kind, _ in narrow},
        rounded=rounded / max(1, sum(len(one.ids) for _, one in narrow)),
        bytes_before=file.path.stat().st_size,
        bytes=path.stat().st_size,
    )


def _narrow(mask: LayerMask, block: int) -> NarrowLayer:
    width = min(math.ceil(mask.kept / block) * block, mask.width)
    return NarrowLayer(mask.ids.cpu(), width, mask.bias)
