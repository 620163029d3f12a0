"""Traces record which neurons a run used for each token.

``Run.trace`` writes a trace, ``read_trace`` reads it.  The file is safetensors, with one tensor per
column; docs/trace.md describes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dart_llm.errors import ConfigError, ResultsError
from dart_llm.files import write_bytes
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.forward import ForwardCall, PendingForward
from dart_llm.pruning.masks import LayerMask, Masks
from dart_llm.pruning.records import Remask, RunReport
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import TokenMask
from dart_llm.reporting import words

Array = NDArray[Any]

FORMAT = "dart-llm trace 1"

COLUMNS = ("sequence", "row", "position", "token_id", "phase", "mask")
"""Columns of int32 [N], one number per token.  ``row`` is the batch row.  ``mask`` is an index into
the file's tensor ``masks``; each entry is a mask of all layers."""

PHASES = ("prefill", "observe", "pruned", "released")
"""Names of the phases; the column ``phase`` has indices into this tuple."""

DENSE = -1
"""Value of the column ``mask`` for tokens that ran dense."""


def hook_name(layer: int) -> str:
    """Return TransformerLens' name for the activations of a layer's neurons, [B, T, I]."""
    return f"blocks.{layer}.mlp.hook_post"


def layer_slices(widths: Sequence[int]) -> list[slice]:
    """Return the slice of each layer's bytes in one mask of the tensor ``masks``.

    A mask has one bit per neuron, and each layer begins at a new byte.
    """
    ends = np.cumsum([-(-width // 8) for width in widths]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def check_traceable(config: PruneConfig) -> None:
    """Raise ``ConfigError`` for a method that does not select neurons."""
    if config.token is not None and not TOKEN_RULES.get(config.token.rule).selects_neurons:
        raise ConfigError(
            f"method {config.method} selects inputs of matrices, not neurons, so it cannot be "
            "traced: use a method with masks, or dart-token"
        )


class Trace:
    """Records a trace in memory; ``nbytes`` and ``tokens`` are those of the finished file."""

    def __init__(self, patch: ModelPatch, path: Path) -> None:
        if isdir(path):  # os.path.isdir never raises, even for very long names
            raise ConfigError(f"the trace {path} is a folder: give the name of a file")
        if not isdir(path.parent):
            raise ResultsError(f"cannot write the trace {path}: its folder does not exist")
        self.path, self.nbytes, self.tokens = path, 0, 0
        self.remasks: list[dict[str, Any]] = []
        self._patch = patch
        self._blocks = [layer.block for layer in patch.layers]
        self._widths = [block.down_width for block in self._blocks]
        self._slices = layer_slices(self._widths)
        self._ids: list[list[int]] | None = None
        self._masks: dict[int | None, tuple[Masks, int, Array, list[int]]] = {}
        """Key: batch row (None if rows share masks).  Value: the newest ``Masks``, the index in the
        tensor ``masks``, the bits, and the layers in which tokens select neurons."""
        self._before: dict[int | None, tuple[int, int]] = {}
        """Key: batch row.  Value: the newest sequence that got a mask, and the mask's index in
        ``masks``."""
        self._rows: list[tuple[int, ...]] = []
        self._bits: list[Array] = []

    def begin(self, ids: Tensor | None, decodes: bool) -> None:
        """Begin a forward of token ids [B, T]; ``ids`` is None if its input is embeddings."""
        self._ids = None if ids is None else ids.tolist()

    def remask(self, remask: Remask, state: SequenceState) -> None:
        """Record that masks were built."""
        number = DENSE if state.masks is None else self._number(state.row, state.masks)[0]
        sequence, before = self._before.get(state.row, (-1, None))
        numbers = {"mask": None, "before": before if sequence == state.sequence else None}
        if number != DENSE:
            self._before[state.row] = state.sequence, number
            numbers["mask"] = number
        self.remasks.append({**asdict(remask), **numbers})

    def record(self, pending: PendingForward, accepted: int, states: list[SequenceState]) -> None:
        """Record the first ``accepted`` tokens of a forward; later (rejected) ones are ignored."""
        call = pending.call
        for state, masks in zip(states, pending.plan.masks, strict=True) if accepted else ():
            phase, mask_of = PHASES.index(state.phase), self._masks_of(state.row, masks)
            for row, position in _tokens(call, accepted, state.row):
                mask = mask_of(row * call.tokens + position)
                token = -1 if self._ids is None else self._ids[row][position]
                self._rows.append((state.sequence, row, call.cached + position, token, phase, mask))

    def _masks_of(self, row: int | None, masks: Masks | None) -> Callable[[int], int]:
        """Return a function from a token's index in the flattened batch to its mask's index."""
        if masks is None:
            return lambda token: DENSE
        number, bits, layers = self._number(row, masks)
        if number != DENSE:
            return lambda token: number
        parts = [part.numpy() for part in self._patch.selected(layers)]

        def add_selected(token: int) -> int:
            selected = bits.copy()
            for layer, part in zip(layers, parts, strict=True):
                selected[self._slices[layer]] = part[token]
            return self._add(selected)

        return add_selected

    def _number(self, row: int | None, masks: Masks) -> tuple[int, Array, list[int]]:
        """Return the index in the tensor ``masks``, the bits, and the layers where tokens select.

        If there are such layers, the index is ``DENSE``, because each token adds its own mask.
        """
        cached = self._masks.get(row)
        if cached is None or cached[0] is not masks:
            bits = np.concatenate([_bits(*pair) for pair in zip(masks, self._widths, strict=True)])
            layers = [layer for layer, mask in enumerate(masks) if isinstance(mask, TokenMask)]
            number = DENSE if layers else self._add(bits)
            self._masks[row] = cached = (masks, number, bits, layers)
        return cached[1:]

    def _add(self, bits: Array) -> int:
        self._bits.append(bits)
        return len(self._bits) - 1

    def finish(self, model: Any, report: RunReport) -> None:
        """Write the file; ``report``: the run's, for the metadata."""
        from safetensors.numpy import save

        names = {id(module): name for name, module in model.named_modules()}
        numbers = np.array(self._rows, np.int32).reshape(-1, len(COLUMNS))
        arrays: dict[str, Array] = {
            name: numbers[:, column].copy() for column, name in enumerate(COLUMNS)
        }
        arrays["masks"] = np.array(self._bits, np.uint8).reshape(-1, self._slices[-1].stop)
        layers = []
        for layer, block in enumerate(self._blocks):
            entry = {"layer": layer, "width": self._widths[layer], "hook": hook_name(layer)}
            layers.append({**entry, "module": names.get(id(block.down), "")})
        checkpoint = checkpoint_facts(model)
        metadata = {
            "format": FORMAT,
            "checkpoint": str(checkpoint.get("name")),
            "checkpoint_sha256": str(checkpoint.get("sha256")),
            "dtype": str(checkpoint.get("dtype")),
            "method": report.method,
            "executor": report.executor,
            "achieved_sparsity": f"{report.achieved_sparsity:.6f}",
            "phases": ",".join(PHASES),
            "layers": json.dumps(layers),
            "neurons": str(sum(self._widths)),
            "remasks": json.dumps(self.remasks),
        }
        data = save(arrays, metadata)
        write_bytes(self.path, data)
        self.nbytes, self.tokens = len(data), len(self._rows)


def _tokens(call: ForwardCall, count: int, row: int | None) -> Iterator[tuple[int, int]]:
    """Yield (batch row, index) of the first ``count`` tokens of every row, or only of ``row``.

    Padding and the tokens of finished rows are skipped.
    """
    live = None if call.live is None else call.live.tolist()
    valid = None if call.valid is None else call.valid.tolist()
    for index in range(call.rows) if row is None else (row,):
        for position in range(count) if live is None or live[index] else ():
            if valid is None or valid[index][position]:
                yield index, position


def _bits(mask: LayerMask | None, width: int) -> Array:
    """Return bytes: bit i % 8 of byte i // 8 is set if neuron i is kept.

    All bits are set without a mask, and none if each token selects its neurons.
    """
    marks = np.full(width, mask is None)
    if mask is not None and not isinstance(mask, TokenMask):
        marks[mask.ids.cpu().numpy()] = True
    return np.packbits(marks, bitorder="little")


def _marks(bits: Array, width: int) -> Array:
    """Return ``bits`` (see ``_bits``) as bool, [..., width]."""
    return np.unpackbits(bits, axis=-1, count=width, bitorder="little").astype(bool)


def read_trace(path: str | Path) -> TraceFile:
    """Read a trace that ``Run.trace`` or ``dart-llm run --trace`` wrote.

    Raises ``ConfigError`` for a file that is missing, damaged or not a trace.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}; trace it again") from None
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path} is not in format {FORMAT}: give a file that run.trace wrote")
    return TraceFile(dict(metadata), arrays)


@dataclass(frozen=True)
class TraceFile:
    """A trace that was read from a file, with N tokens, M masks and L layers.

    ``facts``: the file's metadata, as strings.  ``arrays``: its columns, as numpy arrays by name.
    """

    facts: dict[str, str]
    arrays: dict[str, Array]

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        """For each layer: ``layer``, ``width`` (number of neurons), ``hook`` (TransformerLens' name
        for the activations) and ``module`` (the model's name for the down projection)."""
        layers: list[dict[str, Any]] = json.loads(self.facts["layers"])
        return layers

    @cached_property
    def remasks(self) -> list[dict[str, Any]]:
        """One record (``Remask``) each time masks were built, the first time included.  ``mask`` is
        the mask's index in ``masks`` (None if each token selects its neurons), and ``before`` that
        of the sequence's previous mask (None if there was none)."""
        records: list[dict[str, Any]] = json.loads(self.facts["remasks"])
        return records

    def __repr__(self) -> str:
        tokens, masks = len(self.arrays["mask"]), len(self.arrays["masks"])
        counts = {"token": tokens, "layer": len(self.layers), "mask": masks}
        return "trace of " + ", ".join(words.count(number, noun) for noun, number in counts.items())

    @cached_property
    def _slices(self) -> list[slice]:
        return layer_slices([layer["width"] for layer in self.layers])

    def neurons(self, mask: int, layer: int) -> Array:
        """Return the neurons of ``layer`` that ran under mask number ``mask`` (or ``DENSE``).

        The ids are ascending, int64 [k].  Raises ``ConfigError`` for a mask or layer that does not
        exist.
        """
        count, layers = len(self.arrays["masks"]), len(self.layers)
        if not (DENSE <= mask < count and 0 <= layer < layers):
            raise ConfigError(
                f"this trace has no mask {mask} of layer {layer}: masks go from {DENSE} (all "
                f"neurons) to {count - 1}, layers from 0 to {layers - 1}"
            )
        width = self.layers[layer]["width"]
        if mask == DENSE:
            return np.arange(width)
        return np.flatnonzero(_marks(self.arrays["masks"][mask, self._slices[layer]], width))

    @cached_property
    def stayed(self) -> Array:
        """[N] bool: False if a later token overwrote the token's position in the cropped cache."""
        sequences = np.stack([self.arrays[name] for name in ("sequence", "row")])
        stays = np.ones(sequences.shape[1], bool)
        for group in np.unique(sequences, axis=1).T:
            members = np.flatnonzero((sequences == group[:, None]).all(0))
            at = self.arrays["position"][members]
            later = np.minimum.accumulate(at[::-1])[::-1]
            stays[members[:-1]] = at[:-1] < later[1:]
        return stays

    def rows(self, layers: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Yield one row per token and layer (``layers``, or all), e.g. for ``pandas.DataFrame``.

        ``neurons`` has the ids of the neurons that ran.  Raises ``ConfigError`` for a layer that
        does not exist.
        """
        chosen = [*range(len(self.layers))] if layers is None else layers
        masks = {DENSE, *self.arrays["mask"].tolist()}
        ids = {(mask, layer): self.neurons(mask, layer) for mask in masks for layer in chosen}
        tokens = zip(*(self.arrays[name].tolist() for name in COLUMNS), strict=True)
        for number, values in enumerate(tokens):
            token = {"token": number, **dict(zip(COLUMNS, values, strict=True))}
            token |= {"phase": PHASES[token["phase"]], "stayed": bool(self.stayed[number])}
            for layer in chosen:
                neurons = ids[token["mask"], layer]
                yield {**token, "layer": layer, "hook": hook_name(layer), "neurons": neurons}

    def remask_rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per record of ``remasks`` (the first mask too) and layer.

        A row has the record, and two arrays of neuron ids.  ``grown``: neurons that the new mask
        keeps, but the previous mask of the same sequence and batch row did not.  ``dropped``: the
        opposite.  A first mask is compared with all neurons.  Both arrays are None if each token
        selects its neurons.
        """
        for number, remask in enumerate(self.remasks):
            for layer, kept in enumerate(remask["kept"]):
                grown = dropped = None
                if remask["mask"] is not None:
                    before = DENSE if remask["before"] is None else remask["before"]
                    old, new = (self.neurons(mask, layer) for mask in (before, remask["mask"]))
                    grown, dropped = np.setdiff1d(new, old), np.setdiff1d(old, new)
                row = {"remask": number, **remask, "layer": layer, "hook": hook_name(layer)}
                yield {**row, "kept": kept, "grown": grown, "dropped": dropped}
