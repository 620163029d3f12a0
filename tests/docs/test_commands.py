"""The commands of tests/doc_commands.yaml run, on a small model in the place of the default one."""

import json
import re
import shlex
import shutil
import signal

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from checkpoints import write_gguf
from dart_llm.cache import cache_folder
from dart_llm.cli.app import app
from dart_llm.data import texts
from dart_llm.models.loading import load
from serve_cases import serving
from shells import ROOT
from stand_in import stand_in, write_model
from window_cases import records, write

LIST = yaml.safe_load((ROOT / "tests/doc_commands.yaml").read_text(encoding="utf-8"))
CASES = [(command, how) for commands in LIST.values() for command, how in commands.items()]
SERVING = [(command, how) for command, how in CASES if how.get("serves")]
RUNNING = [(command, how) for command, how in CASES if not how.get("serves")]
NAMES = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B-Instruct", "my-checkpoint")
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: my_questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GRID = "{models: [smollm2-135m], methods: [dense, griffin], tasks: ['perplexity:embedded']}"


def shell_lines(page):
    """The lines of a page's shell blocks, without comments, and commands in its tables."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line] + re.findall(
        r"^\|.*`(dart-llm .*?)`", text, re.MULTILINE
    )


def test_every_command_of_the_readme_is_listed_and_listed_ones_stand_on_their_page():
    assert set(shell_lines("README.md")) <= set(LIST["README.md"])
    assert [one for page in LIST for one in LIST[page] if one not in shell_lines(page)] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory, native):
    """A folder with what the commands name, and a cache that holds the small model."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "recipes"):
        (root / name).symlink_to(ROOT / name)
    model, cache = write_model(root / "model"), root / "cache"
    stand_in(cache)
    for name in NAMES:
        shutil.copytree(model, root / name)
    (cache / "dart-llm/native").symlink_to(cache_folder() / "native")
    (root / "my_text.txt").write_text("\n\n".join(map(texts.read, texts.subjects())))
    (root / "my_tasks").mkdir()
    (root / "my_tasks/my_task.yaml").write_text(TASK)
    question = {"question": "What flies?", "choices": ["a bird", "a stone"], "answer": 0}
    (root / "my_questions.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    (root / "my_grid.yaml").write_text(GRID)
    write(root / "records.jsonl", records())
    write_gguf(root / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DART_CACHE", str(cache))
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setenv("PIP_NO_INDEX", "1")  # what the cache lacked would be fetched
        found, _ = load("smollm2-135m")
        assert found.num_parameters() < 1e6, "commands would run on the default model itself"
        yield root


def words(command, how):
    text = how.get("run", command)
    for old, new in how.get("replace", {}).items():
        assert old in text, "the list swaps a text that the command lacks"
        text = text.replace(old, str(new))
    program, *arguments = shlex.split(f"{text} {how.get('add', '')}")
    assert program == "dart-llm"
    return arguments


@pytest.mark.parametrize(("command", "how"), RUNNING, ids=[c[:60] for c, _ in RUNNING])
def test_runs(place, command, how):
    done = CliRunner().invoke(app, words(command, how), input=how.get("stdin"))
    assert done.exit_code == 0, (done.output, done.exception)
    assert how.get("prints", "") in done.output


@pytest.mark.parametrize(("command", "how"), SERVING, ids=[c for c, _ in SERVING])
def test_serves(place, command, how):
    name, *arguments = words(command, how)
    assert name == "serve"
    with serving(*arguments) as server:
        page = httpx.get(server.url, trust_env=False, timeout=30)
        assert page.status_code == 200 and "<title>DART for LLMs" in page.text
        server.end(signal.SIGINT)
