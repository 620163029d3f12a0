"""Make the clip at the top of README.md: 20 seconds of the server's page, from a recording.

Usage: python benchmarks/make_clip.py [RECORDS.jsonl] [--out docs/window.webp]

Without RECORDS the clip shows the recording that the server's page plays to visitors
(benchmarks/make_greeting.py).  The script turns the recording into the page of ``dart-llm replay``,
takes screenshots of successive positions in Chromium, and joins them with Pillow.  It has the
requirements of the browser tests: pip install '.[dev]', scripts/browser.sh.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

WIDTH, HEIGHT = 1200, 850
PER_SECOND = 12
WRITING = 14.0
"""Seconds during which the answer is written; ``SCENES`` follow."""
LARGEST = 3_000_000
"""Maximum size of the clip in bytes."""

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
"""Actions after the answer, and for how many seconds the result of each is shown."""


def main() -> None:
    """Make the clip and print its size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="?", help="a file with the answer of POST /api/events")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "window.webp", help="the file to write"
    )
    args = parser.parse_args()
    from dart_llm.server.window import GREETING, STATIC, read_records

    greeting = json.loads((STATIC / GREETING).read_text("utf-8"))
    records = read_records(args.records) if args.records else greeting
    with tempfile.TemporaryDirectory() as folder:
        pictures = list(shown(records, Path(folder)))
    join(pictures, args.out)
    size = args.out.stat().st_size
    seconds = sum(duration for _, duration in pictures)
    print(f"{args.out}: {seconds:.1f} s, {len(pictures)} pictures, {size / 1e6:.2f} MB")
    if size > LARGEST:
        raise SystemExit(f"the clip is larger than {LARGEST / 1e6:g} MB: give fewer tokens")


def shown(records: list[dict[str, Any]], folder: Path) -> Iterator[tuple[bytes, float]]:
    """PNG pictures, each with the seconds for which it is shown."""
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
    """A PNG of the page after it has been drawn."""
    window.js(SETTLED)
    return bytes(window.driver.get_screenshot_as_png())


def join(pictures: list[tuple[bytes, float]], out: Path) -> None:
    """Write one animated file, in the format of its suffix."""
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
