"""Chooses one mask for several texts, and writes the pruned model as a GGUF file for llama.cpp."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.models.describe import context_length
from dart_llm.models.gguf_write import block_of, layer_widths
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import Ids, Masks
from dart_llm.pruning.statistics import LayerStatistics, summed
from dart_llm.session.export import GgufExport, source_file, write_masks
from dart_llm.session.run import Run, prepare

logger = logging.getLogger("dart_llm")


def export_gguf(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    texts: Sequence[str] = (),
    method: str | PruneConfig = "griffin",
    *,
    sparsity: float | None = None,
    masks: Ids | None = None,
    source: str | Path | None = None,
    calibration: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = logger.info,
    **settings: Any,
) -> GgufExport:
    """Choose one mask for ``texts`` and write it to ``path``, a GGUF file that llama.cpp loads.

    Each text is a separate prompt, cut to the model's context; the observed activations (evidence)
    of all texts are summed.  The number of kept neurons in each layer is rounded up to a multiple
    of the quantization block of the file's down projections.
    ``masks``: {layer: ids to keep}, instead of a method.  ``source``: the GGUF file to narrow;
    None: the file that the model was loaded from.  ``calibration``, ``cache_dir``: for methods that
    calibrate, as on the command line.  ``settings``: fields of ``PruneConfig``.

    Raises ``ConfigError`` for what a GGUF file cannot express: per-token selection and mixtures of
    experts; in some architectures also unequal widths or compensation.  Raises ``ResultsError`` if
    ``path`` cannot be written.
    """
    file = source_file(model, source)
    layer_widths(file)  # raises for unsupported files, before anything is learned
    config = exportable(PruneConfig.build(method, sparsity=sparsity, **settings), say)
    bound = prepare(model, tokenizer, config, calibration, cache_dir, say, masks)
    run = bound.run(likelihood=True)
    if run is None or not run.asks_for_pruning:
        raise ConfigError(f"method {bound.label} removes nothing: give a sparsity above 0")
    context = context_length(model)
    prompts = [tokenizer(text, return_tensors="pt", verbose=False).input_ids for text in texts]
    prompts = [ids[:, :context].to(model.device) for ids in prompts if ids.shape[1]]
    chosen, counts = choose_masks(run, prompts, block_of(file))
    return write_masks(file, chosen, path, counts, bound.label)


def exportable(config: PruneConfig, say: Callable[[str], None]) -> PruneConfig:
    """Return ``config`` without what a file cannot express; raises for per-token selection."""
    if config.token is not None:
        raise ConfigError(
            f"method {config.method} selects neurons for each token, but a file has one mask: "
            "use a method with sequence masks, such as griffin or dart"
        )
    if config.compensation_rank:
        say("a GGUF file cannot have low-rank compensation: only the mean is written")
    return config.replace({"compensation_rank": 0, "head": "full"})


def choose_masks(run: Run, prompts: Sequence[Tensor], block: int) -> tuple[Masks, tuple[int, ...]]:
    """Return one mask per layer for several prompts, ids [1, T] each, and the requested counts.

    The requested counts say how many neurons the method keeps in each layer.  The masks keep these
    counts, rounded up to multiples of ``block``; fixed masks are returned unchanged.  Raises
    ``ConfigError`` if the method needs a prompt and there is none.
    """
    if run.fixed_masks is not None:
        pairs = zip(run.fixed_masks, run.layers, strict=True)
        return run.fixed_masks, tuple(w.width if m is None else m.kept for m, w in pairs)
    if not prompts and run.controller.selector.needs_evidence:
        raise ConfigError(
            f"method {run.config.method} selects neurons from a prompt: give --prompt or --text"
        )

    def observed() -> Iterator[Sequence[LayerStatistics]]:
        for ids in prompts:
            run.model(ids, use_cache=False, logits_to_keep=1)
            yield run.controller.sequences[-1].evidence

    with torch.no_grad(), run:
        selector, layers = run.controller.selector, run.layers
        evidence = summed(observed(), [layer.device for layer in layers])
        with torch.inference_mode(False):
            requested = selector.select(evidence).counts
            rounded = [math.ceil(count / block) * block for count in requested]
            counts = [min(n, layer.width) for n, layer in zip(rounded, layers, strict=True)]
            return selector.select(evidence, counts).masks, requested
