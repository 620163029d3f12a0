"""benchmarks/reproduce.py: inputs by checksum, what would run, which numbers agree."""

import hashlib
import json

import rendering
import reproduce
from reproduce import Job, look, sha256
from reproduce_compare import compare

KNOWN = rendering.registry()
RESULTS = rendering.RESULTS
TIMED = ("serve-", "interrupts", "kills", "sanitized", "agreement", "revisions")


def of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_inputs_are_told_by_their_checksum(tmp_path):
    facts, file = {"sha256": of("one"), "get": "hub data set x/y"}, tmp_path / "a.txt"
    wanted = f"Expected: sha256 {of('one')}. Where to get it: hub data set x/y. Put it into"
    assert f"a.txt is missing in {tmp_path}. {wanted}" in str(look("a.txt", facts, tmp_path))
    file.write_text("two")
    assert f"its sha256 is {of('two')}. {wanted}" in str(look("a.txt", facts, tmp_path))
    file.write_text("one")
    assert look("a.txt", facts, tmp_path) == reproduce.Found("a.txt", file, None)
    for name in ("b.yaml", "a.yaml", "other.txt"):
        (tmp_path / name).write_text(name)
    both = of(f"{of('a.yaml')}  a.yaml\n{of('b.yaml')}  b.yaml\n")
    assert sha256(tmp_path, ("*.yaml",)) == both


def test_which_numbers_agree():
    accuracy = {"value": 0.5, "interval": {"low": 0.4, "high": 0.6}}
    strange = {"value": 0.7, "interval": {"low": 0.4, "high": 0.6}}  # not its own result
    for row, again, agrees in (
        (accuracy, 0.6, True),
        (accuracy, 0.61, False),
        (strange, 0.5, False),
        ({"perplexity": 20.0}, 20.3, True),
        ({"perplexity": 20.0}, 20.5, False),
        ({"remasks": 5}, 7, True),
        ({"remasks": 5}, 8, False),
        ({"remasks": 100}, 110, True),
        ({"remasks": 100}, 111, False),
        ({"dense_token_share": 0.0}, 0.019, True),
        ({"dense_token_share": 0.0}, 0.021, False),
        ({"achieved": 0.0}, 0.001, False),
    ):
        key = next(iter(row))
        data = {"rows": [{"label": "dart@0.5", **row}], "renamed": {"dart": "dart-prompt"}}
        (pair,) = compare(data, {"rows": [{**row, "label": "dart-prompt@0.5", key: again}]})
        assert (pair.name, pair.agrees) == (f"dart-prompt@0.5 {key}", agrees), (row, again)
    (pair,) = compare({"rows": [{"task": "arc", "perplexity": 2.0}]}, {"rows": []})
    assert (pair.again, pair.agrees) == (None, False)


def test_a_job_has_folders_of_its_own_and_keeps_what_is_finished(tmp_path):
    job = Job("quality-token", KNOWN["results"]["quality-token"], tmp_path / "job", False)
    first, second = job.commands()
    assert first[-4:] == ["--experiment-name", "1", "--results-dir", "../runs"]
    assert second[second.index("--model") + 1] == "qwen2.5-coder-0.5b-instruct.gguf"
    assert job.keeping()[:3] == ["python", "benchmarks/keep.py", "quality-token"]
    (tmp_path / "w.txt").write_text("w")
    job.lay_out({"w.txt": tmp_path / "w.txt", "m.gguf": tmp_path / "w.txt", "tasks": tmp_path})
    assert (job.clone / "../shared/data/w.txt").read_text() == "w"
    assert (job.clone / "m.gguf").is_file() and (job.clone / "benchmarks/keep.py").is_file()
    for time, status in (("t1", "complete"), ("t2", "interrupted")):
        folder = job.folder / "runs/1" / time
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"status": status}))
        assert job.is_finished(1) is (status == "complete")


def test_every_name_can_be_shown_and_all_scripts_exist(capsys, tmp_path):
    names = [*KNOWN["results"], *KNOWN["blocks"]]
    assert reproduce.main([*names, "--dry-run", "--texts", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name, facts in KNOWN["results"].items():
        assert f"\n{name}: " in f"\n{shown}"
        for run in [*facts["run"], facts.get("keep", "dart-llm")]:
            script = run.split()[1] if run.startswith("python") else "README.md"
            assert (rendering.ROOT / script).is_file()
    assert reproduce.main(["budgets-smollm2", "--texts", str(tmp_path)]) == 2
    assert reproduce.main(["quality-tokn"]) == 2
    assert "did you mean quality-token?" in capsys.readouterr().err
