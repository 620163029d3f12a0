"""A stand-in for llama.cpp's llama-bench, which keeps what it was asked."""

import sys

FAKE = '''#!{python}
import json, os, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    seen = sorted(name for name in os.environ if name.startswith(("OMP_", "KMP_")))
    log.write(json.dumps([asked, seen]) + "\\n")
new, prompt = int(asked["-n"]), int(asked["-p"])
rows = [(0, new)] if new else [(prompt, 0)]
print(json.dumps([
    {{"n_prompt": p, "n_gen": n, "avg_ns": (p or n) * 2_000_000, "build_commit": "abc"}}
    for p, n in rows
]))
'''  # fmt: skip


def write_bench(folder):
    """A program that says 2 ms per token, and the log of what it was asked."""
    program, log = folder / "llama-bench", folder / "log"
    program.write_text(FAKE.format(python=sys.executable, log=str(log)), encoding="utf-8")
    program.chmod(0o755)
    return program, log
