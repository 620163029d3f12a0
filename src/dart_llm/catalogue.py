"""Every data set that the project can fetch from the hub, in one table.

No entry needs a loading script: the current ``datasets`` library runs none.  The question sets
are those that lm-eval's tasks load (a test compares them with the installed tasks).
``make test-online`` loads five rows of every entry and checks its columns; ``LAST_RUN`` says when
it last did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dart_llm.errors import UnknownName

__all__ = ["DATA_SETS", "LAST_RUN", "USES", "DataSet", "columns", "get", "names"]

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
