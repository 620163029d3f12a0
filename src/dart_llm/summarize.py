"""Summaries of documents and their ROUGE (docs/method.md, "Evaluation").

One document at a time, greedy, to the end of the sequence or ``max_output`` tokens.  Under
``decode`` the prompt is dense and observed and the summary runs pruned; under ``full`` the masks
come from a dense pass over the prompt and are then applied to the prompt too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dart_llm import rouge, summary_prompt
from dart_llm.arch import context_length
from dart_llm.candidate import Candidate, Parts
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.mask_counts import MaskCounts
from dart_llm.mask_parts import unpack
from dart_llm.measurement import PROTOCOLS, Measurement, MeasureOptions, mean
from dart_llm.merge import merge_reports
from dart_llm.summary_parts import Part, Summarizer

if TYPE_CHECKING:
    from dart_llm.documents import Document

HEADLINE = "rougeL"


def count(name: str, options: MeasureOptions) -> int:
    """Documents that ``measure`` will summarise."""
    return len(_documents(name, options))


def measure(
    candidate: Candidate,
    name: str,
    options: MeasureOptions,
    parts: Parts,
    advance: Callable[[int], None],
) -> Measurement:
    """Summarise the documents ``name``, each kept as a finished part.

    ``advance(1)`` is called after each document.  Raises ``MissingExtra`` without rouge-score,
    ``ConfigError`` when a prompt does not fit the context or an item that should have been pruned
    ran dense, ``DartError`` for logits that are not finite.
    """
    rouge.scorer()
    if options.protocol not in PROTOCOLS:
        raise UnknownName("protocol", options.protocol, PROTOCOLS)
    if options.max_output < 1:
        raise ConfigError("a summary needs at least 1 token: give --max-output 1 or more")
    documents = _documents(name, options)
    summarizer = Summarizer(candidate, options, candidate.run())
    found = []
    for document in documents:
        found.append(_part(summarizer, document, parts))
        advance(1)
    return _measurement(candidate, f"summarize:{name}", options, documents, found)


def _documents(name: str, options: MeasureOptions) -> list[Document]:
    from dart_llm.documents import load_documents

    return load_documents(name, options.limit, options.sample_seed)


def _part(summarizer: Summarizer, document: Document, parts: Parts) -> Part:
    """The document's finished part, or a new one, which is then kept."""
    model, options = summarizer.candidate.model, summarizer.options
    prompt = summary_prompt.fit(
        summarizer.candidate.tokenizer,
        document.document,
        context_length(model),
        options.max_output,
        options.apply_chat_template,
    )
    key = summarizer.key(prompt.ids, document.summary)
    part: Part | None = parts.part(key)
    if part is None:
        part = summarizer.summarize(document, prompt)
        parts.save_part(key, part)
    return part


def _measurement(
    candidate: Candidate,
    task: str,
    options: MeasureOptions,
    documents: Sequence[Document],
    parts: Sequence[Part],
) -> Measurement:
    pairs = list(zip(documents, parts, strict=True))
    items = tuple({"id": document.id, **part["scores"]} for document, part in pairs)
    reports = [part["report"] for part in parts if part["report"]]
    accounting = merge_reports(reports) if reports else None
    if accounting:
        accounting.pop("sequences")
    counts = MaskCounts()
    for part in parts:
        for packed in part["masks"]:
            counts(unpack(packed))
    return Measurement(
        task=task,
        protocol=options.protocol,
        metric=HEADLINE,
        higher_is_better=True,
        metrics={name: mean([item[name] for item in items]) for name in rouge.METRICS},
        items=items,
        accounting=accounting,
        samples=tuple({"id": document.id, **part["sample"]} for document, part in pairs),
        notes=(*candidate.notes, *_notes(options, parts)),
        counts=counts.counts,
        masks=counts.masks,
    )


def _notes(options: MeasureOptions, parts: Sequence[Part]) -> Iterator[str]:
    """What a reader of the numbers must know; the same whether or not the run was resumed."""
    pruned = any(part["report"] for part in parts)
    if pruned and options.protocol == "published":
        yield "published protocol: a summary has no answer for the masks to see, so it equals full"
    if pruned and options.protocol != "decode":
        yield "the masks come from the prompt, prune the prompt too, and hold for the whole summary"
    samples = [part["sample"] for part in parts]
    tokens = options.max_output
    for text, found in (
        ("the document was shortened to fit the context", [s["shortened"] for s in samples]),
        (f"the summary was cut at {tokens} tokens", [s["finish"] == "length" for s in samples]),
        ("the summary is empty and scores 0", [not s["text"].strip() for s in samples]),
        ("the summary ended before a token ran pruned", [part["unpruned"] for part in parts]),
    ):
        if any(found):
            yield f"{text} in {sum(found)} of {len(parts)} documents"
