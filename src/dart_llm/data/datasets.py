"""Hub data sets: catalogue.yaml, hub: references, MMLU.

Every data set that the project can fetch from the hub, in one table.

No entry needs a loading script: the current ``datasets`` library runs none.  The question sets
are those that lm-eval's tasks load (a test compares them with the installed tasks).
``make test-online`` loads five rows of every entry and checks its columns; ``LAST_RUN`` says when
it last did.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dart_llm.errors import ConfigError, LoadError, MissingExtra, UnknownName
from dart_llm.files import read_rows

LAST_RUN = "never run"
"""When ``make test-online`` last passed: a date, or "never run"."""

USES: Mapping[str, str] = MappingProxyType(
    {
        "perplexity": "text for perplexity",
        "calibration": "text that static baselines are calibrated on",
        "summarize": "documents with reference summaries",
        "prompts": "questions that are not scored, for prompts and perplexity",
        "eval": "questions that lm-eval's tasks score",
    }
)
"""What a data set is used for."""


@dataclass(frozen=True)
class DataSet:
    """One split of one data set of the hub.

    ``columns``: by role (text, document, summary, question, choices, answer, id, ...), the
    columns that hold it.  ``revision``: a branch other than the main one.  ``first``: only so
    many rows are read, streamed.  ``tasks``: the lm-eval tasks that score it.  ``megabytes``:
    about what is downloaded, which is all splits of the configuration unless rows are streamed.
    ``licence_page``: the data set's card on the hub, unless its makers have a page of their own.
    ``verified``: when ``make test-online`` last read it.
    """

    name: str
    hub_id: str
    config: str | None
    split: str
    columns: Mapping[str, tuple[str, ...]]
    uses: tuple[str, ...] = ("eval",)
    licence: str = "unknown"
    licence_page: str = ""
    megabytes: int | None = None
    tasks: tuple[str, ...] = ()
    revision: str | None = None
    first: int | None = None
    gated: bool = False
    note: str = ""
    verified: str = "never"

    def __post_init__(self) -> None:
        card = f"https://huggingface.co/datasets/{self.hub_id}"
        object.__setattr__(self, "licence_page", self.licence_page or card)

    def column(self, role: str) -> str:
        """The one column of ``role``; ``KeyError`` when the data set has no such role."""
        return self.columns[role][0]

    @property
    def where(self) -> str:
        """Id, configuration and split, for people: ``allenai/c4 (en, validation)``."""
        return f"{self.hub_id} ({', '.join(part for part in (self.config, self.split) if part)})"


def columns(**roles: str | tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """A read-only mapping of roles to their columns."""
    found = {role: (name,) if isinstance(name, str) else name for role, name in roles.items()}
    return MappingProxyType(found)


def names(use: str | None = None) -> tuple[str, ...]:
    """The data sets that are used for ``use`` (a key of ``USES``), sorted; all without it."""
    if use is not None and use not in USES:
        raise UnknownName("use of data sets", use, USES)
    return tuple(sorted(n for n, found in DATA_SETS.items() if use is None or use in found.uses))


def get(name: str, use: str | None = None) -> DataSet:
    """The data set called ``name``; ``UnknownName`` unless it is one that serves ``use``."""
    known = names(use)
    if name not in known:
        raise UnknownName("data set", name, known)
    return DATA_SETS[name]


_ARC = columns(question="question", choices="choices", answer="answerKey")

_MMLU = columns(question="question", choices="choices", answer="answer")

_TABLE = (
    DataSet(
        "wikitext2",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
        columns(text="text"),
        uses=("perplexity",),
        licence="CC-BY-SA-3.0, GFDL",
        megabytes=8,
        note="lines joined by blank lines, as in published tables",
    ),
    DataSet(
        "c4",
        "allenai/c4",
        "en",
        "validation",
        columns(text="text"),
        uses=("perplexity",),
        licence="ODC-BY",
        megabytes=41,
        first=1100,
        note="the first 1,100 documents of en/c4-validation.00000-of-00008, joined by spaces",
    ),
    DataSet(
        "c4_train",
        "allenai/c4",
        "en",
        "train",
        columns(text="text"),
        uses=("calibration",),
        licence="ODC-BY",
        megabytes=319,
        first=512,
        note="the first documents of en/c4-train.00000-of-01024, joined by blank lines",
    ),
    DataSet(
        "mmlu",
        "cais/mmlu",
        "astronomy",
        "dev",
        _MMLU,
        uses=("prompts",),
        licence="MIT",
        megabytes=1,
        note="one configuration for each of the 57 subjects; dev, then validation; never test",
    ),
    DataSet(
        "xsum",
        "EdinburghNLP/xsum",
        None,
        "test",
        columns(document="document", summary="summary", id="id"),
        uses=("summarize",),
        megabytes=338,
        revision="refs/convert/parquet",
        note="the hub's own parquet copy: it is there whether or not the main branch is a script",
    ),
    DataSet(
        "cnn_dailymail",
        "abisee/cnn_dailymail",
        "3.0.0",
        "test",
        columns(document="article", summary="highlights", id="id"),
        uses=("summarize",),
        licence="Apache-2.0",
        megabytes=837,
    ),
    DataSet(
        "multi_news",
        "Awesome075/multi_news_parquet",
        None,
        "test",
        columns(document="document", summary="summary"),
        uses=("summarize",),
        licence="non-commercial research and education",
        licence_page="https://github.com/Alex-Fabbri/Multi-News/blob/master/LICENSE.txt",
        megabytes=390,
        note="a parquet copy of alexfabbri/multi_news, which needs a script",
    ),
    DataSet(
        "gov_report",
        "ccdv/govreport-summarization",
        "document",
        "test",
        columns(document="report", summary="summary"),
        uses=("summarize",),
        megabytes=507,
    ),
    DataSet(
        "mmlu_test",
        "cais/mmlu",
        "astronomy",
        "test",
        _MMLU,
        licence="MIT",
        megabytes=1,
        tasks=("mmlu",),
        note="one configuration for each of the 57 subjects; few-shot examples come from dev",
    ),
    DataSet(
        "boolq",
        "aps/super_glue",
        "boolq",
        "validation",
        columns(text="passage", question="question", answer="label"),
        licence="CC-BY-SA-3.0",
        licence_page="https://github.com/google-research-datasets/boolean-questions",
        megabytes=7,
        tasks=("boolq",),
    ),
    DataSet(
        "rte",
        "nyu-mll/glue",
        "rte",
        "validation",
        columns(text="sentence1", question="sentence2", answer="label"),
        licence="other: see its card",
        megabytes=2,
        tasks=("rte",),
    ),
    DataSet(
        "hellaswag",
        "Rowan/hellaswag",
        None,
        "validation",
        columns(question=("ctx_a", "ctx_b", "activity_label"), choices="endings", answer="label"),
        licence="MIT",
        licence_page="https://github.com/rowanz/hellaswag/blob/master/LICENSE",
        megabytes=37,
        tasks=("hellaswag",),
    ),
    DataSet(
        "winogrande",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        columns(question="sentence", choices=("option1", "option2"), answer="answer"),
        licence="CC-BY",
        licence_page="https://github.com/allenai/winogrande#license",
        megabytes=3,
        tasks=("winogrande",),
    ),
    DataSet(
        "arc_easy",
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
        _ARC,
        licence="CC-BY-SA-4.0",
        megabytes=1,
        tasks=("arc_easy",),
    ),
    DataSet(
        "arc_challenge",
        "allenai/ai2_arc",
        "ARC-Challenge",
        "test",
        _ARC,
        licence="CC-BY-SA-4.0",
        megabytes=1,
        tasks=("arc_challenge",),
    ),
    DataSet(
        "openbookqa",
        "allenai/openbookqa",
        "main",
        "test",
        columns(question="question_stem", choices="choices", answer="answerKey"),
        megabytes=1,
        tasks=("openbookqa",),
    ),
    DataSet(
        "gpqa",
        "Idavidrein/gpqa",
        "gpqa_main",
        "train",
        columns(
            question="Question",
            choices=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            answer="Correct Answer",
        ),
        licence="CC-BY-4.0",
        megabytes=4,
        tasks=("gpqa_main_n_shot",),
        gated=True,
        note="CSV; its conditions must be accepted on the hub, and HF_TOKEN set",
    ),
    DataSet(
        "medmcqa",
        "openlifescienceai/medmcqa",
        None,
        "validation",
        columns(question="question", choices=("opa", "opb", "opc", "opd"), answer="cop"),
        licence="Apache-2.0",
        megabytes=88,
        tasks=("medmcqa",),
    ),
)

DATA_SETS: Mapping[str, DataSet] = MappingProxyType({found.name: found for found in _TABLE})


# Documents and reference summaries as plain text, whatever form a data set keeps them in.


SEPARATOR = "|||||"
"""Multi-News writes this between (and after) the articles of one document."""

NEWLINE = "NEWLINE_CHAR"
"""Multi-News writes this for a line break inside an article."""


def reference(value: Any) -> str:
    """A reference summary; a list of sentences becomes its sentences, one a line.

    A string that is a printed list (``"['One.', 'Two.']"``) is read back first: scored as it is,
    its brackets and quotes would count as text.  Returns "" when there is no summary.
    """
    if isinstance(value, str):
        printed = _printed_list(value)
        value = value if printed is None else printed
    if isinstance(value, list | tuple):
        parts = (reference(part) for part in value)
        return "\n".join(part for part in parts if part)
    return str(value).strip() if isinstance(value, str) else ""


def multi_news(text: str) -> str:
    """A document of Multi-News: its articles separated by blank lines, without its markers."""
    articles = (article.strip() for article in text.replace(NEWLINE, "\n").split(SEPARATOR))
    return "\n\n".join(article for article in articles if article)


def multi_news_summary(text: str) -> str:
    """A summary of Multi-News without the dash that each of them begins with."""
    return text.lstrip("–— \n")


def _printed_list(text: str) -> list[str] | None:
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    try:
        value = ast.literal_eval(stripped)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    strings = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return value if strings else None


# The syntax that names any data set of the hub: ``hub:owner/name/configuration:split:column``.
#
# ::
#
#     hub:owner/name:test:text                    the text column of the test split, all rows
#     hub:owner/name/en:validation[:500]:text     configuration en, the first 500 rows, streamed
#     hub:owner/name:test:article:abstract        documents and their summaries (summarize)
#
# Nothing is guessed: the split and the column are always written out.


PREFIX = "hub:"

EXAMPLES = {
    ("text",): "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text",
    ("document", "summary"): "hub:EdinburghNLP/xsum:test:document:summary",
}
"""By the roles that the columns of a reference have."""

_PART = r"[^/:\[\]\s]+"

_PATTERN = re.compile(
    rf"hub:(?P<id>{_PART}/{_PART})(?:/(?P<config>[^:]+))?"
    rf":(?P<split>{_PART})(?:\[:(?P<first>\d+)\])?(?P<columns>(?::[^:]+)+)"
)


def is_reference(name: str) -> bool:
    """Whether ``name`` means a data set of the hub rather than a name or a path."""
    return name.startswith(PREFIX)


def parse(name: str, roles: tuple[str, ...] = ("text",)) -> DataSet:
    """The data set that ``name`` refers to, with one column for each of ``roles``.

    Raises ``ConfigError``, with an example, for anything but the syntax above.
    """
    found = _PATTERN.fullmatch(name)
    given = found["columns"][1:].split(":") if found else []
    if not found or len(given) != len(roles) or found["first"] == "0":
        wanted = " and one for the ".join(roles)
        raise ConfigError(
            f'"{name}" is not a data set of the hub with a column for the {wanted}: write '
            f"hub:owner/name[/configuration]:split:{':'.join(f'{role}-column' for role in roles)}, "
            f"e.g. {EXAMPLES.get(roles, EXAMPLES['text',])}"
        )
    return DataSet(
        name,
        found["id"],
        found["config"],
        found["split"],
        columns(**dict(zip(roles, given, strict=True))),
        uses=(),
        first=int(found["first"]) if found["first"] else None,
    )


# MMLU: its subjects, and the questions that are not scored, from local files.


MMLU_SUBJECTS: tuple[str, ...] = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)

LOCAL_MMLU = Path("datasets/mmlu")  # in the current folder; read instead of the hub

SPLITS = ("dev", "validation")  # never "test": those questions are scored

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def local_subjects() -> tuple[str, ...]:
    """The subjects whose ``<subject>_dev.jsonl`` lies in ``LOCAL_MMLU``, in the usual order."""
    return tuple(s for s in MMLU_SUBJECTS if (LOCAL_MMLU / f"{s}_dev.jsonl").is_file())


def local_questions(subject: str, folder: Path, *, answers: bool = False) -> list[dict[str, Any]]:
    """The questions in ``<subject>_dev.jsonl`` and, if it is there, ``<subject>_validation.jsonl``.

    Each is what ``question`` returns.  Raises ``ConfigError`` for a missing or malformed file.
    """
    required, *optional = (folder / f"{subject}_{split}.jsonl" for split in SPLITS)
    if not required.is_file():
        raise ConfigError(
            f"the folder {folder} holds no {required.name}: put it there, one JSON object a line "
            'with "question" and "choices"'
        )
    paths = [required, *(path for path in optional if path.is_file())]
    found = [
        question(subject, row, f"line {number} of {path}", answers=answers)
        for path in paths
        for number, row in read_rows(path)
    ]
    if not found:
        raise ConfigError(f"the file {required} holds no questions: add one JSON object a line")
    return found


def question(subject: str, row: Any, where: str, *, answers: bool = False) -> dict[str, Any]:
    """``{"subject", "question", "choices"}`` of a row, with ``"answer"`` only if ``answers``.

    The answer is a position in ``choices``.  ``where`` names the row in the ``ConfigError`` for a
    row that lacks something.
    """
    text = row.get("question") if isinstance(row, dict) else None
    choices = row.get("choices") if isinstance(row, dict) else None
    if not isinstance(text, str) or not isinstance(choices, list) or not choices:
        raise ConfigError(f'{where} needs "question" (text) and "choices" (a list): complete it')
    found = {"subject": subject, "question": text, "choices": [str(c) for c in choices]}
    return {**found, "answer": _answer(row, len(choices), where)} if answers else found


def text(row: dict[str, Any]) -> str:
    """A question as perplexity reads it: alone, or with its choices and answer if it has one."""
    if "answer" not in row:
        return str(row["question"])
    choices = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(row["choices"])]
    return "\n".join([row["question"].strip(), *choices, f"Answer: {LETTERS[row['answer']]}"])


def _answer(row: dict[str, Any], choices: int, where: str) -> int:
    answer = row.get("answer")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if (
        isinstance(answer, bool)
        or not isinstance(answer, int)
        or not 0 <= answer < min(choices, len(LETTERS))
    ):
        raise ConfigError(f'{where} needs "answer", the position of a choice from 0: complete it')
    return answer


# Data sets of the hub: what ``catalogue.py`` lists, and any other by ``hub_reference.py``.
#
# The only file that imports the ``datasets`` library, and only when a hub data set is asked for.
# A data set that cannot be fetched, is empty or lacks a column is an error, never an empty result.


HUB_TEXTS: tuple[str, ...] = names("perplexity")

INSTEAD = {
    "text": "use the embedded text or a text file of your own instead",
    "documents": 'give a JSONL file instead, one {"document": ..., "summary": ...} a line',
}
"""What to do without the hub."""


def mmlu_questions(
    subject: str, folder: str | Path | None = None, *, answers: bool = False
) -> list[dict[str, Any]]:
    """The MMLU questions of a subject that are not scored: ``dev``, then ``validation``.

    Each is ``{"subject", "question", "choices"}``; the answer is dropped here unless ``answers``,
    so no prompt that is built from them can show it.  ``folder`` holds ``<subject>_dev.jsonl``
    (and, if there is one, ``<subject>_validation.jsonl``); without it ``datasets/mmlu`` in the
    current folder is tried, and then the hub's ``cais/mmlu``.

    Raises ``UnknownName``, ``ConfigError`` (a local file is missing or malformed),
    ``MissingExtra`` (no ``datasets`` library) or ``LoadError`` (the hub cannot be reached).
    """
    if subject not in MMLU_SUBJECTS:
        raise UnknownName("MMLU subject", subject, MMLU_SUBJECTS)
    if folder is None and subject in local_subjects():
        folder = LOCAL_MMLU
    if folder is not None:
        return local_questions(subject, Path(folder), answers=answers)
    instead = f"to work without it put {subject}_dev.jsonl into {LOCAL_MMLU.as_posix()}/"
    found = []
    for split in SPLITS:
        source = replace(get("mmlu"), config=subject, split=split)
        found += [
            question(subject, row, source.where, answers=answers) for row in rows(source, instead)
        ]
    return found


def perplexity_text(name: str, documents: int | None = None) -> str:
    """The text of a hub data set that perplexity is measured on.

    ``wikitext2``: the test split of WikiText-2 (raw), lines joined by blank lines.  ``c4``: the
    first 1,100 documents of C4's English validation split, streamed, joined by spaces.  Both are
    the joins that the pruning literature uses.  ``hub:...``: a column of any data set (syntax in
    ``hub_reference.py``), rows joined by blank lines.  ``documents``: other than the usual number.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    if is_reference(name):
        source = parse(name)
    elif name in HUB_TEXTS:
        source = get(name)
    else:
        raise UnknownName("hub data set", name, HUB_TEXTS)
    return (" " if name == "c4" else "\n\n").join(_texts(source, documents))


def calibration_text(documents: int = 512) -> str:
    """The first ``documents`` documents of C4's English training split, joined by blank lines.

    No evaluation scores the training split, so what it calibrates has seen no evaluated item.
    Raises ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    return "\n\n".join(_texts(get("c4_train"), documents))


def documents(name: str, limit: int | None = None, seed: int | None = None) -> list[dict[str, str]]:
    """Documents with reference summaries: ``{"id", "document", "summary"}``, in their order.

    name: a data set of the catalogue that serves ``summarize``, or ``hub:...`` with the columns
    of the document and the summary.  The first ``limit`` documents (streamed), or with ``seed`` a
    random sample of that many; ``None`` is all.  Rows without a document or a summary are left
    out.  The id is the data set's own, or the row's position from 0.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    if is_reference(name):
        source = parse(name, ("document", "summary"))
    else:
        source = get(name, "summarize")
    _check_limit(limit)
    stream = limit is not None and seed is None
    found = _documents(source, rows(source, INSTEAD["documents"], stream=stream))
    if stream:
        chosen = list(islice(found, limit))
    else:
        every = list(found)
        chosen = [every[index] for index in positions(len(every), limit, seed)]
    if not chosen:
        raise LoadError(
            f"the data set {source.where} holds no row with both a document and a summary; "
            + INSTEAD["documents"]
        )
    return chosen


def positions(total: int, limit: int | None, seed: int | None) -> list[int]:
    """``limit`` of ``total`` positions, ascending: the first, or with ``seed`` a random sample.

    With the same seed a smaller sample is a part of a larger one.  ``None`` is all of them.
    """
    _check_limit(limit)
    found = list(range(total))
    if seed is not None:
        random.Random(seed).shuffle(found)
    return sorted(found[:limit])


def rows(source: DataSet, instead: str, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of ``source``, which has at least one and every column that it names.

    Streamed when ``stream`` or when only its first rows are wanted; otherwise the split is
    fetched once and read from the cache afterwards.  ``instead``: what an error says to do.

    Raises ``MissingExtra`` or ``LoadError``.
    """
    found = _fetch(source, instead, stream=stream or source.first is not None)
    first = next(found, None)
    if first is None:
        raise LoadError(f"the data set {source.where} is empty; {instead}")
    missing = [name for names in source.columns.values() for name in names if name not in first]
    if missing:
        raise LoadError(
            f"the data set {source.where} has no column {' or '.join(missing)}: its columns are "
            f"{', '.join(first)}; {instead}"
        )
    return _chain(first, found)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _texts(source: DataSet, count: int | None) -> list[str]:
    if count is not None:
        if count < 1:
            raise ConfigError(f"the number of documents must be 1 or more, not {count}")
        source = replace(source, first=count)
    column = source.column("text")
    found = []
    for row in rows(source, INSTEAD["text"]):
        if not isinstance(row[column], str):
            raise LoadError(
                f"the column {column} of {source.where} holds {type(row[column]).__name__}, not "
                f"text; name another of {', '.join(row)}"
            )
        found.append(row[column])
    if not any(text.strip() for text in found):
        raise LoadError(f"the column {column} of {source.where} holds no text; {INSTEAD['text']}")
    return found


def _documents(source: DataSet, found: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for position, row in enumerate(found):
        text = str(row[source.column("document")] or "").strip()
        summary = reference(row[source.column("summary")])
        if source.name == "multi_news":
            text, summary = multi_news(text), multi_news_summary(summary)
        if text and summary:
            own = row[source.column("id")] if "id" in source.columns else position
            yield {"id": str(own), "document": text, "summary": summary}


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of documents must be 1 or more, not {limit}")


def _fetch(source: DataSet, instead: str, *, stream: bool) -> Iterator[dict[str, Any]]:
    """The rows of ``source``; what the library raises, first or late, becomes ``LoadError``."""
    load_dataset = _load_dataset()
    branch = {"revision": source.revision} if source.revision else {}
    try:
        found = load_dataset(
            source.hub_id, source.config, split=source.split, streaming=stream, **branch
        )
        yield from islice(found, source.first)
    # The hub's clients share no base class for "cannot be reached", and streaming fails late.
    except Exception as error:
        raise LoadError(_sentence(source, error, instead)) from error


def _sentence(source: DataSet, error: BaseException, instead: str) -> str:
    from dart_llm.hub import redact

    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        error = error.__cause__  # its own message says nothing
    reason = redact(" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(" .")
    if "OfflineModeIsEnabled" in reason:
        reason = "it is not in the cache and HF_HUB_OFFLINE is set"
    if source.gated:
        instead = f"accept its conditions on the hub and set HF_TOKEN, or {instead}"
    return f"the data set {source.where} could not be fetched from the hub ({reason}); {instead}"


def _load_dataset() -> Callable[..., Any]:
    # A plain folder named datasets/ in the current directory imports as an empty package:
    # without load_dataset the library is as missing as without the module.
    try:
        load_dataset: Callable[..., Any] = import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:
        raise MissingExtra("datasets", "eval") from error
    return load_dataset


def no_bars() -> None:
    """The library's own progress bars off; ours say how far a measurement is."""
    with contextlib.suppress(ImportError, AttributeError):
        import_module("datasets").disable_progress_bars()
