"""Entry point of ``dart-llm`` and ``python -m dart_llm``."""

from __future__ import annotations

import os

KEPT_SHAPES = "64"
"""Matrix products that oneDNN keeps its code for; a step of decoding has about eight."""


def set_environment() -> None:
    """Set what torch and others read when they are imported, unless the user has."""
    # Busy-waiting OpenMP threads make small operations many times slower on a shared CPU; some
    # 100 us of it cost little there and save a wake-up per operation where it is quiet.
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Code is made for every length of a prompt, some 3 MiB each: that of few lengths is kept.
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
