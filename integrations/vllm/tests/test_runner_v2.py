"""Model runner V2, which GPUs use, with interpreted kernels.

Run as a script, in an environment with V2: compares it with the answers in a file.  Arguments: the
model's folder, the file, the number of tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import TEXTS, TINY_PROMPTS, Answer, Engine, arguments, assert_same, reference

import conftest  # noqa: F401 - sets the environment of the script

HERE = Path(__file__).parent
REFRESH = {"drift": "interval 3", "remask": {"observe_tokens": 2}}


def run_v2(
    folder: Path, prompts: Sequence[Sequence[int]], count: int, methods: Any, path: Path
) -> str:
    """Compare V2 with ``prune`` in a process of its own; return what it printed."""
    cases = [
        {
            "prompts": [[*ids] for ids in prompts],
            "extra": arguments(method, 0.5, **settings),
            "answers": [
                reference(folder, ids, count, method, sparsity=0.5, **settings) for ids in prompts
            ],
        }
        for method, settings in methods
    ]
    path.write_text(json.dumps(cases))
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(HERE / "interpreted"), str(HERE), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, __file__, str(folder), str(path), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_tiny_model(tiny: Any, tmp_path: Path) -> None:
    methods = [("griffin", {}), ("griffin-refresh", REFRESH)]
    printed = run_v2(tiny("llama"), TINY_PROMPTS, 12, methods, tmp_path / "cases.json")
    assert "RUNNER vllm.v1.worker.cpu.model_runner" in printed


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    printed = run_v2(smollm2, prompts, 8, [("griffin", {})], tmp_path / "cases.json")
    assert "RUNNER vllm.v1.worker.cpu.model_runner" in printed


def main() -> None:
    folder, path, count = sys.argv[1:]
    cases = json.loads(Path(path).read_text())
    llm = Engine(Path(folder), max_model_len=128)
    for case in cases:
        expected = [Answer(*answer) for answer in case["answers"]]
        prompts = case["prompts"]
        alone = [llm.answers([ids], int(count), case["extra"])[0] for ids in prompts]
        for answers in (alone, llm.answers(prompts, int(count), case["extra"])):
            for answer, wanted in zip(answers, expected, strict=True):
                assert_same(answer, wanted)
    runner = type(llm.pruning.runner).__module__
    print(f"RUNNER {runner} {json.dumps(llm.pruning.state.counts)}")


if __name__ == "__main__":
    main()
