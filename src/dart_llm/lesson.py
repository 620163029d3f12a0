"""The parts that are learnt of a model: where each is kept, what decides it, how it is made.

A part is one thing that scores, budgets or compensation read: the gradients, the basis of
compensation, a sum over the tokens of the model's own text, or the reach towards the vocabulary.
Each is kept under a key of what decides it alone, so that configurations share what they can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dart_llm import calibration_cache
from dart_llm.config import PriorConfig, PruneConfig
from dart_llm.errors import LoadError
from dart_llm.evidence import LayerEvidence, Sum
from dart_llm.fingerprint import digest_of, fingerprint
from dart_llm.own_study import find_bases, study
from dart_llm.own_text import go_on, opening_ids, own_start
from dart_llm.select import Selector
from dart_llm.token_statistics import Statistics
from dart_llm.weights import FfnWeights, reach_of

Say = Callable[[str], None]

VERSION = 3
"""Of what is learnt and how: another one finds nothing of the old in the cache."""

TEXT, REACH, CURVATURE, BASIS, SCORE = "text", "reach", "curvature", "basis", "score"
"""Parts that are no sums over tokens under a name of their own (``SUMS``), and a score's sum.

The text is read from the disk where it is needed, and not held.
"""

SUMS = {
    "signed": ("signed",),
    "features": ("features", "moments", "cross"),
    "squares": ("squares", "gain", "stream"),
    "sensitivity": ("cosine", "change"),
    "sensitivity-residual": ("cosine-residual", "change-residual"),
}
"""Parts that are sums: what a configuration needs (``Statistics.needs``), and its sums' names."""

Part = list[LayerEvidence]


@dataclass
class Lesson:
    """The parts that one configuration reads of one model: where each is kept, how it is made."""

    model: Any
    config: PruneConfig
    layers: tuple[FfnWeights, ...]
    cache_dir: str | None
    say: Say

    def __post_init__(self) -> None:
        self.statistics = Selector(self.config, self.layers).statistics
        self.digest = fingerprint(self.model)
        self.devices = [layer.device for layer in self.layers]
        self.unkept = False
        self.opening: Tensor | None = None
        self.text: Tensor | None = None
        if (prior := self.config.prior) is not None:
            self.start = own_start(self.model)
            self.opening = opening_ids(self.model, prior.sequences, prior.opening)

    def find(self, names: Sequence[str]) -> dict[str, Part]:
        """The parts of ``names`` that are known already: those of the text that is known."""
        found = dict[str, Part]()
        if self.text is None and any(name != REACH for name in names):
            self._recall_text()
        for name in names:
            if name == REACH or self.text is not None:
                part = self._find(name, self.devices, found)
                found |= {} if part is None else {name: part}
        return found

    def learn(self, names: Sequence[str], known: dict[str, Part]) -> dict[str, Part]:
        """The parts of ``names``, made from the model's own text; ``known``: those that are."""
        prior = self.config.prior
        assert prior is not None
        self.say(
            f"learning {_in_words(names)} from {prior.sequences} x {prior.length} tokens of the "
            "model's own text, once"
        )
        if self.text is None:
            self._write_text(prior)
            found = self.find(names)  # of this very text: it alone was lost
            known, names = known | found, [name for name in names if name not in found]
            if not names:
                return known
        ids = self.text
        assert ids is not None
        bases: list[Tensor | None] = [None] * len(self.layers)
        if BASIS in known:
            bases = [basis_of(known, place, one) for place, one in enumerate(self.layers)]
        elif BASIS in names:
            bases = find_bases(self.model, ids, self.config.compensation_rank, self.layers)
        evidence = study(
            self.model, ids, self._missing(names), bases, self.layers, self.say, CURVATURE in names
        )
        made = {name: _part_of(evidence, name) for name in names}
        for name, part in made.items():
            self._keep(name, part, known | made)
        return known | made

    def reach(self) -> Part:
        """``FfnWeights.reach`` of every layer."""
        self.say("computing once how far every neuron reaches towards the vocabulary")
        found = []
        for number, layer in enumerate(self.layers):
            assert layer.embedding is not None
            high, mean = reach_of(layer.down.detach(), layer.embedding.detach())
            found.append(LayerEvidence({"max": Sum(high, 1.0), "mean": Sum(mean, 1.0)}))
            if (number + 1) % max(2, len(self.layers) // 4) == 0:
                self.say(f"reach towards the vocabulary: {number + 1} of {len(self.layers)} layers")
        self._keep(REACH, found, {})
        return found

    def _missing(self, names: Sequence[str]) -> Statistics:
        """The statistics of ``names`` alone."""
        per_token = self.statistics.per_token if SCORE in names else None
        return replace(
            self.statistics, per_token=per_token, needs=frozenset(names) & SUMS.keys(), spread=False
        )

    def _recall_text(self) -> None:
        found = self._find(TEXT, [torch.device("cpu")], {})
        self.text = None if found is None else found[0].sums["ids"].total

    def _write_text(self, prior: PriorConfig) -> None:
        self.text = self._written(prior)
        self._keep(TEXT, [LayerEvidence({"ids": Sum(self.text, 1.0)})], {})

    def _written(self, prior: PriorConfig) -> Tensor:
        """What the model writes by itself, [n, T] int64 on the host."""
        generator, opening = torch.Generator().manual_seed(self.config.seed), self.opening
        if opening is None:
            self.say("no tokenizer is at hand: the model's own text begins with its start token")
            vocabulary = int(self.model.config.get_text_config().vocab_size)
            opening = torch.randint(vocabulary, (prior.sequences, 1), generator=generator)
            if self.start:
                opening.fill_(self.start[0])
        written = go_on(
            self.model, opening, prior.length, generator, self.say, prior.temperature, prior.top_p
        )
        return written.clone()

    def _find(
        self, name: str, devices: Sequence[torch.device], known: dict[str, Part]
    ) -> Part | None:
        key = self._key(name, known)
        return calibration_cache.find(self.model, key, self.cache_dir, devices, name != TEXT)

    def _keep(self, name: str, part: Part, known: dict[str, Part]) -> None:
        about, key = {"note": f"what dart_llm learnt of a model: {name}"}, self._key(name, known)
        try:
            calibration_cache.keep(self.model, key, self.cache_dir, part, about, name != TEXT)
        except LoadError as error:
            if not self.unkept:  # one sentence is enough for all parts
                self.say(f"what was learnt is not kept for the next time: {error}")
            self.unkept = True

    def _key(self, name: str, known: dict[str, Part]) -> str:
        decides = self._decides(name, known)
        return calibration_cache.part_key(self.digest, VERSION, name, *decides)

    def _decides(self, name: str, known: dict[str, Part]) -> list[object]:
        """What decides a part beside the model.

        Of the text and the basis what is in them, not what was asked for: another machine rounds,
        and so writes, otherwise, and parts of two texts would not fit together.
        """
        if name == REACH:
            return [self.config.score.proxy_embedding]
        if name == TEXT:
            prior = self.config.prior
            assert prior is not None
            first = self.start if self.opening is None else digest_of(self.opening)
            return [first, prior.model_dump(exclude={"tokens"}), self.config.seed]
        assert self.text is not None
        text = digest_of(self.text)
        if name == BASIS:
            return [text, self.config.compensation_rank]
        if name == "features":
            each = [one.sums[BASIS].total for one in known.get(BASIS, []) if BASIS in one.sums]
            return [text, *map(digest_of, each)]
        if name == SCORE:
            return [text, calibration_cache.rule_of(self.statistics), self.statistics.ema_decay]
        return [text]


def _in_words(names: Sequence[str]) -> str:
    """What parts are to people: ``gradients, features of compensation and mean activations``."""
    words = {CURVATURE: "gradients", BASIS: "features of compensation"}
    told = list(dict.fromkeys(words.get(name, "mean activations") for name in names))
    return " and ".join([", ".join(told[:-1]), told[-1]]) if len(told) > 1 else told[0]


def _part_of(evidence: Sequence[LayerEvidence], name: str) -> Part:
    wanted = SUMS.get(name, (name,))
    return [
        LayerEvidence({one: found.sums[one] for one in wanted if one in found.sums})
        for found in evidence
    ]


def basis_of(found: dict[str, Part], place: int, layer: FfnWeights) -> Tensor | None:
    """The basis [r, D] of one layer, in its dtype; None where it has none."""
    held = found[BASIS][place].sums if BASIS in found else {}
    return held[BASIS].total.to(layer.down.dtype) if BASIS in held else None
