"""Which neurons each token of an attached run used, written while it runs: ``Run.trace``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.models.capture import LayerActivations
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.patching.patch import ModelPatch
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.forward import ForwardCall, Kind, PendingForward
from dart_llm.pruning.masks import LayerMask, Masks
from dart_llm.pruning.records import Remask, RunReport
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.weights import norms_of
from dart_llm.session.trace_file import (
    COLUMNS,
    DENSE,
    FORMAT,
    PHASES,
    Array,
    ColumnFile,
    hook_name,
    layer_slices,
    norm_name,
)

CHUNK_TOKENS, CHUNK_BYTES = 256, 1 << 22
"""What memory holds at most before it goes to the disk, and one forward beside it."""


class Trace:
    """One trace that is being written; ``nbytes``: of the finished file."""

    def __init__(self, patch: ModelPatch, path: Path, activations: bool) -> None:
        if isdir(path):  # which takes any name
            raise ConfigError(f"the trace {path} is a folder: give the name of a file")
        if activations and patch.executor != "masked":
            raise ConfigError(
                f"executor {patch.executor} never computes the activations of what it skips, nor "
                'shows the others: give executor="masked" to trace activations, or trace without '
                "them"
            )
        self.path, self.activations, self.nbytes = path, activations, 0
        self.tokens = 0
        """Tokens that are on the disk."""
        self._patch = patch
        self._blocks = [layer.block for layer in patch.layers]
        self._widths = [block.down_width for block in self._blocks]
        self._slices = layer_slices(self._widths)
        self._ids: list[list[int]] | None = None
        self._decodes = False
        self._u: dict[int, Tensor] = {}
        """Of the newest forward that decodes, [B, T, I] by layer."""
        self._masks: dict[int | None, tuple[Masks, int, Array, list[int]]] = {}
        """By batch row: the newest masks, their number, their bits, layers whose tokens select."""
        self._before: dict[int | None, tuple[int, int]] = {}
        """By batch row: the newest sequence with a mask, and the mask's number."""
        self.remasks: list[dict[str, Any]] = []
        self._rows: list[tuple[int, ...]] = []
        self._bits: list[Array] = []
        self._count = 0
        self._values: dict[int, list[Array]] = {n: [] for n in range(len(self._widths))}
        self._buffered = 0
        self._file = ColumnFile(path, self._columns(self._slices[-1].stop))

    def _columns(self, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        layers = range(len(self._widths)) if self.activations else ()
        values = [name(n) for name in (hook_name, norm_name) for n in layers]
        made: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(COLUMNS, ("<i4", ()))
        return {**made, **dict.fromkeys(values, ("<f4", ())), "masks": ("|u1", (size,))}

    # what the run reports

    def begin(self, ids: Tensor | None, decodes: bool) -> None:
        """A forward comes: its token ids [B, T], None where it was given embeddings."""
        self._ids = None if ids is None else ids.tolist()
        self._decodes = decodes
        self._u = {}

    def see(self, layer: int, seen: LayerActivations) -> None:
        """A layer's activations."""
        if self._decodes:
            self._u[layer] = seen.u

    def remask(self, remask: Remask, state: SequenceState) -> None:
        """Masks were built."""
        number = None if state.masks is None else self._number(state.row, state.masks)[0]
        number = None if number == DENSE else number
        sequence, before = self._before.get(state.row, (-1, None))
        if number is not None:
            self._before[state.row] = state.sequence, number
        before = before if sequence == state.sequence else None
        self.remasks.append({**asdict(remask), "mask": number, "before": before})

    def take(self, pending: PendingForward, accepted: int, states: list[SequenceState]) -> None:
        """The first ``accepted`` tokens of a forward stayed."""
        call = pending.call
        for state, masks in zip(states, pending.plan.masks, strict=True) if accepted else ():
            phase, mask_of = PHASES.index(state.phase), self._masks_of(state.row, masks)
            for row, position in _tokens(call, accepted, state.row):
                mask, bits = mask_of(row * call.tokens + position)
                token = -1 if self._ids is None else self._ids[row][position]
                self._rows.append((state.sequence, row, call.cached + position, token, phase, mask))
                if self.activations and call.kind is Kind.DECODE:
                    self._keep_values(row, position, bits, masks)
        if len(self._rows) >= CHUNK_TOKENS or self._buffered >= CHUNK_BYTES:
            self._flush()

    def _masks_of(
        self, row: int | None, masks: Masks | None
    ) -> Callable[[int], tuple[int, Array | None]]:
        """Gives number and bits of what each token ran, by its place in [B T] of the forward."""
        if masks is None:
            return lambda token: (DENSE, None)
        number, bits, layers = self._number(row, masks)
        if number != DENSE:
            return lambda token: (number, bits)
        parts = [part.numpy() for part in self._patch.selected(layers)]

        def bits_of(token: int) -> tuple[int, Array]:
            selected = bits.copy()
            for layer, part in zip(layers, parts, strict=True):
                selected[self._slices[layer]] = part[token]
            return self._add(selected), selected

        return bits_of

    def _number(self, row: int | None, masks: Masks) -> tuple[int, Array, list[int]]:
        """The number of ``masks``, their bits, and layers whose tokens select: then ``DENSE``."""
        cached = self._masks.get(row)
        if cached is None or cached[0] is not masks:
            bits = np.concatenate([_bits(*pair) for pair in zip(masks, self._widths, strict=True)])
            layers = _selecting(masks)
            number = DENSE if layers else self._add(bits)
            self._masks[row] = cached = (masks, number, bits, layers)
        return cached[1:]

    def _add(self, bits: Array) -> int:
        self._bits.append(bits)
        self._buffered += bits.nbytes
        self._count += 1
        return self._count - 1

    def _keep_values(
        self, row: int, position: int, bits: Array | None, masks: Masks | None
    ) -> None:
        for layer, width in enumerate(self._widths):
            seen, mask = self._u[layer][row, position].float(), masks[layer] if masks else None
            mean = mask.mean if isinstance(mask, TokenMask) else None
            if mean is not None and not self._blocks[layer].inline:  # which is shown u itself
                seen = seen + mean
            u = seen.cpu().numpy()
            if bits is not None:
                part = bits[self._slices[layer]]
                u = u[np.unpackbits(part, count=width, bitorder="little").astype(bool)]
            self._values[layer].append(u)
            self._buffered += u.nbytes

    # the file

    def _flush(self) -> None:
        """Write everything that is in memory."""
        numbers = np.array(self._rows, np.int32).reshape(-1, len(COLUMNS))
        for column, name in enumerate(COLUMNS):
            self._file.append(name, numbers[:, column])
        if self._bits:
            self._file.append("masks", np.stack(self._bits))
        for layer, parts in self._values.items():
            if parts:
                self._file.append(hook_name(layer), np.concatenate(parts))
                parts.clear()
        self.tokens += len(self._rows)
        self._rows, self._bits, self._buffered = [], [], 0

    def finish(self, model: Any, report: RunReport) -> None:
        """Write the file."""
        self._flush()
        names = {id(module): name for name, module in model.named_modules()}
        layers = []
        for layer, block in enumerate(self._blocks):
            facts = {"layer": layer, "width": self._widths[layer], "hook": hook_name(layer)}
            layers.append({**facts, "module": names.get(id(block.down), "")})
            if self.activations:
                norms = norms_of(block.matrices()[2].detach(), 0).cpu().numpy()
                self._file.append(norm_name(layer), norms)
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
        self.nbytes = self._file.finish(metadata)

    def close(self) -> None:
        """Leave nothing behind but the file that was finished."""
        self._file.close()


def _tokens(call: ForwardCall, count: int, row: int | None) -> Iterator[tuple[int, int]]:
    """Row and place of the first ``count`` tokens of each row (of ``row`` alone): neither padding
    nor what follows the end of a row.
    """
    live = None if call.live is None else call.live.tolist()
    valid = None if call.valid is None else call.valid.tolist()
    for index in range(call.rows) if row is None else (row,):
        for position in range(count) if live is None or live[index] else ():
            if valid is None or valid[index][position]:
                yield index, position


def _selecting(masks: Masks) -> list[int]:
    """Layers whose tokens select their neurons."""
    return [layer for layer, mask in enumerate(masks) if isinstance(mask, TokenMask)]


def _bits(mask: LayerMask | None, width: int) -> Array:
    """Bit i % 8 of byte i / 8 for each kept neuron i; zeros where tokens select."""
    marks = np.ones(width, bool)
    if mask is not None:
        marks[:] = False
        if not isinstance(mask, TokenMask):
            marks[mask.ids.cpu().numpy()] = True
    return np.packbits(marks, bitorder="little")


def check_traceable(config: PruneConfig) -> None:
    """Raise ``ConfigError`` for a method that selects no neurons."""
    if config.token is not None and not TOKEN_RULES.get(config.token.rule).selects_neurons:
        raise ConfigError(
            f"method {config.method} selects inputs of matrices, not neurons, so that there are "
            "none to trace: use a method with masks, or dart-token"
        )
