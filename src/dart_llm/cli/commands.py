"""One line per command: settings class, function, examples.

``dart-llm sweep`` and ``dart-llm compare``.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.cli.options import Config, Fresh, Json, with_settings
from dart_llm.errors import ConfigError
from dart_llm.server.settings import ServeSettings
from dart_llm.settings import check_folder, merge
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.evaluate.settings import (
    EvalSettings,
    MeasureSettings,
    PerplexitySettings,
    SummarizeSettings,
)
from dart_llm.studies.inspection.settings import TEXTS, InspectSettings
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.sweep.settings import SweepFlags

# ``dart-llm bench``: fixed, documented measures of the methods.


def register(app: typer.Typer) -> None:
    """Add ``bench`` with its commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Fixed measures of the methods: quality, speed.")
    group.command(name="quality")(with_settings(quality, QualitySettings))
    group.command(name="speed")(with_settings(speed, SpeedSettings))
    app.add_typer(group, name="bench")


def quality(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """How much of GRIFFIN's gap to dense a method closes, at equal sparsity and at equal bytes.

    Perplexity where a text goes on and where its topic changes, on slices of texts of which one
    half is for choosing and the other for reporting; paired intervals; resumable.  docs/quality.md
    has the formulas.

    Examples:

    dart-llm bench quality

    dart-llm bench quality --text wiki.txt --text news.jsonl --text code.jsonl:source --slices 16

    dart-llm bench quality --set choose --methods dart --variants ablation.yaml --sparsities 0.5

    dart-llm bench quality --model smollm2-135m --model Qwen/Qwen2.5-0.5B-Instruct --json
    """
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.quality.study import document, run_quality

    given = {name: value for name, value in flags.items() if value != []}
    job = run_quality(merge(QualitySettings, given, config), Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(finite(document(job))))


def speed(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """How fast a model reads a prompt (pp) and generates (tg): dense, and pruned by each executor.

    Rows are interleaved in shuffled order, repetition by repetition.  Each is compared with plain
    transformers, with our own dense path, and with what the bytes allow; beside it what attaching,
    observing and re-masking cost.  The last line is one JSON document.  docs/performance.md has
    the definitions.

    Examples:

    dart-llm bench speed

    dart-llm bench speed --dtype bfloat16 --methods dart,griffin --sparsities 0.5 --executors slim

    dart-llm bench speed --model-config qwen2.5-1.5b/config.json --rebuild-every 64 --repeats 3

    dart-llm bench speed --variants never.yaml --prompt-tokens 512 --tokens 256 --threads 2 --json
    """
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.speed.study import document, last_line, run_speed

    given = {name: value for name, value in flags.items() if value != []}
    job = run_speed(merge(SpeedSettings, given, config), Ui(quiet=as_json), fresh)
    typer.echo(json.dumps(finite(document(job) if as_json else last_line(job))))


# ``dart-llm chat``: a conversation in the terminal.


def chat(flags: dict[str, Any], config: Config = None) -> None:
    """Talk with a pruned model, which stays loaded; settings change while you talk.

    Answers go to stdout, everything else to stderr.  /help lists the commands: /sparsity 0.7,
    /method griffin, /stats, /save FILE, /reset, /quit.  Ctrl-C stops an answer.  Piped input is
    answered line by line.

    Examples:

    dart-llm chat --sparsity 0.3

    dart-llm chat --model Qwen/Qwen2.5-0.5B-Instruct --method griffin --temperature 0.7

    echo "Why is the sky blue?" | dart-llm chat --sparsity 0.5
    """
    from dart_llm.cli.chat import run_chat
    from dart_llm.reporting.console import Ui

    run_chat(merge(ChatSettings, flags, config), Ui())


# ``dart-llm detect``: how well drift rules notice known changes of topic.


def detect(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Detection rate, delay and false alarms of every drift rule on every signal.

    The dense model reads passages whose changes of topic are known; nothing is pruned.

    Examples:

    dart-llm detect

    dart-llm detect --signals attention,hidden --rules "paper,interval 64" --limit 2

    dart-llm detect --passages mine.jsonl --horizon 64 --windows 5,10,20 --json
    """
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.detection.study import run_detect, study_document

    job = run_detect(merge(DetectSettings, flags, config), Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(finite(study_document(job))))


# ``dart-llm drift``.


def drift(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Study a change of topic: methods side by side on prompts or on given passages; resumable.

    Examples:

    dart-llm drift --passages shipped --sparsity 0.5

    dart-llm drift --prompts shipped --limit 40 --methods dense,never,dart --generation 300

    dart-llm drift --prompt "Write about bees, and then about mortgages." --temperature 0.8

    dart-llm drift --passages shipped --methods never,fresh:1,fresh:16,decay:32 --json
    """
    from dart_llm.errors import CellsFailed
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.drift.settings import collect
    from dart_llm.studies.drift.study import document, run_drift

    try:
        job = run_drift(collect(flags, config), Ui(quiet=as_json), fresh)
    except CellsFailed as failed:
        if as_json:  # what was measured is still told; the exit code says that some was not
            typer.echo(json.dumps(finite(failed.document)))
        raise
    if as_json:
        typer.echo(json.dumps(document(job)))


# ``dart-llm inspect``.


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
    """Look into a model: its layers, weights and neurons, and what two texts make of them.

    Without a text: weights and neurons.  With text A also layers and activations; with A and B
    also overlap, ablation and space.

    Examples:

    dart-llm inspect weights neurons --top 10

    dart-llm inspect --prompt-file bees.txt --prompt-b-file loans.txt

    dart-llm inspect overlap ablation --passage 01 --method griffin --sparsity 0.5

    dart-llm inspect space --runs results/a/20260101-120000,results/b/20260101-120000 --json
    """
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.inspection.study import document, run_inspect

    job = run_inspect(merge(InspectSettings, flags, config), what or (), Ui(quiet=as_json), fresh)
    if as_json:
        found = {"folder": str(job.path), **document(job), "timing": job.timing}
        typer.echo(json.dumps(finite(found)))


# ``dart-llm eval``, ``perplexity`` and ``summarize``.


def _measure(settings: MeasureSettings, fresh: bool, as_json: bool) -> None:
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.evaluate.study import document, run_measure

    job = run_measure(settings, Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(finite(document(job))))


def evaluate(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Run lm-eval tasks on a pruned model.

    Examples:

    dart-llm eval --tasks arc_easy,hellaswag --method dart --sparsity 0.5 --limit 200

    dart-llm eval --tasks mmlu --num-fewshot 5 --model Qwen/Qwen2.5-0.5B-Instruct --dense

    dart-llm eval --tasks my_task --include-path my_tasks --json
    """
    _measure(merge(EvalSettings, flags, config), fresh, as_json)


def perplexity(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a text, dense beside pruned on the same tokens.

    Examples:

    dart-llm perplexity --method dart --sparsity 0.5 --limit 16

    dart-llm perplexity --data wikitext2 --protocol standard --window 2048

    dart-llm perplexity --data my_text.txt,c4 --method griffin --sparsity 0.3 --json
    """
    _measure(merge(PerplexitySettings, flags, config), fresh, as_json)


def summarize(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Summaries of documents and their ROUGE.

    Examples:

    dart-llm summarize --data xsum --limit 100 --method dart --sparsity 0.5 --dense

    dart-llm summarize --data articles.jsonl --max-output 128 --json
    """
    _measure(merge(SummarizeSettings, flags, config), fresh, as_json)


# ``dart-llm replay``.


def replay(
    records: Annotated[
        str, typer.Argument(metavar="RECORDS", help="File with the records; - is standard input.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page to write (default: beside RECORDS, .html)."),
    ] = None,
) -> None:
    """Make one HTML file of a recorded run: it plays in a browser, without a model or a server.

    RECORDS: what POST /api/events answered, or what the window saved; JSON lines.

    Example: dart-llm replay records.jsonl --out replay.html
    """
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


# ``dart-llm results``.


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
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON document on stdout only.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Comma-separated.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", metavar="", help="A Markdown table.")
    ] = False,
) -> None:
    """List, filter and tabulate the runs in a folder.

    Examples:

    dart-llm results

    dart-llm results results --method dart --task mmlu --long

    dart-llm results results/my-sweep --long --csv > table.csv
    """
    from dart_llm.experiments import index
    from dart_llm.reporting.console import Ui

    runs = index.filter(
        index.find(folder),
        model=model,
        method=method,
        task=task,
        status=status,
        experiment=experiment,
        since=since,
    )
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


# ``dart-llm serve``.


def serve(flags: dict[str, Any], config: Config = None) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page that shows its neurons.

    One model, one request at a time, fairly queued.  A request may say how it is pruned, under the
    key dart.  docs/server.md has every route, field and limit.

    Examples:

    dart-llm serve

    dart-llm serve --model Qwen/Qwen2.5-0.5B-Instruct --port 0 --sparsity 0.3

    dart-llm serve --method dart --methods griffin,glass --max-waiting 16 --verbose

    DART_API_KEY=... dart-llm serve --host 0.0.0.0
    """
    settings = merge(ServeSettings, flags, config)
    from dart_llm.reporting.console import Ui
    from dart_llm.server.run import serve as run

    if settings.verbose:
        logging.getLogger("dart_llm.serve").setLevel(logging.INFO)
    run(settings, Ui())


GridFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="A YAML file with the grid.")
]

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Print cells, downloads, disk, time; run nothing."),
]

FreshCells = Annotated[bool, typer.Option("--fresh", metavar="", help="Compute every cell anew.")]

COMPARED = {"methods": "dense,griffin,dart", "sparsities": "0.5"}


def sweep(
    flags: dict[str, Any],
    file: GridFile = None,
    dry_run: DryRun = False,
    fresh: FreshCells = False,
    as_json: Json = False,
) -> None:
    """Measure a grid of models, methods, sparsities, layers, tasks and seeds; resumable.

    Examples:

    dart-llm sweep grid.yaml --dry-run

    dart-llm sweep --methods dense,griffin,dart --sparsities 0.3,0.5 --tasks perplexity:embedded

    dart-llm sweep --methods griffin --layers each --keep 0.5 --tasks perplexity:embedded

    dart-llm sweep grid.yaml --engine ray --workers 4
    """
    _run("sweep", flags, {}, file, dry_run, fresh, as_json)


def compare(
    flags: dict[str, Any],
    file: GridFile = None,
    dry_run: DryRun = False,
    fresh: FreshCells = False,
    as_json: Json = False,
) -> None:
    """Methods against dense and GRIFFIN on the same items, with paired intervals and a plot.

    Without flags: dense, griffin and dart at sparsity 0.5.

    Examples:

    dart-llm compare --tasks perplexity:embedded --limit 8

    dart-llm compare --methods griffin,flap,dart --sparsities 0.3,0.5 --tasks arc_easy --limit 200

    dart-llm compare --tasks mmlu --methods griffin,dart,dense-8bit --json
    """
    _run("compare", flags, COMPARED, file, dry_run, fresh, as_json)


def _run(
    kind: str,
    flags: dict[str, Any],
    defaults: dict[str, str],
    file: Path | None,
    dry_run: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    from dart_llm.errors import CellsFailed
    from dart_llm.files import finite
    from dart_llm.reporting.console import Ui
    from dart_llm.studies.sweep import study

    given = SweepFlags(**{k: v for k, v in flags.items() if v is not None})
    root = given.results_dir if flags.get("results_dir") else os.environ.get("DART_RESULTS_DIR")
    request = study.SweepRequest(
        kind,
        study.grid(given.grid_flags(), None, defaults, file),
        Path(root or given.results_dir),
        check_folder(given.experiment_name) or (file.stem if file else kind),
        fresh,
        given.engine,
        given.workers,
        given.tracker,
    )
    ui = Ui(quiet=as_json)
    try:
        if dry_run:
            document = study.dry_run(request, ui).to_dict()
        else:
            document = study.run(request, ui)
    except CellsFailed as failed:
        if as_json:  # what was measured is still told; the exit code says that some was not
            typer.echo(json.dumps(finite(failed.document)))
        raise
    if as_json:
        typer.echo(json.dumps(finite(document)))
