"""Summaries of documents, scored with ROUGE (docs/reference.md, "Protocols").

Summaries are generated one at a time, greedily, each up to an end token or ``max_output`` tokens.
A document that does not fit the context is shortened.  Under the protocol ``decode`` the prompt is
dense and observed, and the summary runs pruned.  Under ``full`` the masks come from a dense pass
over the prompt and are then applied to the prompt too.  ``published`` would also select masks from
the answer; a summary has no given answer, so here it equals ``full``.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dart_llm.data.documents import Document, load_documents
from dart_llm.data.texts import chat_text, check_chat_template
from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation import text_metrics
from dart_llm.evaluation.measurement import PROTOCOLS, Measurement, MeasureOptions, mean
from dart_llm.evaluation.parts import (
    Part,
    UnitStore,
    check_pruned,
    finished_part,
    merge_accounting,
    method_digest,
)
from dart_llm.evaluation.tasks import split
from dart_llm.files import finite
from dart_llm.models.describe import context_length
from dart_llm.pruning.records import RunReport, without_sequences
from dart_llm.session.generation import CheckedModel, Generation, generate, text_ends
from dart_llm.session.run import BoundMethod, Run

HEADLINE = "rougeL"

# The prompt: an instruction, the document, and a cue.  If the prompt is too long, text is removed
# from the end of the document and from nothing else.

INSTRUCTION = "Summarize the following text in one or two sentences."

CUE = "Summary:"

MIN_KEPT = 0.8
"""The shortened document is cut back further, to the end of a word, if that keeps at least this
fraction of it."""


class Prompt(NamedTuple):
    """A prompt: its token ids, the document in it, and two flags.

    ``shortened``: whether the document was shortened.  ``chat``: whether the chat template is used.
    """

    ids: list[int]
    document: str
    shortened: bool
    chat: bool


def fit(
    tokenizer: Any,
    document: str,
    context_length: int | None,
    max_output: int,
    chat: bool | None = None,
) -> Prompt:
    """A prompt that leaves room for ``max_output`` tokens in a context of ``context_length``.

    If ``context_length`` is None, nothing is shortened.  ``chat``: whether to apply the chat
    template; None means only if the tokenizer has one.  A shortened document ends with a whole word
    if a word ends near the limit.

    Raises ``ConfigError`` if there is no room for the document, or if ``chat`` is True but the
    tokenizer has no template.
    """
    if chat:
        check_chat_template(tokenizer, "give --no-apply-chat-template")
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    document = document.strip()
    encode = partial(_encode, tokenizer, chat=chat)
    ids = encode(document)
    if context_length is None or len(ids) + max_output <= context_length:
        return Prompt(ids, document, False, chat)
    kept = _shortened(document, lambda text: len(encode(text)), context_length - max_output)
    if not kept:
        raise ConfigError(
            f"the instruction alone has {len(encode(''))} tokens and {max_output} are to be "
            f"generated, so a context of {context_length} leaves no room for the document: give a "
            "smaller --max-output or a model with a longer context"
        )
    return Prompt(encode(kept), kept, True, chat)


def _encode(tokenizer: Any, document: str, chat: bool) -> list[int]:
    text = f"{INSTRUCTION}\n\n{document}\n\n{CUE}"
    if chat:  # templates of reasoning models read enable_thinking
        text = chat_text(tokenizer, [{"role": "user", "content": text}], enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    return [int(token) for token in ids]


def _shortened(document: str, tokens: Callable[[str], int], room: int) -> str:
    """The longest prefix of ``document`` whose prompt has at most ``room`` tokens; "" if none fits.

    The prefix ends with a word if possible.  ``tokens(text)`` is the number of tokens of the prompt
    with the document ``text``.
    """
    lengths = range(1, len(document) + 1)
    length = bisect_right(lengths, room, key=lambda end: tokens(document[:end]))
    kept = document[:length]
    if kept and not document[length : length + 1].isspace():
        whole_words = kept.rsplit(maxsplit=1)[0]
        kept = whole_words if len(whole_words) >= MIN_KEPT * length else kept
    while kept and tokens(kept) > room:  # a shorter text can have more tokens
        kept = kept[:-1].rstrip()
    return kept.rstrip()


@dataclass
class Summarizer:
    """Summarises with one method.  ``run`` must not be attached; None means the untouched model."""

    candidate: BoundMethod
    options: MeasureOptions
    run: Run | None

    def __post_init__(self) -> None:
        self.ends = text_ends(self.candidate.model, self.candidate.tokenizer)

    def key(self, ids: Sequence[int], reference: str) -> str:
        """The key of a stored result, from everything that determines it except the model."""
        options, digest = self.options, method_digest(self.candidate)
        digest.update(json.dumps([options.seed, list(ids), reference]).encode())
        parts = (self.candidate.label, options.protocol, options.max_output, digest.hexdigest())
        return "/".join(["summarize", *map(str, parts)])

    def summarize(self, document: Document, prompt: Prompt) -> Part:
        """Summarise a document; return ``scores``, ``sample``, ``report`` and ``unpruned``.

        ``unpruned`` is True if the summary ended before any token could be pruned.  The values are
        converted to JSON and back, so that they equal those of a resumed run.  Text and token count
        exclude the end token.

        Raises ``ConfigError`` if the summary should have been pruned but ran dense, and
        ``DartError`` if a logit is not finite.
        """
        model = CheckedModel(self.candidate.model, self.ends, f"document {document.id}")
        summary, report = self._generate(model, torch.tensor([prompt.ids]))
        ended = bool(summary.token_ids) and summary.token_ids[-1] in self.ends
        tokens = len(summary.token_ids) - ended
        text = "".join(summary.tokens[:tokens])
        part = {
            "scores": {**text_metrics.rouge_scores(text, document.summary), "tokens": tokens},
            "sample": {
                "prompt_tokens": len(prompt.ids),
                "chat": prompt.chat,
                "shortened": prompt.shortened,
                "document": prompt.document,
                "reference": document.summary,
                "text": text,
                "finish": "stop" if ended else "length",
            },
            "report": None if report is None else without_sequences(report.to_dict()),
            "unpruned": report is not None and self._unpruned(report),
        }
        return dict(json.loads(json.dumps(finite(part))))

    def _generate(self, model: CheckedModel, ids: Tensor) -> tuple[Generation, RunReport | None]:
        run, options, tokenizer = self.run, self.options, self.candidate.tokenizer
        make = partial(generate, model, tokenizer, ids, options.max_output, seed=options.seed)
        if run is None:
            return make(run=None), None
        run.hold(None)
        with run:  # attached again for each document, so that no state carries over
            if options.protocol == "decode":
                return make(run=run), run.report()
            self._fix_masks(run, ids)
            with run.decoding(prompt=True):
                summary = make(run=run)
            return summary, run.report()

    @torch.inference_mode()
    def _fix_masks(self, run: Run, ids: Tensor) -> None:
        """Select masks in a dense pass over the prompt, and keep them fixed."""
        candidate = self.candidate
        if candidate.masks is None and candidate.fixed_masks is None:
            ids = ids.to(candidate.model.device)
            candidate.model(ids, use_cache=True, logits_to_keep=1)
        run.hold(run.select())

    def _unpruned(self, report: RunReport) -> bool:
        """Whether the summary ended before any token could be pruned."""
        assert self.run is not None
        if not self.run.asks_for_pruning:
            return False
        if report.decoded_tokens < 2:
            return report.achieved_sparsity == 0
        check_pruned(
            report.dense_token_share < 1,
            f"summaries of {self.candidate.label}",
            f"{report.decoded_tokens} decoded tokens of a summary",
            "give a larger --max-output, or a smaller --min-evidence or --masking-step",
        )
        return False


def count(task: str, options: MeasureOptions, tokenizer: Any = None, model: Any = None) -> int:
    """The number of documents that ``measure`` will summarise."""
    return len(load_documents(split(task)[1], options.limit, options.sample_seed))


def measure(
    candidate: BoundMethod,
    task: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Summarise the documents of ``summarize:DATA``.

    Each document's result is stored in ``parts``, so that a resumed run reuses it.  ``advance(1)``
    is called after each document.  Raises ``MissingExtra`` without rouge-score, ``ConfigError`` if
    a prompt does not fit the context or a summary that should have been pruned ran dense, and
    ``DartError`` if a logit is not finite.
    """
    text_metrics.rouge_scorer()
    check_name("protocol", options.protocol, PROTOCOLS)
    if options.max_output < 1:
        raise ConfigError("a summary needs at least 1 token: give --max-output 1 or more")
    documents = load_documents(split(task)[1], options.limit, options.sample_seed)
    summarizer = Summarizer(candidate, options, candidate.run())
    longest, chat = context_length(candidate.model), options.apply_chat_template
    finished: list[Part] = []
    for document in documents:
        prompt = fit(candidate.tokenizer, document.document, longest, options.max_output, chat)
        key = summarizer.key(prompt.ids, document.summary)
        make = partial(summarizer.summarize, document, prompt)
        finished.append(finished_part(parts, key, make))
        advance(1)
    pairs = list(zip(documents, finished, strict=True))
    items = tuple({"id": document.id, **part["scores"]} for document, part in pairs)
    return Measurement(
        task=task,
        protocol=options.protocol,
        metric=HEADLINE,
        higher_is_better=True,
        metrics={name: mean([item[name] for item in items]) for name in text_metrics.METRICS},
        items=items,
        samples=tuple({"id": document.id, **part["sample"]} for document, part in pairs),
        notes=(*candidate.notes, *_notes(options, finished)),
        accounting=merge_accounting(summarizer.run, finished),
    )


def _notes(options: MeasureOptions, parts: Sequence[Part]) -> Iterator[str]:
    """Notes on the numbers; a resumed run gives the same notes."""
    pruned = any(part["report"] for part in parts)
    if pruned and options.protocol == "published":
        yield "published protocol: equals full, because a summary has no answer to leak"
    if pruned and options.protocol != "decode":
        yield "the masks come from the prompt and prune both the prompt and the whole summary"
    samples = [part["sample"] for part in parts]
    tokens = options.max_output
    for text, flags in (
        ("the document was shortened to fit the context", [s["shortened"] for s in samples]),
        (f"the summary was cut at {tokens} tokens", [s["finish"] == "length" for s in samples]),
        ("the summary is empty and scores 0", [not s["text"].strip() for s in samples]),
        ("the summary ended before any token ran pruned", [part["unpruned"] for part in parts]),
    ):
        if any(flags):
            yield f"{text} in {sum(flags)} of {len(parts)} documents"
