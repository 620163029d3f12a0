"""Jobs of ``bench speed`` on a tiny checkpoint."""

import torch

from dart_llm.experiments.study import run_study
from dart_llm.experiments.timing import repetition
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.bench.settings import SpeedSettings
from dart_llm.studies.bench.study import SpeedStudy
from engine_cases import tokenizer
from tiny import tiny

PROMPT, TOKENS = 12, 12

# bytes of the tiny GGUF file: of a layer's 12 matrices of 64 x 64 and 64 x 96, of which 5 bytes
# hold 8 weights in Q4_1; of the rest; and weights of its norms
FFN = 2 * 3 * 64 * 96 * 20 // 32
REST = 2 * 4 * 64 * 64 * 20 // 32 + 300 * 64 * 34 // 32
NORMS = 5 * 64


def checkpoint(root):
    """Folder of a tiny llama: 4 layers of width 32 with 48 neurons, float32."""
    folder = root / "llama"
    if not folder.exists():
        tiny("llama").to(torch.float32).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def settings(root, **more):
    given = {"results_dir": str(root / "results"), "device": "cpu", "dtype": "float32"}
    given |= {"methods": "griffin", "sparsities": "0.5"}
    given |= {"prompt_tokens": PROMPT, "tokens": TOKENS, "repeats": 2}
    given |= {} if "model" in more else {"model": str(checkpoint(root))}
    return merge(SpeedSettings, {**given, **more}, environment={})


def job(root, ui=None, **more):
    return run_study(SpeedStudy(settings(root, **more), ui or Ui(quiet=True)))


def steady(model, ids, tokens, make):
    """``repetition`` whose tokens always take the same time: nothing that it times is disturbed."""
    found = repetition(model, ids, tokens, make)
    ms = 2.0 - 0.4 * found["achieved_sparsity"] if "achieved_sparsity" in found else 4.0
    return {**found, "steps_s": [ms / 1000] * len(found["steps_s"])}


def write_broken_bench(folder):
    """A ``llama-bench`` that fails."""
    program = folder / "broken"
    program.write_text("#!/bin/sh\necho no such model >&2; exit 3\n", encoding="utf-8")
    program.chmod(0o755)
    return program


def sample(steps_ms, **more):
    """A sample as the clock gives it."""
    return {"first_token_s": 0.1, "steps_s": [ms / 1000 for ms in steps_ms], **more}
