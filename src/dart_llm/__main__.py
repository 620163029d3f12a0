"""Entry point of ``dart-llm`` and ``python -m dart_llm``."""

from __future__ import annotations

import os

CACHED_SHAPES = "64"
"""Number of matrix shapes whose compiled code oneDNN caches; a decode step has about eight."""


def set_environment() -> None:
    """Set variables that torch and other packages read on import, unless the user has set them."""
    # On a shared CPU, busy-waiting OpenMP threads make small operations many times slower.
    # Spinning for about 100 us costs little there, and on an idle CPU saves a wake-up per operation
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # oneDNN compiles about 3 MiB of code for each prompt length: cache it for only a few lengths.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main() -> None:
    """Set the environment, then run the command line."""
    set_environment()
    try:
        from dart_llm.cli.app import run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
