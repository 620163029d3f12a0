"""Run in a process of its own by test_runner_v2.py: model runner V2 on the CPU.

Arguments: a model's folder, the path of a reference, number of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cases import Answer, Engine, assert_same

import conftest  # noqa: F401 - sets the environment


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
