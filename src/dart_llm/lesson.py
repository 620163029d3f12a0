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
from dart_llm.fingerprint import fingerprint
from dart_llm.own_study import find_bases, study
from dart_llm.own_text import go_on, opening_ids, own_start
from dart_llm.select import Selector
from dart_llm.token_statistics import Statistics
from dart_llm.weights import FfnWeights, reach_of

Say = Callable[[str], None]

VERSION = 3
"""Of what is learnt and how: another one finds nothing of the old in the cache."""

REACH, CURVATURE, BASIS, SCORE = "reach", "curvature", "basis", "score"
"""Parts that are no sums over tokens under a name of their own (``SUMS``), and a score's sum."""

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
        if (prior := self.config.prior) is not None:
            self.start = own_start(self.model)
            self.opening = opening_ids(self.model, prior.sequences, prior.opening)

    def find(self, names: Sequence[str]) -> dict[str, Part]:
        """The parts of ``names`` that are known already."""
        found = {}
        for name in names:
            part = calibration_cache.find(self.model, self._key(name), self.cache_dir, self.devices)
            if part is not None:
                found[name] = part
        return found

    def learn(self, names: Sequence[str], known: dict[str, Part]) -> dict[str, Part]:
        """The parts of ``names``, made from the model's own text; ``known``: those that are."""
        prior = self.config.prior
        assert prior is not None
        self.say(
            f"learning {_in_words(names)} from {prior.sequences} x {prior.length} tokens of the "
            "model's own text, once"
        )
        ids = self._text(prior)
        bases: list[Tensor | None] = [None] * len(self.layers)
        if BASIS in known:
            bases = [basis_of(known, place, one) for place, one in enumerate(self.layers)]
        elif BASIS in names:
            bases = find_bases(self.model, ids, self.config.compensation_rank, self.layers)
        evidence = study(
            self.model, ids, self._missing(names), bases, self.layers, self.say, CURVATURE in names
        )
        return {name: self._keep(name, _part_of(evidence, name)) for name in names}

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
        return self._keep(REACH, found)

    def _missing(self, names: Sequence[str]) -> Statistics:
        """The statistics of ``names`` alone."""
        per_token = self.statistics.per_token if SCORE in names else None
        return replace(
            self.statistics, per_token=per_token, needs=frozenset(names) & SUMS.keys(), spread=False
        )

    def _text(self, prior: PriorConfig) -> Tensor:
        """The model's own text [n, T], int64 on the host: found, or written now."""
        host = [torch.device("cpu")]
        key = self._key("text")
        known = calibration_cache.find(self.model, key, self.cache_dir, host)
        if known is None:
            ids = self._write(prior)
            known = self._keep("text", [LayerEvidence({"ids": Sum(ids, 1.0)})])
        return known[0].sums["ids"].total

    def _write(self, prior: PriorConfig) -> Tensor:
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

    def _keep(self, name: str, part: Part) -> Part:
        about = {"note": f"what dart_llm learnt of a model: {name}"}
        try:
            calibration_cache.keep(self.model, self._key(name), self.cache_dir, part, about)
        except LoadError as error:
            if not self.unkept:  # one sentence is enough for all parts
                self.say(f"what was learnt is not kept for the next time: {error}")
            self.unkept = True
        return part

    def _key(self, name: str) -> str:
        return calibration_cache.part_key(self.digest, VERSION, name, *self._decides(name))

    def _decides(self, name: str) -> list[object]:
        """What decides a part beside the model."""
        if name == REACH:
            return [self.config.score.proxy_embedding]
        prior = self.config.prior
        assert prior is not None
        first = self.start if self.opening is None else calibration_cache.digest_of(self.opening)
        text: list[object] = [first, prior.model_dump(exclude={"tokens"}), self.config.seed]
        if name in (BASIS, "features"):
            return [*text, self.config.compensation_rank]
        if name == SCORE:
            return [*text, calibration_cache.rule_of(self.statistics), self.statistics.ema_decay]
        return text


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
