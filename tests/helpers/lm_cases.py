"""lm-eval tasks over local files, a tiny GPT-2 with letters for tokens, and ways to measure both.

Everything lies in one temporary folder per process, since lm-eval takes seconds to index its tasks
for every ``--include-path``.
"""

import atexit
import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml

from dart_llm.cli import app as cli
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.models.loading import load
from summary_cases import Kept
from summary_cases import candidate as prepared
from tiny_gpt2 import make_talk, write_gpt2

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QUESTIONS = [
    {"question": "which of these animals can fly", "choices": ["a duck", "dog", "a small pig"]},
    {"question": "what do people drink at breakfast", "choices": ["tea", "stone", "two chairs"]},
    {"question": "where does the sun rise", "choices": ["in the east", "west", "nowhere"]},
    {"question": "how many legs has a spider", "choices": ["eight", "three", "none at all"]},
]
for _number, _row in enumerate(QUESTIONS):
    _row["answer"] = _number % 3
LETTERS = [
    {"question": f"the {word} is how large", "choices": ["1", "22", "333", "4444"], "answer": n % 4}
    for n, word in enumerate(("moon", "tide", "lake", "hill", "road"))
]
EXAMPLES = [
    {"question": "an example of what is cold", "choices": ["ice", "fire", "tea"], "answer": 0},
    {"question": "an example of what is red", "choices": ["sea", "blood", "ice"], "answer": 1},
]
SHORT = {"question": "fly", "choices": ["duck", "dog"], "answer": 0}
PAGES = [
    {"text": "".join(f"{what} number {n * n} comes before {n * 7 + 3}. " for n in range(1, end))}
    for what, end in (("tide", 5), ("moon", 8))
]
SCRAP = [{"text": "only a short line"}]
WRITING = [{"question": f"tell me about the {w}", "answer": w} for w in ("sea", "moon", "hill")]

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "q: {{question}}\na:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
FEWSHOT = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}
BYTES = {**ROLLING, "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}]}
LAST = {
    "output_type": "loglikelihood",
    "doc_to_text": "q: {{question}} and what of it",
    "doc_to_target": " {{choices[0]}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "q: {{question}}\na:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
SAMPLING = {"until": ["\n"], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
LETTER = {
    **CHOICE,
    "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
GROUPS = {
    "tiny_group": ("tiny_choice", "tiny_letters"),
    "tiny_pages": ("tiny_roll", "tiny_scrap"),
    "tiny_lasts": ("tiny_last", "tiny_end"),
}


@functools.cache
def place():
    """The folder: ``model``, ``chatty`` (with a chat template), ``tasks`` and ``data``."""
    import datasets

    root = Path(tempfile.mkdtemp(prefix="dart-lm-cases-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    _write_models(root)
    tasks = root / "tasks"
    tasks.mkdir()
    (root / "data").mkdir()
    draw = {**GENERATE, "generation_kwargs": SAMPLING, "repeats": 3}
    _write_task(tasks, "tiny_choice", {**CHOICE, **FEWSHOT}, QUESTIONS, EXAMPLES)
    for name, task, rows in (
        ("tiny_letters", LETTER, LETTERS),
        ("tiny_short", CHOICE, [SHORT, QUESTIONS[1]]),
        ("tiny_roll", ROLLING, PAGES),
        ("tiny_scrap", ROLLING, SCRAP),
        ("tiny_bytes", BYTES, PAGES),
        ("tiny_last", LAST, QUESTIONS),
        ("tiny_end", LAST, LETTERS),
        ("tiny_write", GENERATE, WRITING),
        ("tiny_draw", draw, WRITING),
        ("tiny_lost", CHOICE, None),
        ("tiny_wrong", {**CHOICE, "doc_to_text": "{{nothing.x}}"}, QUESTIONS),
    ):
        _write_task(tasks, name, task, rows)
    for name, parts in GROUPS.items():
        group = {"group": name, "task": list(parts)}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return root


def _write_task(folder, name, task, rows, examples=()):
    """A task file and its data beside it; ``rows`` None: the data file is missing."""
    data = folder.parent / "data"
    files = {"test": str(write_rows(data / f"{name}.jsonl", rows or ()))}
    if rows is None:
        (data / f"{name}.jsonl").unlink()
    if examples:
        files["dev"] = str(write_rows(data / f"{name}_dev.jsonl", examples))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    head = {"task": name, **source, "test_split": "test", **task}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(head), encoding="utf-8")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_models(root):
    model, tokenizer = load(write_gpt2(root / "model"), dtype="float32")
    make_talk(model, tokenizer)
    model.save_pretrained(root / "model")
    shutil.copytree(root / "model", root / "chatty")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "chatty")


@functools.cache
def loaded(name="model"):
    """Model and tokenizer; do not change them."""
    return load(place() / name, dtype="float32", device="cpu")


def candidate(method=None, sparsity=0.5, **settings):
    """A method on the tiny model; None: untouched."""
    return prepared(loaded(), method, sparsity, **settings)


def options(**changes):
    return MeasureOptions(include_path=str(place() / "tasks"), **changes)


def measured(found, task, how=None, parts=None, advance=lambda documents: None):
    """The harness on one task; parts go through JSON, as those in a file do."""
    from dart_llm.evaluation import lm_eval as harness  # which loads lm-eval

    kept = Kept() if parts is None else parts
    return harness.measure(found, task, how or options(), kept, advance)


def logprobs(found):
    return [answer[0][0] for sample in found.samples for answer in sample["answers"]]


class Forwards:
    def __init__(self, model):
        self.model, self.shapes = model, []

    def __enter__(self):
        def note(module, args, kwargs):
            self.shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

        self._handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self._handle.remove()


class Called(NamedTuple):
    code: int
    out: str
    err: str
    json = property(lambda self: json.loads(self.out), doc="Its one JSON document on stdout.")


def call(*arguments):
    """``dart-llm ARGUMENTS`` in this process, through the code that the real command runs."""
    code = 0
    with (
        mock.patch.object(sys, "argv", ["dart-llm", *map(str, arguments)]),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            cli.run()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Called(code, out.getvalue(), err.getvalue())


def refusal(*arguments):
    """What is said of arguments that are refused: one line, and exit code 2."""
    done = call(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), (arguments, done.err)
    return done.err


def eval_command(*arguments, model="model"):
    """``eval`` on the tiny model with the tasks of this file."""
    root = place()
    where = ("--model", root / model, "--include-path", root / "tasks", "--device", "cpu")
    return ["eval", *where, *arguments]
