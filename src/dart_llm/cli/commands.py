"""Every command: its settings, what runs it, its help and its examples."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from dart_llm.cli import info
from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.cli.options import Config, Fresh, Json, with_settings
from dart_llm.errors import CellsFailed, ConfigError
from dart_llm.files import finite
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import merge
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.drift.settings import DriftSettings
from dart_llm.studies.evaluate.settings import EvalSettings, PerplexitySettings, SummarizeSettings
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.sweep.settings import SweepFlags


@dataclass(frozen=True)
class Command:
    """One command, ``bench quality`` being one of a group.

    ``function``: what runs it.  A name stands for a ``Study``, "module:class" below
    ``dart_llm.studies``, which answers ``--json`` itself.
    """

    name: str
    function: Callable[..., None] | str
    settings: type[BaseModel] | None
    help: str
    examples: tuple[str, ...]

    @property
    def text(self) -> str:
        """Help and examples."""
        if len(self.examples) == 1:
            return f"{self.help}\n\nExample: {self.examples[0]}"
        return "\n\n".join((self.help, "Examples:", *self.examples))

    @property
    def resumes(self) -> bool:
        """Whether it keeps what is finished and goes on there: what can be told to start anew."""
        return isinstance(self.function, str) or (
            self.name == "demo" or "fresh" in signature(self.function).parameters
        )

    def callback(self) -> Callable[..., None]:
        """The function with its options in its signature."""
        function = self._run_study if isinstance(self.function, str) else self.function
        return function if self.settings is None else with_settings(function, self.settings)

    def _run_study(
        self,
        flags: dict[str, Any],
        config: Config = None,
        fresh: Fresh = False,
        as_json: Json = False,
    ) -> None:
        assert self.settings is not None
        settings = merge(self.settings, flags, config)
        module, _, name = str(self.function).partition(":")
        from dart_llm.experiments.study import run_study
        from dart_llm.reporting.console import Ui

        package = import_module(f"dart_llm.studies.{module}")
        study, ui = getattr(package, name), Ui(quiet=as_json)
        try:
            answer = run_study(study(settings, ui), fresh).answer()
        except CellsFailed as failed:
            _print_failed(failed, as_json)
            raise
        if as_json:
            _print_json(answer)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(finite(document)))


def _print_failed(failed: CellsFailed, as_json: bool) -> None:
    """What was measured is still told; the exit code says that some was not."""
    if as_json:
        _print_json(failed.document)


# run and demo


def run(
    flags: dict[str, Any],
    config: Config = None,
    save_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the merged settings to a YAML file.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """``dart-llm run``: a prompt may also come through a pipe."""
    settings = merge(RunSettings, flags, config)
    piped = sys.stdin is not None and not sys.stdin.isatty()
    idle = not settings.tokens and not settings.evaluates
    if piped and idle and settings.generation is None:
        settings = merge(RunSettings, {**flags, "prompt_file": "-"}, config)
        idle = False
    if save_config is not None:
        _save_settings(settings, save_config)
    if idle:
        raise ConfigError(
            "nothing to do: give --prompt TEXT and --generation N, or an evaluation: --perplexity, "
            "--eval-mmlu, --eval-general-nlp, --eval-summarization (in the scripts GENERATION=N or "
            "EVAL_PERPLEXITY, EVAL_MMLU, EVAL_GENERAL_NLP, EVAL_SUMMARIZATION=true)"
        )
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.generate.study import run_job

    job = run_job(settings, Ui(quiet=as_json), fresh)
    if as_json:
        _print_json(_run_document(job))


def _save_settings(settings: RunSettings, path: Path) -> None:
    import yaml

    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write the settings file {path}: {error.strerror or error}"
        ) from None


def _run_document(job: Any) -> dict[str, Any]:
    return {
        "folder": str(job.path),
        "config": job.config,
        "generation": list(job.generations.values()),
        "perplexity": job.perplexity,
        **job.evaluations,
        "timing": job.timing,
    }


def demo(
    model: Annotated[
        str, typer.Option(help="Hub id, local folder, .gguf file, or smollm2-135m.")
    ] = "smollm2-135m",
    method: Annotated[str, typer.Option("--method", "-m", help="Preset.")] = "dart",
    device: Annotated[
        str | None, typer.Option(help="0, 0,1, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 (default: the checkpoint's).")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where the model is kept.")] = None,
    results_dir: Annotated[str, typer.Option(help="Folder for results.")] = "results",
    as_json: Json = False,
) -> None:
    """``dart-llm demo``."""
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.generate.study import run_demo

    given = {"model": model, "method": method, "device": device, "dtype": dtype}
    job = run_demo(Ui(quiet=as_json), **given, cache_dir=cache_dir, results_dir=results_dir)
    if as_json:
        _print_json(_run_document(job))


# compare and sweep


GridFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="A YAML file with the grid.")
]

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Print cells, downloads, disk, time; run nothing."),
]

FreshCells = Annotated[bool, typer.Option("--fresh", metavar="", help="Compute every cell anew.")]


def _grid_command(kind: str, **defaults: str) -> Callable[..., None]:
    """``compare`` or ``sweep``; ``defaults``: the grid when nothing is said of it."""

    def measure_grid(
        flags: dict[str, Any],
        file: GridFile = None,
        dry_run: DryRun = False,
        fresh: FreshCells = False,
        as_json: Json = False,
    ) -> None:
        from dart_llm.reporting.console import Ui
        from dart_llm.studies.sweep import study

        request = study.SweepRequest.collect(kind, flags, file, defaults, fresh)
        ui = Ui(quiet=as_json)
        try:
            document = study.dry_run(request, ui).to_dict() if dry_run else study.run(request, ui)
        except CellsFailed as failed:
            _print_failed(failed, as_json)
            raise
        if as_json:
            _print_json(document)

    return measure_grid


# inspect and bench speed


What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=f"[{'|'.join(TEXTS)}]...", help="What to look at (default: all the texts allow)."
    ),
]


def inspect(
    flags: dict[str, Any],
    what: What = None,
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """``dart-llm inspect``: a study that is told what to look at."""
    from dart_llm.experiments.study import run_study
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.inspection.study import InspectionStudy

    settings = merge(InspectSettings, flags, config)
    study = run_study(InspectionStudy(settings, what or (), Ui(quiet=as_json)), fresh)
    if as_json:
        _print_json(study.answer())


def bench_speed(
    flags: dict[str, Any], config: Config = None, fresh: Fresh = False, as_json: Json = False
) -> None:
    """``dart-llm bench speed``: its last line is JSON whatever was asked."""
    from dart_llm.experiments.study import run_study
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.speed.study import SpeedStudy

    study = run_study(SpeedStudy(merge(SpeedSettings, flags, config), Ui(quiet=as_json)), fresh)
    _print_json(study.answer() if as_json else study.last_line())


# chat, serve, replay, results


def chat(flags: dict[str, Any], config: Config = None) -> None:
    """``dart-llm chat``."""
    from dart_llm.cli.chat import run_chat
    from dart_llm.reporting.console import Ui

    run_chat(merge(ChatSettings, flags, config), Ui())


def serve(flags: dict[str, Any], config: Config = None) -> None:
    """``dart-llm serve``."""
    settings = merge(ServeSettings, flags, config)
    from dart_llm.reporting.console import Ui
    from dart_llm.server.run import serve as serve_model

    if settings.verbose:
        logging.getLogger("dart_llm.serve").setLevel(logging.INFO)
    serve_model(settings, Ui())


def replay(
    records: Annotated[
        str, typer.Argument(metavar="RECORDS", help="File with the records; - is standard input.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write (default: beside RECORDS, .html)."),
    ] = None,
) -> None:
    """``dart-llm replay``."""
    from dart_llm.server.window import page, read_records

    if out is None and records == "-":
        raise ConfigError("give --out FILE: standard input has no name beside which to write")
    place = Path(records).with_suffix(".html") if out is None else out
    if place.resolve() == Path(records).resolve():
        raise ConfigError(f"{place} is the recording itself: give --out FILE")
    text = page(read_records(records))
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {place}: {error.strerror or error}") from None
    typer.echo(str(place))


Text = Annotated[str | None, typer.Option(metavar="TEXT", help="Runs whose name holds this.")]


def results(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="All results, one experiment or one run.")
    ] = Path("results"),
    model: Text = None,
    method: Text = None,
    task: Text = None,
    experiment: Text = None,
    status: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="complete, running, interrupted, failed, stopped."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Runs from this day on, e.g. 2026-01-31.")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", metavar="", help="One row per task and method.")
    ] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Comma-separated.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", metavar="", help="A Markdown table.")
    ] = False,
) -> None:
    """``dart-llm results``."""
    from dart_llm.experiments import index
    from dart_llm.reporting.console import Ui

    asked = {"model": model, "method": method, "task": task, "status": status}
    runs = index.filter(index.find(folder), **asked, experiment=experiment, since=since)
    if as_json:
        typer.echo(index.to_json(runs).rstrip("\n"))
    elif as_csv:
        typer.echo(index.to_csv(runs, long).rstrip("\n"))
    elif as_markdown:
        typer.echo(index.to_markdown(runs, long).rstrip("\n"))
    elif not runs:
        typer.echo("no run matches")
    else:
        out = Ui().out
        if len(runs) == 1 and (folder / "config.json").is_file():
            out.print(index.show(runs[0]))
            long = True
        out.print(index.table(runs, long))


GROUPS = {
    "bench": "Fixed measures of the methods: quality, speed.",
    "prompts": "Two-topic prompts and passages: make, list, show.",
}
"""Commands of two words by their first one, with its help."""

COMMANDS = (
    Command(
        "run",
        run,
        RunSettings,
        "Prune a model while it generates from a prompt, evaluate it, and write a report.",
        (
            'dart-llm run --prompt "Why is the sky blue?" --sparsity 0.5',
            "dart-llm run --method griffin --sparsity 0.5 --perplexity --ppl-max-samples 4",
            "dart-llm run --model Qwen/Qwen2.5-0.5B-Instruct --prompt-file question.txt --chat",
            "dart-llm run --prompt two_topics --drift paper --generation 400",
        ),
    ),
    Command(
        "chat",
        chat,
        ChatSettings,
        "Talk with a pruned model, which stays loaded; settings change while you talk.\n\n"
        "Answers go to stdout, everything else to stderr.  /help lists the commands: "
        "/sparsity 0.7,\n/method griffin, /stats, /save FILE, /reset, /quit.  Ctrl-C stops an "
        "answer.  Piped input is\nanswered line by line.",
        (
            "dart-llm chat --sparsity 0.3",
            "dart-llm chat --model Qwen/Qwen2.5-0.5B-Instruct --method griffin --temperature 0.7",
            'echo "Why is the sky blue?" | dart-llm chat --sparsity 0.5',
        ),
    ),
    Command(
        "eval",
        "evaluate.study:MeasureStudy",
        EvalSettings,
        "Run lm-eval tasks on a pruned model.",
        (
            "dart-llm eval --tasks arc_easy,hellaswag --method dart --sparsity 0.5 --limit 200",
            "dart-llm eval --tasks mmlu --num-fewshot 5 --model Qwen/Qwen2.5-0.5B-Instruct --dense",
            "dart-llm eval --tasks my_task --include-path my_tasks --json",
        ),
    ),
    Command(
        "perplexity",
        "evaluate.study:MeasureStudy",
        PerplexitySettings,
        "Perplexity of a text, dense beside pruned on the same tokens.",
        (
            "dart-llm perplexity --method dart --sparsity 0.5 --limit 16",
            "dart-llm perplexity --data wikitext2 --protocol standard --window 2048",
            "dart-llm perplexity --data my_text.txt,c4 --method griffin --sparsity 0.3 --json",
        ),
    ),
    Command(
        "summarize",
        "evaluate.study:MeasureStudy",
        SummarizeSettings,
        "Summaries of documents and their ROUGE.",
        (
            "dart-llm summarize --data xsum --limit 100 --method dart --sparsity 0.5 --dense",
            "dart-llm summarize --data articles.jsonl --max-output 128 --json",
        ),
    ),
    Command(
        "compare",
        _grid_command("compare", methods="dense,griffin,dart", sparsities="0.5"),
        SweepFlags,
        "Methods against dense and GRIFFIN on the same items, with paired intervals and a plot.\n\n"
        "Without flags: dense, griffin and dart at sparsity 0.5.",
        (
            "dart-llm compare --tasks perplexity:embedded --limit 8",
            "dart-llm compare --methods griffin,flap,dart --sparsities 0.3,0.5 --tasks arc_easy "
            "--limit 200",
            "dart-llm compare --tasks mmlu --methods griffin,dart,dense-8bit --json",
        ),
    ),
    Command(
        "sweep",
        _grid_command("sweep"),
        SweepFlags,
        "Measure a grid of models, methods, sparsities, layers, tasks and seeds; resumable.",
        (
            "dart-llm sweep grid.yaml --dry-run",
            "dart-llm sweep --methods dense,griffin,dart --sparsities 0.3,0.5 --tasks "
            "perplexity:embedded",
            "dart-llm sweep --methods griffin --layers each --keep 0.5 --tasks perplexity:embedded",
            "dart-llm sweep grid.yaml --engine ray --workers 4",
        ),
    ),
    Command(
        "drift",
        "drift.study:DriftStudy",
        DriftSettings,
        "Study a change of topic: methods side by side on prompts or on given passages; resumable.",
        (
            "dart-llm drift --passages shipped --sparsity 0.5",
            "dart-llm drift --prompts shipped --limit 40 --methods dense,never,dart --generation "
            "300",
            'dart-llm drift --prompt "Write about bees, and then about mortgages." --temperature '
            "0.8",
            "dart-llm drift --passages shipped --methods never,fresh:1,fresh:16,decay:32 --json",
        ),
    ),
    Command(
        "detect",
        "detection.study:DetectionStudy",
        DetectSettings,
        "Detection rate, delay and false alarms of every drift rule on every signal.\n\n"
        "The dense model reads passages whose changes of topic are known; nothing is pruned.",
        (
            "dart-llm detect",
            'dart-llm detect --signals attention,hidden --rules "paper,interval 64" --limit 2',
            "dart-llm detect --passages mine.jsonl --horizon 64 --windows 5,10,20 --json",
        ),
    ),
    Command(
        "inspect",
        inspect,
        InspectSettings,
        "Look into a model: its layers, weights and neurons, and what two texts make of them.\n\n"
        "Without a text: weights and neurons.  With text A also layers and activations; with A "
        "and B\nalso overlap, ablation and space.",
        (
            "dart-llm inspect weights neurons --top 10",
            "dart-llm inspect --prompt-file bees.txt --prompt-b-file loans.txt",
            "dart-llm inspect overlap ablation --passage 01 --method griffin --sparsity 0.5",
            "dart-llm inspect space --runs results/a/20260101-120000,results/b/20260101-120000 "
            "--json",
        ),
    ),
    Command(
        "bench quality",
        "quality.study:QualityStudy",
        QualitySettings,
        "How much of GRIFFIN's gap to dense a method closes, at equal sparsity and at equal bytes."
        "\n\nPerplexity where a text goes on and where its topic changes, on slices of texts of "
        "which one\nhalf is for choosing and the other for reporting; paired intervals; "
        "resumable.  docs/bench.md\nhas the formulas.",
        (
            "dart-llm bench quality",
            "dart-llm bench quality --text wiki.txt --text news.jsonl --text code.jsonl:source "
            "--slices 16",
            "dart-llm bench quality --set choose --methods dart --variants ablation.yaml "
            "--sparsities 0.5",
            "dart-llm bench quality --model smollm2-135m --model Qwen/Qwen2.5-0.5B-Instruct --json",
        ),
    ),
    Command(
        "bench speed",
        bench_speed,
        SpeedSettings,
        "How fast a model reads a prompt (pp) and generates (tg): dense, and pruned by each "
        "executor.\n\n"
        "Rows are interleaved in shuffled order, repetition by repetition.  Each is compared with "
        "plain transformers, with our own dense path, and with what the bytes allow.  The last "
        "line is one JSON document.  docs/performance.md has the definitions.",
        (
            "dart-llm bench speed",
            "dart-llm bench speed --dtype bfloat16 --methods dart,griffin --sparsities 0.5 "
            "--executors slim",
            "dart-llm bench speed --model-config qwen2.5-1.5b/config.json --rebuild-every 64 "
            "--repeats 3",
            "dart-llm bench speed --variants never.yaml --prompt-tokens 512 --tokens 256 "
            "--threads 2 --json",
        ),
    ),
    Command(
        "serve",
        serve,
        ServeSettings,
        "Serve a model over HTTP: OpenAI's API, and a page that shows its neurons.\n\n"
        "One model, one request at a time, fairly queued.  A request may say how it is pruned, "
        "under the key dart.  docs/server.md has every route, field and limit.",
        (
            "dart-llm serve",
            "dart-llm serve --model Qwen/Qwen2.5-0.5B-Instruct --port 0 --sparsity 0.3",
            "dart-llm serve --method dart --methods griffin,glass --max-waiting 16 --verbose",
            "DART_API_KEY=... dart-llm serve --host 0.0.0.0",
        ),
    ),
    Command(
        "replay",
        replay,
        None,
        "Make one HTML file of a recorded run: it plays in a browser, without a model or a server."
        "\n\nRECORDS: what POST /api/events answered, or what the window saved; JSON lines.",
        ("dart-llm replay records.jsonl --out replay.html",),
    ),
    Command(
        "results",
        results,
        None,
        "List, filter and tabulate the runs in a folder.",
        (
            "dart-llm results",
            "dart-llm results results --method dart --task mmlu --long",
            "dart-llm results results/my-sweep --long --csv > table.csv",
        ),
    ),
    Command(
        "prompts generate",
        info.generate_prompts,
        None,
        "Make prompts that change from one topic to another of a different domain.\n\n"
        "The same count, seed and ontology give the same prompts everywhere; fewer are the first "
        "of more.",
        (
            "dart-llm prompts generate 40 --seed 1 --out prompts.jsonl",
            "dart-llm prompts generate 50 --ontology my_domains.yaml --json",
        ),
    ),
    Command(
        "prompts list",
        info.list_prompts,
        None,
        "List the package's two-topic prompts, or its passages.",
        (
            "dart-llm prompts list --domain astronomy --template letter",
            "dart-llm prompts list --passages",
            "dart-llm prompts list --file prompts.jsonl --limit 5 --json",
        ),
    ),
    Command(
        "prompts show",
        info.show_prompt,
        None,
        "Show one prompt with its slots, or one passage with its topics marked.",
        (
            "dart-llm prompts show 01-bees-to-mortgages",
            "dart-llm prompts show letter-608b476da0 --json",
        ),
    ),
    Command(
        "demo",
        demo,
        None,
        "The main job on one model: dense, 20 % and 50 % side by side, and a report.",
        ("dart-llm demo",),
    ),
    Command(
        "methods",
        info.show_methods,
        None,
        "List methods, scores, budgets and drift rules with their sources.",
        ("dart-llm methods --json",),
    ),
    Command(
        "doctor",
        info.show_installation,
        None,
        "Say what this installation has: Python, torch, devices, cache, disk, token, extras.",
        ("dart-llm doctor",),
    ),
)
"""In the order of ``dart-llm --help``."""
