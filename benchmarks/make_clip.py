"""Makes the clip at the top of README.md: 20 seconds of the window, from a recording.

Usage: python benchmarks/make_clip.py [RECORDS.jsonl] [--out docs/window.webp] [--sparsity 0.1]

Without RECORDS it records the first ready prompt with the default model.  The recording becomes the
page of ``dart-llm replay``, Chromium shows it at one place after another, and Pillow joins the
pictures.  Needs what the browser tests need: pip install '.[dev]', scripts/browser.sh.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

WIDTH, HEIGHT = 1200, 850
PER_SECOND = 12
WRITING = 14.0
"""Seconds in which the answer is written; the rest shows what else there is to see."""
TOKENS = 192
LARGEST = 3_000_000
"""Bytes that the clip may have."""

SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
SEEK = (
    "((p) => { p.value = arguments[0]; p.dispatchEvent(new Event('input')); "
    "const box = document.getElementById('scroller'); box.scrollTop = box.scrollHeight; })"
    "(document.getElementById('position'))"
)
SCENES = (
    ("document.getElementById('changes').click()", 2.0),
    (
        "(document.getElementById('changes').click(), "
        "document.querySelector('input[value=confidence]').click(), "
        "document.querySelectorAll('.text .doubt-3')[1]?.click())",
        3.0,
    ),
    ("document.querySelector('input[value=phase]').click()", 1.0),
)
"""What is done after the answer, and for how many seconds it is shown."""


def main() -> None:
    """Record, show, join, and say how large the clip is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="?", help="what POST /api/events answered")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "window.webp", help="where the clip goes"
    )
    parser.add_argument("--sparsity", type=float, default=0.1, help="fraction of neurons to remove")
    given = parser.parse_args()
    from dart_llm.server.window import read_records

    found = read_records(given.records) if given.records else record(given.sparsity)
    with tempfile.TemporaryDirectory() as folder:
        pictures = list(shown(found, Path(folder)))
    join(pictures, given.out)
    size = given.out.stat().st_size
    seconds = sum(duration for _, duration in pictures)
    print(f"{given.out}: {seconds:.1f} s, {len(pictures)} pictures, {size / 1e6:.2f} MB")
    if size > LARGEST:
        raise SystemExit(f"the clip is larger than {LARGEST / 1e6:g} MB: give fewer tokens")


def record(sparsity: float) -> list[dict[str, Any]]:
    """The records of the first ready prompt's answer by the default model."""
    from dart_llm.data.prompts import encode_prompt
    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import GenerationRequest as Ask
    from dart_llm.engine.requests import Sampling
    from dart_llm.models.loading import load
    from dart_llm.pruning.config import PruneConfig

    prompts = json.loads((files("dart_llm") / "static" / "prompts.json").read_text("utf-8"))
    model, tokenizer = load("smollm2-135m")
    ids = encode_prompt(tokenizer, prompts[0]["text"], chat=True)[0].tolist()
    config = PruneConfig.build("dart", sparsity=sparsity)
    found: list[dict[str, Any]] = []
    with Engine(model, tokenizer) as engine:
        engine.prepare(config)
        ask = Ask(tuple(ids), Sampling(max_tokens=TOKENS, logprobs=4), config)
        engine.run(ask, lambda one: found.append(one.to_dict()))
    return found


def shown(records: list[dict[str, Any]], folder: Path) -> Iterator[tuple[bytes, float]]:
    """PNG pictures and the seconds that each is shown."""
    from browser import opened
    from dart_llm.server.window import page

    file = folder / "replay.html"
    file.write_text(page(records), encoding="utf-8")
    with opened(file.as_uri(), folder / "profile", WIDTH, HEIGHT) as window:
        frames = round(WRITING * PER_SECOND)
        for frame in range(1, frames + 1):
            window.js(SEEK, max(1, round(len(records) * frame / frames)))
            yield picture(window), 1 / PER_SECOND
        for action, seconds in SCENES:
            window.js(action)
            yield picture(window), seconds


def picture(window: Any) -> bytes:
    """What the page shows once it is drawn."""
    window.js(SETTLED)
    return bytes(window.driver.get_screenshot_as_png())


def join(pictures: list[tuple[bytes, float]], out: Path) -> None:
    """One animated file, of the kind that its name says."""
    from PIL import Image

    images = [Image.open(io.BytesIO(png)).convert("RGB") for png, _ in pictures]
    durations = [round(1000 * seconds) for _, seconds in pictures]
    options: dict[str, Any] = (
        {"lossless": True, "quality": 60, "method": 4} if out.suffix == ".webp" else {}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = images
    first.save(out, save_all=True, append_images=rest, duration=durations, loop=0, **options)


if __name__ == "__main__":
    main()
