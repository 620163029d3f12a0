"""Summaries of documents and their ROUGE; prompts cut to fit (docs/reference.md, "Protocols").

One document at a time, greedy, to the end of the sequence or ``max_output`` tokens.  Under
``decode`` the prompt is dense and observed and the summary runs pruned; under ``full`` the masks
come from a dense pass over the prompt and are then applied to the prompt too.
"""

from __future__ import annotations

import hashlib
import json
import re
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
from dart_llm.evaluation.masks_seen import (
    Part,
    TakenMasks,
    count_masks,
    finished_part,
    merge_accounting,
)
from dart_llm.evaluation.measurement import PROTOCOLS, Measurement, MeasureOptions, mean
from dart_llm.files import finite
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.pruning.records import RunReport, without_sequences
from dart_llm.session.generation import CheckedModel, Generation, generate, text_ends
from dart_llm.session.prepare import UnitStore
from dart_llm.session.run import BoundMethod, Run

# The prompt, of which only the document is ever shortened, from its end: the instruction before
# it, the cue after it and the chat template around all of it stay whole.

INSTRUCTION = "Summarize the following text in one or two sentences."

CUE = "Summary:"

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)|[^\s](?=\n)")

_WORD_END = re.compile(r"\S(?=\s)")

_NEAR = 0.8
"""A boundary in the last fifth of what fits is worth the text that it costs."""


class Prompt(NamedTuple):
    """``ids``: the token ids; ``document``: as it stands in the prompt; ``chat``: as a message."""

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

    ``context_length`` None: nothing is shortened.  ``chat``: through the
    chat template, or not; None: where the tokenizer has one.  The document ends with a sentence
    where one ends near the limit, else with a word.

    Raises ``ConfigError`` when no word of the document fits beside the instruction, and when
    ``chat`` is True without a template.
    """
    if chat:
        check_chat_template(tokenizer, "give --no-apply-chat-template")
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    document = document.strip()

    encode = partial(_encode, tokenizer, chat=chat)
    ids = encode(document)
    if context_length is None or len(ids) + max_output <= context_length:
        return Prompt(ids, document, False, chat)
    room = context_length - max_output
    kept = _shortened(document, lambda text: len(encode(text)) <= room)
    if not kept:
        raise ConfigError(
            f"the instruction alone has {len(encode(''))} tokens and {max_output} are to be "
            f"generated, so a context of {context_length} leaves no room for the document: give a "
            "smaller --max-output or a model with a longer context"
        )
    return Prompt(encode(kept), kept, True, chat)


def _encode(tokenizer: Any, document: str, chat: bool) -> list[int]:
    text = f"{INSTRUCTION}\n\n{document}\n\n{CUE}"
    if chat:  # templates of models that would reason aloud first read enable_thinking
        text = chat_text(tokenizer, [{"role": "user", "content": text}], enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    return [int(token) for token in ids]


def _shortened(document: str, fits: Callable[[str], bool]) -> str:
    """The longest start of ``document`` that fits, back to a boundary; "" when nothing does."""
    low, high = 0, len(document)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(document[:middle]) else (low, middle)
    kept = document[: _boundary(document, low)]
    while kept and not fits(kept):  # fewer characters can be more tokens
        kept = kept[:-1].rstrip()
    return kept


def _boundary(text: str, length: int) -> int:
    """The end of the last sentence within ``length`` characters, or word; where none, ``length``"""
    for pattern in (_SENTENCE_END, _WORD_END):
        ends = [match.end() for match in pattern.finditer(text, 0, length + 1)]
        if ends and ends[-1] >= _NEAR * length:
            return ends[-1]
    return length


@dataclass
class Summarizer:
    """Summarises with one candidate; ``run``: not attached, or None for the untouched model."""

    candidate: BoundMethod
    options: MeasureOptions
    run: Run | None

    def __post_init__(self) -> None:
        self.ends = text_ends(self.candidate.model, self.candidate.tokenizer)
        self.identity = _identity(self.candidate)

    def key(self, ids: Sequence[int], reference: str) -> str:
        """Key of a part: everything that determines its value."""
        options = self.options
        content = json.dumps([self.identity, options.seed, list(ids), reference])
        digest = hashlib.sha256(content.encode()).hexdigest()[:24]
        return f"summarize/{self.candidate.label}/{options.protocol}/{options.max_output}/{digest}"

    def summarize(self, document: Document, prompt: Prompt) -> Part:
        """The part of one document, as it would be read back from a file: ``scores``, ``sample``,
        ``report``, ``unpruned`` and ``masks``.

        Text and number of tokens leave out the token that ends the sequence.

        Raises ``ConfigError`` when it should have been pruned and ran dense, ``DartError`` when a
        logit is not finite.
        """
        taken = TakenMasks()
        model = CheckedModel(self.candidate.model, self.ends, f"document {document.id}")
        made, report = self._generate(model, torch.tensor([prompt.ids]), taken)
        ended = bool(made.token_ids) and made.token_ids[-1] in self.ends
        tokens = len(made.token_ids) - ended
        text = "".join(made.tokens[:tokens])
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
            "masks": taken.packed,
        }
        return dict(json.loads(json.dumps(finite(part))))

    def _generate(
        self, model: CheckedModel, ids: Tensor, taken: TakenMasks
    ) -> tuple[Generation, RunReport | None]:
        run, options, tokenizer = self.run, self.options, self.candidate.tokenizer
        make = partial(generate, model, tokenizer, ids, options.max_output, seed=options.seed)
        if run is None:
            return make(run=None), None
        run.on_masks = taken
        run.hold(None)
        with run:  # attached anew for each document: nothing of the one before is left
            if options.protocol == "decode":
                return make(run=run), run.report()
            self._fix_masks(run, ids)
            with run.decoding(prompt=True):
                made = make(run=run)
            return made, run.report()

    @torch.inference_mode()
    def _fix_masks(self, run: Run, ids: Tensor) -> None:
        """Fix the masks that a dense pass over the prompt gives."""
        candidate = self.candidate
        if candidate.masks is None and candidate.fixed_masks is None:
            ids = ids.to(candidate.model.device)
            candidate.model(ids, use_cache=True, logits_to_keep=1)
        run.hold(run.select())

    def _unpruned(self, report: RunReport) -> bool:
        """Whether the summary ended before there was a token to prune."""
        assert self.run is not None
        if not self.run.asks_for_pruning or report.decoded_tokens < 2:
            return self.run.asks_for_pruning and report.achieved_sparsity == 0
        if report.dense_token_share == 1:
            raise ConfigError(
                f"summaries of {self.candidate.label}: all {report.decoded_tokens} decoded tokens "
                "of a summary ran dense, so this would measure the untouched model; give a larger "
                "--max-output, or a smaller --min-evidence or --masking-step"
            )
        return False


def _identity(candidate: BoundMethod) -> str:
    """A checksum of the model's name and dtype and of how it is pruned, masks included."""
    facts = checkpoint_facts(candidate.model)
    config = None if candidate.config is None else candidate.config.to_dict()
    content = [facts.get("name"), facts.get("dtype"), config]
    content += [facts["weights"]] if "weights" in facts else []
    total = hashlib.sha256(json.dumps(content, default=str).encode())
    for layer, ids in sorted((candidate.masks or {}).items()):
        total.update(f"{int(layer)}:{torch.as_tensor(ids).tolist()}".encode())
    for mask in candidate.fixed_masks or ():
        total.update(b"dense" if mask is None else f"{mask.ids.tolist()}".encode())
        if mask is not None and mask.bias is not None:
            total.update(f"{mask.bias.tolist()}".encode())
    return total.hexdigest()


HEADLINE = "rougeL"


def count(name: str, options: MeasureOptions) -> int:
    """Documents that ``measure`` will summarise."""
    return len(load_documents(name, options.limit, options.sample_seed))


def measure(
    candidate: BoundMethod,
    name: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Summarise the documents ``name``, each stored as a part.

    ``advance(1)`` is called after each document.  Raises ``MissingExtra`` without rouge-score,
    ``ConfigError`` when a prompt does not fit the context or an item that should have been pruned
    ran dense, ``DartError`` for logits that are not finite.
    """
    text_metrics.rouge_scorer()
    check_name("protocol", options.protocol, PROTOCOLS)
    if options.max_output < 1:
        raise ConfigError("a summary needs at least 1 token: give --max-output 1 or more")
    documents = load_documents(name, options.limit, options.sample_seed)
    summarizer = Summarizer(candidate, options, candidate.run())
    finished: list[Part] = []
    for document in documents:
        prompt = fit(
            candidate.tokenizer,
            document.document,
            context_length(candidate.model),
            options.max_output,
            options.apply_chat_template,
        )
        key = summarizer.key(prompt.ids, document.summary)
        make = partial(summarizer.summarize, document, prompt)
        finished.append(finished_part(parts, key, make))
        advance(1)
    pairs = list(zip(documents, finished, strict=True))
    items = tuple({"id": document.id, **part["scores"]} for document, part in pairs)
    counts, masks = count_masks(finished)
    return Measurement(
        task=f"summarize:{name}",
        protocol=options.protocol,
        metric=HEADLINE,
        higher_is_better=True,
        metrics={name: mean([item[name] for item in items]) for name in text_metrics.METRICS},
        items=items,
        accounting=merge_accounting(summarizer.run, finished),
        samples=tuple({"id": document.id, **part["sample"]} for document, part in pairs),
        notes=(*candidate.notes, *_notes(options, finished)),
        counts=counts,
        masks=masks,
    )


def _notes(options: MeasureOptions, parts: Sequence[Part]) -> Iterator[str]:
    """Notes for readers of the numbers; the same whether or not the run was resumed."""
    pruned = any(part["report"] for part in parts)
    if pruned and options.protocol == "published":
        yield "published protocol: a summary has no answer for the masks to see, so it equals full"
    if pruned and options.protocol != "decode":
        yield "the masks come from the prompt, prune the prompt too, and stay for the whole summary"
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
