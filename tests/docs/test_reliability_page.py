"""docs/reliability.md's blocks: made of the files that are there, and of no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from published import scripts

with scripts():
    import reliability_measured as page

ROW = {
    "method": "dart",
    "sparsity": 0.5,
    "prompt": 120,
    "tokens": 70,
    "executor": "slim",
    "steps": [0, 62],
    "kept": 46080,
    "differ": 0,
    "logits": 3.1e-5,
    "spread": 6.86,
}
FACTS = {"name": "m", "sha256": "abc", "file_quantisation": None, "dtype": "float32"}
FILES = {
    "agreement-smollm2": {"checkpoint": FACTS, "rows": [ROW]},
    "sanitized-steps": {
        "compiler": "g++ 12",
        "counts": {"steps": 12003, "sequences": 2082, **dict.fromkeys(page.KINDS, 7)},
    },
    "interrupts": {
        "rows": [
            {"executor": "slim", "act": "attach", "interrupted": 200, "out_of_order": 0,
             "not_as_before": 1}
        ]
    },
    "kills": {"commands": {"run": {"kills": 25, "full_disks": 2, "lost": [], "differ": ["x"]}}},
}  # fmt: skip
SAID = {
    "agreement": "| m | dart, 50% | 120, 70 | slim | 0, 62 | 46,080 | 0 | 3.1e-05 | 6.9 |",
    "sanitized-steps": "12,003 steps of 2,082 random decoders (g++ 12), no report: 7 compared",
    "interrupts": "| slim | attach | 200 | 0 | 1 |",
    "kills": "| `run` | 25 | 2 | 0 | 1 |",
}


def place(root: Path, name: str) -> None:
    folder = root / "benchmarks/results"
    folder.mkdir(parents=True, exist_ok=True)
    data = {"command": f"python benchmarks/{name}.py", "checkpoint": {}, **FILES[name]}
    (folder / f"{name}.json").write_text(json.dumps(data))


@pytest.mark.parametrize(("name", "block"), list(zip(FILES, SAID, strict=True)))
def test_a_block_says_what_its_file_says(tmp_path: Path, name: str, block: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / page.PAGE).write_text("")
    assert page.tables(tmp_path) == {}
    place(tmp_path, name)
    ((made, (where, text)),) = page.tables(tmp_path).items()
    assert (made, where) == (block, tmp_path / page.PAGE)
    assert SAID[block] in text and f"python benchmarks/{name}.py" in text
    assert f"(../benchmarks/results/{name}.json)" in text


def test_the_page_has_room_for_every_block() -> None:
    text = (Path(__file__).parents[2] / page.PAGE).read_text("utf-8")
    for block in SAID:
        assert (
            f"<!-- generated: {block} -->" in text and f"<!-- end of generated: {block} -->" in text
        )
