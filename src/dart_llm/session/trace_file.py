"""A trace in a file: safetensors, a column per tensor.  Written by pieces; read without torch.

docs/trace.md describes every column; ``COLUMNS`` is what all traces have.  pandas is needed by
``TraceFile.frame`` and ``.remasks`` alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dart_llm.errors import ConfigError, MissingExtra, ResultsError
from dart_llm.reporting import words

Array = NDArray[Any]

FORMAT = "dart-llm trace 1"

COLUMNS = ("sequence", "row", "position", "token_id", "phase", "mask")
"""int32 [N], one number per token."""

PHASES = ("prefill", "observe", "pruned", "released")
"""What ``phase`` counts."""

DENSE = -1
"""In ``mask``: every neuron ran."""

_KINDS = {"<f4": "F32", "<i4": "I32", "|u1": "U8"}


def hook_name(layer: int) -> str:
    """What TransformerLens calls the activations of a layer's neurons, [batch, pos, d_mlp]."""
    return f"blocks.{layer}.mlp.hook_post"


def norm_name(layer: int) -> str:
    """The column of the norms of a layer's output weights."""
    return f"blocks.{layer}.mlp.W_out.norm"


def layer_slices(widths: Sequence[int]) -> list[slice]:
    """Where the bytes of each layer lie in a row of ``masks``: a bit per neuron."""
    ends = np.cumsum([-(-width // 8) for width in widths]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass
class _Column:
    file: BinaryIO
    dtype: np.dtype[Any]
    row: tuple[int, ...]
    rows: int = 0


class ColumnFile:
    """Columns of a safetensors file that grow by pieces; memory holds none of them.

    They lie in a hidden folder beside ``path`` until ``finish`` joins them.  Raises
    ``ResultsError`` where something cannot be written.
    """

    def __init__(self, path: Path, columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """``columns``: dtype and shape of a row, by name."""
        self.path = path
        self._columns: dict[str, _Column] = {}
        try:
            path.exists()  # an error where the name is too long
            made = tempfile.mkdtemp(".part", f".{path.name[:50]}.", path.parent)
            self._folder = Path(made)
            for number, (name, (dtype, row)) in enumerate(columns.items()):
                file = (self._folder / str(number)).open("w+b")
                self._columns[name] = _Column(file, np.dtype(dtype), row)
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> ResultsError:
        return ResultsError(f"cannot write the trace {self.path}: {error.strerror or error}")

    def append(self, name: str, rows: Array) -> None:
        """Add ``rows`` [n, ...] to a column."""
        column = self._columns[name]
        data = np.ascontiguousarray(rows, column.dtype)
        assert data.shape[1:] == column.row
        try:
            column.file.write(data.data)
        except OSError as error:
            raise self._cannot(error) from None
        column.rows += len(data)

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Join the columns at ``path``, whole or not at all; the bytes of the file."""
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for name, column in self._columns.items():
            size = int(np.prod(column.row, initial=column.dtype.itemsize))
            start, end = end, end + column.rows * size
            shape = [column.rows, *column.row]
            kind = _KINDS[column.dtype.str]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        data = json.dumps(header, separators=(",", ":")).encode()
        data = data.ljust(-(-len(data) // 8) * 8)
        joined = self._folder / "joined"
        try:
            with joined.open("wb") as file:
                file.write(len(data).to_bytes(8, "little") + data)
                for column in self._columns.values():
                    column.file.seek(0)
                    shutil.copyfileobj(column.file, file)
                    column.file.truncate(0)  # never twice on the disk, but for this one
            joined.replace(self.path)
        except OSError as error:
            raise self._cannot(error) from None
        return len(data) + 8 + end

    def close(self) -> None:
        """Leave nothing behind but what ``finish`` wrote."""
        for column in self._columns.values():
            column.file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def read_trace(path: str | Path) -> TraceFile:
    """The trace in a file that ``Run.trace`` or ``dart-llm run --trace`` wrote.

    Raises ``ConfigError`` for a file that is missing, damaged, or no trace.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ConfigError(
                    f"{path} is not a trace that this version reads (its format is "
                    f"{facts.get('format', 'missing')}, not {FORMAT}): give a file that "
                    "run.trace or dart-llm run --trace wrote"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        trace = TraceFile(dict(facts), arrays)
        trace.check()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"cannot read the trace {path}: {reason}; a run that was killed leaves none, so "
            "trace it again"
        ) from None
    return trace


@dataclass(frozen=True)
class TraceFile:
    """A trace that was read.  N tokens, M masks, L layers.

    ``facts``: the file's metadata, strings.  ``arrays``: its columns, numpy, by name.
    """

    facts: dict[str, str]
    arrays: dict[str, Array]

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        """Of each layer ``layer``, ``width`` (neurons), ``hook`` (TransformerLens' name of its
        activations) and ``module`` (the model's name of what they are the input of).
        """
        facts: list[dict[str, Any]] = json.loads(self.facts["layers"])
        return facts

    @cached_property
    def remasks(self) -> list[dict[str, Any]]:
        """The records of all re-masks (``Remask``), with ``mask`` and ``before``: rows of the
        column ``masks``, None where tokens select, or where there was none before.
        """
        records: list[dict[str, Any]] = json.loads(self.facts["remasks"])
        return records

    @property
    def has_activations(self) -> bool:
        """Whether activations were kept."""
        return hook_name(0) in self.arrays

    def check(self) -> None:
        """Raise ``ValueError``, ``TypeError`` or ``KeyError`` where parts do not fit together."""
        numbers, masks = self.arrays["mask"], self.arrays["masks"]
        bits = sum(-(-entry["width"] // 8) for entry in self.layers)
        shapes = {self.arrays[name].shape for name in COLUMNS}
        if shapes != {(len(numbers),)} or masks.shape[1:] != (bits,):
            raise ValueError("its columns have lengths that do not fit")
        if ((numbers < DENSE) | (numbers >= len(masks))).any():
            raise ValueError("it names masks that it does not have")
        if not all({"mask", "before", "kept"} <= entry.keys() for entry in self.remasks):
            raise ValueError("its re-masks are not complete")
        for layer in range(len(self.layers)) if self.has_activations else ():
            ran = int(self._counts(layer)[self._has_values].sum())
            if self.arrays[hook_name(layer)].shape != (ran,):
                raise ValueError(f"layer {layer} does not have the activations of all tokens")

    def __repr__(self) -> str:
        tokens, masks = len(self.arrays["mask"]), len(self.arrays["masks"])
        counts = {"token": tokens, "layer": len(self.layers), "mask": masks}
        return "trace of " + ", ".join(words.count(number, noun) for noun, number in counts.items())

    # which neurons

    @cached_property
    def _slices(self) -> list[slice]:
        return layer_slices([layer["width"] for layer in self.layers])

    def _marks(self, layer: int) -> Array:
        """[M + 1, I] bool; the last row are all neurons, for ``DENSE``."""
        width = self.layers[layer]["width"]
        bits = self.arrays["masks"][:, self._slices[layer]]
        marks = np.unpackbits(bits, axis=1, count=width, bitorder="little").astype(bool)
        return np.concatenate([marks, np.ones((1, width), bool)])

    def _counts(self, layer: int) -> Array:
        """How many neurons ran for each token, [N]."""
        counts: Array = self._marks(layer).sum(1)[self.arrays["mask"]]
        return counts

    def neurons(self, mask: int, layer: int) -> Array:
        """Ids of the neurons of ``layer`` that ran under row ``mask`` of ``masks`` (or ``DENSE``),
        ascending, int64 [k].  Raises ``ConfigError`` for a mask or a layer that is not there.
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
        bits = self.arrays["masks"][mask, self._slices[layer]]
        return np.flatnonzero(np.unpackbits(bits, count=width, bitorder="little"))

    @cached_property
    def stayed(self) -> Array:
        """[N] bool: False where a later token of the sequence and row took a token's place."""
        sequences = np.stack([self.arrays[name] for name in ("sequence", "row")])
        stays = np.ones(sequences.shape[1], bool)
        for group in np.unique(sequences, axis=1).T:
            members = np.flatnonzero((sequences == group[:, None]).all(0))
            at = self.arrays["position"][members]
            later = np.minimum.accumulate(at[::-1])[::-1]
            stays[members[:-1]] = at[:-1] < later[1:]
        return stays

    # tables: columns as numpy arrays and lists, and pandas frames of them

    @property
    def _has_values(self) -> Array:
        decoded: Array = self.arrays["phase"] != PHASES.index("prefill")
        return decoded

    def _values(self, layer: int, neurons: Sequence[Array]) -> Iterator[tuple[Array, Array]]:
        """Activations and contributions of each token; not-a-number for a prompt's."""
        flat, norms = self.arrays[hook_name(layer)], self.arrays[norm_name(layer)]
        none = np.full(len(norms), np.nan, np.float32)
        start = 0
        for ids, has_values in zip(neurons, self._has_values, strict=True):
            if not has_values:
                yield none[: len(ids)], none[: len(ids)]
                continue
            part = flat[start : start + len(ids)]
            yield part, part * norms[ids]
            start += len(ids)

    def columns(self, layers: Sequence[int] | None = None) -> dict[str, Any]:
        """The table of ``frame``, by column: numpy arrays, each with a number per row."""
        every = range(len(self.layers))
        chosen = list(every if layers is None else layers)
        if missing := [n for n in chosen if n not in every]:
            raise ConfigError(f"this trace has no layer {missing[0]}: layers go to {every[-1]}")
        count, mask = len(self.arrays["mask"]), self.arrays["mask"]
        tokens = {name: self.arrays[name] for name in COLUMNS}
        tokens |= {"phase": np.array(PHASES, object)[tokens["phase"]], "stayed": self.stayed}
        table = {"token": np.arange(count), **tokens}
        table = {name: np.repeat(column, len(chosen)) for name, column in table.items()}
        table["layer"] = np.tile(np.array(chosen, np.int64), count)
        table["hook"] = np.tile(np.array([hook_name(n) for n in chosen], object), count)
        names = ("neurons", *(("activation", "contribution") if self.has_activations else ()))
        cells = {name: np.empty((count, len(chosen)), object) for name in names}
        for column, layer in enumerate(chosen):
            rows = [np.flatnonzero(marks) for marks in self._marks(layer)]
            kept = [rows[number] for number in mask]
            _fill(cells["neurons"][:, column], kept)
            if self.has_activations:
                for row, values in enumerate(self._values(layer, kept)):
                    cells["activation"][row, column], cells["contribution"][row, column] = values
        return table | {name: cell.ravel() for name, cell in cells.items()}

    def frame(self, layers: Sequence[int] | None = None) -> Any:
        """A pandas frame with a row per token and layer (of ``layers``, or all).

        ``neurons``, and ``activation`` and ``contribution`` where they were kept, hold an array per
        row, equally long: ``frame.explode([...])`` makes a row per neuron.  Raises
        ``ConfigError`` for a layer that is not there, ``MissingExtra`` without pandas.
        """
        return _frame(self.columns(layers))

    def remask_columns(self) -> dict[str, list[Any]]:
        """The table of ``remask_frame``, by column."""
        table: dict[str, list[Any]] = {}
        for number, remask in enumerate(self.remasks):
            for layer, kept in enumerate(remask["kept"]):
                row = {"remask": number, **remask, "layer": layer, "hook": hook_name(layer)}
                row |= {"kept": kept, **self._changes(remask, layer)}
                for name, value in row.items():
                    table.setdefault(name, []).append(value)
        return table

    def _changes(self, remask: Mapping[str, Any], layer: int) -> dict[str, Array | None]:
        if remask["mask"] is None:
            return {"grown": None, "dropped": None}
        before = DENSE if remask["before"] is None else remask["before"]
        old, new = (self.neurons(mask, layer) for mask in (before, remask["mask"]))
        return {
            "grown": np.setdiff1d(new, old, assume_unique=True),
            "dropped": np.setdiff1d(old, new, assume_unique=True),
        }

    def remask_frame(self) -> Any:
        """A pandas frame with a row per re-mask and layer: its record, and the ids ``grown`` (kept
        now and not before) and ``dropped`` (the reverse), against the mask before it in its
        sequence and row, or against all neurons; None where every token selects.
        """
        return _frame(self.remask_columns())


def _fill(cells: Array, values: Sequence[Array]) -> None:
    """Put arrays into cells of objects, each as it is."""
    for index, value in enumerate(values):
        cells[index] = value


def _frame(columns: Mapping[str, Any]) -> Any:
    try:
        import pandas
    except ImportError:
        raise MissingExtra("pandas", "trace") from None
    return pandas.DataFrame(dict(columns))
