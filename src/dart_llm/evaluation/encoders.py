"""Encoders: what their names mean, texts as vectors, and long texts in windows that fit.

Every encoder is brought to a local folder first, so that the libraries that read it need no
network.  The only file that imports ``sentence_transformers``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import LoadError, MissingExtra
from dart_llm.hub import bars, hub_failure, plain
from dart_llm.models import cached
from dart_llm.models.cached import Progress
from dart_llm.models.checkpoint import weights_sha256
from dart_llm.models.loading import memory_failure

DEFAULT = cached.ENCODER_NAME

OWNER = "sentence-transformers"
"""Whose model a bare name is, as sentence-transformers itself reads it."""

INSTEAD = f"give a local folder or {DEFAULT}"

OTHERS = ["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*training_args.bin"]
"""Files of a repository that sentence-transformers does not read."""


@dataclass(frozen=True)
class EncoderSource:
    """An encoder's files.  ``origin``: where they came from; ``revision``: a hub commit."""

    name: str
    folder: Path
    origin: str
    sha256: str | None
    revision: str | None = None

    @property
    def label(self) -> str:
        """Name, origin and the start of revision and checksum, for notes beside numbers."""
        facts = {"revision": self.revision, "sha256": self.sha256}
        parts = (f"{name} {value[:12]}" for name, value in facts.items() if value)
        return f"{self.name} ({', '.join([self.origin, *parts])})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts, for provenance."""
        return {
            "name": self.name,
            "source": self.origin,
            "path": str(self.folder),
            "revision": self.revision,
            "sha256": self.sha256,
        }


def find_encoder(
    name: str | None = None,
    *,
    owner: str | None = OWNER,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> EncoderSource:
    """The files of the encoder ``name``: ``all-MiniLM-L6-v2`` (if None), a folder or a hub id.

    The default comes from the cache, else through pip.  ``owner``: whose model a bare name is;
    None leaves it bare, as some of the hub's oldest names are.  Raises ``LoadError``, one sentence,
    when the files cannot be had.
    """
    text = str(name or DEFAULT)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if text.lower() in (DEFAULT.lower(), cached.ENCODER_HUB_ID.lower()):
        try:
            folder = cached.embedder_folder(cache_folder(cache_dir), progress=progress)
        except LoadError as error:
            raise LoadError(f"{error}; or give a local folder as --embedder") from error
        origin = f"pip package {cached.ENCODER_PACKAGE} {cached.ENCODER_VERSION}"
        return EncoderSource(DEFAULT, folder, origin, cached.FILES[cached.WEIGHTS])
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text, re.ASCII):
        raise LoadError(
            f"there is no folder {text}; give a hub id (owner/name), a folder that "
            f"sentence-transformers wrote, or {DEFAULT}"
        )
    hub_id = f"{owner}/{text}" if owner and "/" not in text else text
    return _hub(hub_id, cache_dir)


def _folder(path: Path) -> EncoderSource:
    path = path.resolve()
    if not any((path / name).is_file() for name in ("modules.json", "config.json")):
        raise LoadError(
            f"{path} is not an encoder, for it has neither modules.json nor config.json; give the "
            "folder that save_pretrained wrote"
        )
    return EncoderSource(path.name, path, "folder", weights_sha256(path))


def _hub(hub_id: str, cache_dir: str | Path | None) -> EncoderSource:
    """Fetch a repository's configurations and weights into the cache."""
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(hub_id, cache_dir=hub_cache(cache_dir), ignore_patterns=OTHERS)
    except Exception as error:
        raise hub_failure(error, hub_id, None, INSTEAD) or LoadError(
            f"{hub_id} could not be fetched: {plain(error)}"
        ) from error
    folder = Path(path)
    return EncoderSource(hub_id, folder, "hub", weights_sha256(folder), folder.name)


# Sentences.

_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")

_ABBREVIATION = re.compile(
    r"(?<![A-Za-z0-9.])(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Rev|St|Jr|Sr|Sen|Rep|Gov"
    r"|Gen|Col|Lt|Sgt|Capt|Hon|vs|cf|al|approx|Jan|Feb|Mar|Apr|Aug|Sept|Sep|Oct|Nov|Dec)$"
)


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, stripped, none of them empty.

    A line break ends a sentence, and so does ``.``, ``!`` or ``?`` (closing quotes and brackets
    may follow) before white space and a capital or a digit, but not after an initial ("J. Smith"),
    dotted letters ("U.S. Army") or a common abbreviation ("Dr. Brown").
    """
    return [part for line in text.splitlines() for part in _split(line) if part]


def _split(line: str) -> list[str]:
    parts, start = [], 0
    for match in _END.finditer(line):
        stop = match.group()[0] == "."
        if stop and _ABBREVIATION.search(line, start, match.start()):
            continue
        parts.append(line[start : match.end()].strip())
        start = match.end()
    return [*parts, line[start:].strip()]


# Encoders silently drop what is beyond their window.  Here whole sentences are packed into windows
# in order; a sentence that fits none is halved at a word until its parts do.

Count = Callable[[str], int]
"""Counts the tokens of a text."""


def windows(text: str, count: Count, limit: int | None) -> list[str]:
    """``text`` in consecutive pieces of at most ``limit`` tokens each, nothing left out.

    A text that fits is returned as it is, stripped; None: every text fits.  Empty text gives no
    window.  Where the text is cut, white space between sentences becomes one blank.
    """
    text = text.strip()
    if not text:
        return []
    if limit is None or count(text) <= limit:
        return [text]
    packed: list[str] = []
    for piece in (part for one in sentences(text) for part in _fitting(one, count, limit)):
        joined = f"{packed[-1]} {piece}" if packed else piece
        if packed and count(joined) <= limit:
            packed[-1] = joined
        else:
            packed.append(piece)
    return packed


def _fitting(piece: str, count: Count, limit: int) -> list[str]:
    """The piece itself if it fits or is one character, else its halves, cut further as needed."""
    if len(piece) < 2 or count(piece) <= limit:
        return [piece]
    words = piece.split()
    units, joint = (words, " ") if len(words) > 1 else (list(piece), "")
    half = len(units) // 2
    parts = (joint.join(units[:half]), joint.join(units[half:]))
    return [fitting for part in parts for fitting in _fitting(part, count, limit)]


# Texts as vectors: the vector of a text that is longer than the model's window is the mean of
# those of its windows, weighted by their tokens.

Array = NDArray[np.float64]

BATCH = 32
"""Windows that are encoded together."""


@dataclass(frozen=True)
class Embedder:
    """A loaded model.  ``window``: text tokens that fit it at once; None without a limit."""

    model: Any
    source: EncoderSource
    window: int | None

    def embed(self, texts: Sequence[str]) -> Array:
        """One row per text: [texts, dimensions], float64; the row of an empty text is zero."""
        pieces = [windows(text, self.count, self.window) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float64)
        encoded = iter(self._encode(flat) if flat else ())
        for row, of_text in zip(rows, pieces, strict=True):
            vectors = [next(encoded) for _ in of_text]
            if vectors:
                weights = [max(1, self.count(piece)) for piece in of_text]
                weighed = weights if len(weights) > 1 else None  # one vector stays as it is
                row[:] = np.average(vectors, axis=0, weights=weighed)
        return rows

    def count(self, text: str) -> int:
        """Tokens of ``text``, without those that the model adds at its ends."""
        return count_tokens(self.model.tokenizer, text)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self.model.get_embedding_dimension())

    def _encode(self, texts: list[str]) -> Array:
        vectors = self.model.encode(
            texts, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, dtype=np.float64)


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of ``text``, without those that are added at its ends."""
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=False, padding=False, verbose=False
    )
    return len(encoded["input_ids"])


def load_embedder(
    name: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Embedder:
    """Load ``name``: all-MiniLM-L6-v2 (if None), a folder or a hub id.

    Raises ``MissingExtra`` without sentence-transformers, ``LoadError`` when the model cannot be
    had or read.
    """
    try:
        library = import_module("sentence_transformers")
    except ImportError as error:
        raise MissingExtra("sentence-transformers", "drift") from error
    source = find_encoder(name, cache_dir=cache_dir, progress=progress)
    try:
        with bars(shown=False):
            model = library.SentenceTransformer(
                str(source.folder), device="cpu", local_files_only=True
            )
        window = _window(model)
    except Exception as error:
        raise memory_failure(error, source.name, "float32") or LoadError(
            f"{source.name} could not be read as a sentence-transformers model: {plain(error)}"
        ) from error
    return Embedder(model, source, window)


def unit(rows: Array) -> Array:
    """Rows [n, dimensions] scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Array = rows / np.where(lengths > 0, lengths, 1.0)
    return scaled


def cosine(a: Array, b: Array) -> float:
    """Cosine of two vectors [dimensions], in [-1, 1]; 0 if one of them is zero."""
    first, second = unit(np.stack([a, b]))
    return float(np.clip(first @ second, -1.0, 1.0))


def _window(model: Any) -> int | None:
    """Text tokens that the model reads at once: its window without the tokens that it adds."""
    longest = model.max_seq_length
    if longest is None or longest > 1_000_000:  # "no limit" is written as 1e30 or infinity
        return None
    return max(1, int(longest) - int(model.tokenizer.num_special_tokens_to_add()))
