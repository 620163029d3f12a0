"""One document becomes one finished part: the summary, its scores and its accounting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dart_llm import rouge
from dart_llm.candidate import Candidate
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.errors import ConfigError
from dart_llm.finite_logits import CheckedModel, text_ends
from dart_llm.generate import Generation, generate
from dart_llm.mask_parts import Taken
from dart_llm.measurement import MeasureOptions
from dart_llm.merge import slim
from dart_llm.records import RunReport
from dart_llm.results import finite
from dart_llm.session import Run
from dart_llm.summary_prompt import Prompt

if TYPE_CHECKING:
    from dart_llm.documents import Document

Part = Mapping[str, Any]
"""``scores``, ``sample``, ``report``, ``unpruned`` and ``masks`` (packed); all JSON-able.

Text and number of tokens leave out the token that ends the sequence.
"""


@dataclass
class Summarizer:
    """One candidate at work; ``run``: its run, not attached, or None for the untouched model."""

    candidate: Candidate
    options: MeasureOptions
    run: Run | None

    def __post_init__(self) -> None:
        self.ends = text_ends(self.candidate.model, self.candidate.tokenizer)
        self.identity = _identity(self.candidate)

    def key(self, ids: Sequence[int], reference: str) -> str:
        """Names a part by everything that decides its value."""
        options = self.options
        content = json.dumps([self.identity, options.seed, list(ids), reference])
        digest = hashlib.sha256(content.encode()).hexdigest()[:24]
        return f"summarize/{self.candidate.label}/{options.protocol}/{options.max_output}/{digest}"

    def summarize(self, document: Document, prompt: Prompt) -> Part:
        """The part of one document, as it would be read back from a file.

        Raises ``ConfigError`` when it should have been pruned and ran dense, ``DartError`` when a
        logit is not finite.
        """
        taken = Taken()
        model = CheckedModel(self.candidate.model, self.ends, f"document {document.id}")
        made, report = self._generate(model, torch.tensor([prompt.ids]), taken)
        ended = bool(made.token_ids) and made.token_ids[-1] in self.ends
        tokens = len(made.token_ids) - ended
        text = "".join(made.tokens[:tokens])
        part = {
            "scores": {**rouge.score(text, document.summary), "tokens": tokens},
            "sample": {
                "prompt_tokens": len(prompt.ids),
                "chat": prompt.chat,
                "shortened": prompt.shortened,
                "document": prompt.document,
                "reference": document.summary,
                "text": text,
                "finish": "stop" if ended else "length",
            },
            "report": None if report is None else slim(report.to_dict()),
            "unpruned": report is not None and self._unpruned(report),
            "masks": taken.packed,
        }
        return dict(json.loads(json.dumps(finite(part))))

    def _generate(
        self, model: CheckedModel, ids: Tensor, taken: Taken
    ) -> tuple[Generation, RunReport | None]:
        run = self.run
        if run is None:
            return self._text(model, ids), None
        run.on_masks = taken
        run.hold(None)
        with run:  # attached anew for each document: nothing of the one before is left
            if self.options.protocol == "decode":
                made = self._text(model, ids)
            else:
                self._hold_masks(run, ids)
                with run.decoding(prompt=True):
                    made = self._text(model, ids)
            return made, run.report()

    @torch.inference_mode()
    def _hold_masks(self, run: Run, ids: Tensor) -> None:
        """From now on apply the masks that a dense pass over the prompt gives."""
        candidate = self.candidate
        if candidate.masks is None and candidate.held is None:
            ids = ids.to(candidate.model.device)
            candidate.model(ids, use_cache=True, logits_to_keep=1)
        run.hold(run.select())

    def _text(self, model: CheckedModel, ids: Tensor) -> Generation:
        tokenizer, options = self.candidate.tokenizer, self.options
        return generate(model, tokenizer, ids, options.max_output, run=self.run, seed=options.seed)

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


def _identity(candidate: Candidate) -> str:
    """A checksum of the model's name and dtype and of how it is pruned, masks included."""
    facts = checkpoint_facts(candidate.model)
    config = None if candidate.config is None else candidate.config.to_dict()
    content = [facts.get("name"), facts.get("dtype"), config]
    total = hashlib.sha256(json.dumps(content, default=str).encode())
    for layer, ids in sorted((candidate.masks or {}).items()):
        total.update(f"{int(layer)}:{torch.as_tensor(ids).tolist()}".encode())
    for held in candidate.held or ():
        total.update(b"dense" if held is None else f"{held.ids.tolist()}".encode())
        if held is not None and held.bias is not None:
            total.update(f"{held.bias.tolist()}".encode())
    return total.hexdigest()
