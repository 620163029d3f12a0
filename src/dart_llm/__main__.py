"""Entry point of ``dart-llm`` and ``python -m dart_llm``."""

from __future__ import annotations

import os

KEPT_SHAPES = "64"
"""Matrix shapes whose compiled code oneDNN caches; a decode step has about eight."""


def set_environment() -> None:
    """Set variables that torch and other packages read on import, unless the user has."""
    # On a shared CPU, busy-waiting OpenMP threads make small operations many times slower.  To
    # spin for some 100 us costs little there, and on a quiet CPU saves a wake-up per operation.
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # oneDNN compiles code for every prompt length, some 3 MiB each: cache it for few lengths.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_SHAPES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", KEPT_SHAPES)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main() -> None:
    """Run the command line."""
    set_environment()
    try:
        from dart_llm.cli.app import run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
