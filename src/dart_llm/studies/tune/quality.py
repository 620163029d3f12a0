"""The texts on which ``dart-llm tune`` judges a setting, and one slice scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.calibration.self_text import opening_ids, own_start, sample_continuations
from dart_llm.data import documents
from dart_llm.errors import ConfigError
from dart_llm.evaluation.divergence import compare_window
from dart_llm.evaluation.windows import Window, slice_windows
from dart_llm.pruning.config import PriorConfig, PruneConfig
from dart_llm.session.run import Run

OWN_TEXT = "own"
"""Label of the text that the model writes itself."""

STEPS_AHEAD = 1_000_003
"""Added to the seed: the text must be another than the one from which priors are learnt."""

FACTS = (
    "decoded_tokens",
    "achieved_sparsity",
    "dense_token_share",
    "remasks",
    "token_bytes_share",
    "extra_memory_bytes",
)
"""What is kept of a run's report on a slice."""

Part = dict[str, Any]
"""``loss`` and ``kl``: means over the scored tokens, nats; ``tokens``; ``accounting``: ``FACTS``,
None of the reference."""


@dataclass(frozen=True, eq=False)
class Slice:
    """``text``: label of the text; ``window``: its tokens, prompt first."""

    text: str
    window: Window

    @property
    def id(self) -> str:
        """Unique among the slices of a run."""
        return f"{self.text}/{self.window.number}"

    @property
    def scored(self) -> Tensor:
        """The scored tokens, [C]."""
        return self.window.ids[self.window.first :]


def first_of(count: int) -> tuple[int, ...]:
    """Places of the slices, of ``count``, that ``--quick`` scores: the first and a middle one."""
    return tuple(dict.fromkeys((0, count // 2)))


def write_text(model: Any, count: int, length: int, seed: int, skip: int = 0) -> list[list[int]]:
    """``count`` texts of ``length`` tokens that ``model`` writes, as priors are learned from.

    ``skip``: texts that were written before: these are others.  Raises ``ConfigError`` for a model
    without a head.
    """
    prior, generator = PriorConfig(), torch.Generator().manual_seed(seed + STEPS_AHEAD + skip)
    begin = opening_ids(model, skip + count, min(prior.opening, length - 1))
    if begin is not None:
        begin = begin[skip:]
    else:
        vocabulary = int(model.config.get_text_config().vocab_size)
        begin = torch.randint(vocabulary, (count, 1), generator=generator)
        if start := own_start(model):
            begin[:] = start[0]
    found: list[list[int]] = sample_continuations(
        model, begin, length, generator, lambda text: None, prior.temperature, prior.top_p
    ).tolist()
    return found


def slices_of(
    own: Mapping[int, Sequence[int]], second: Sequence[Slice], prompt: int
) -> list[Slice]:
    """Slices of the model's own texts, by number, and those of the user's, ``second``, in turn."""
    first = [Slice(OWN_TEXT, Window(torch.tensor(one), prompt, n)) for n, one in own.items()]
    return sorted([*first, *second], key=lambda one: one.window.number)


def users(text: str, tokenizer: Any, count: int, prompt: int, scored: int) -> list[Slice]:
    """Slices of the user's text; raises ``ConfigError`` where it has no two."""
    ids: Tensor = tokenizer(documents.read(text), return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2 * (prompt + scored):
        raise ConfigError(
            f'the text "{text}" has {len(ids)} tokens, and two slices need '
            f"{2 * (prompt + scored)}: give a longer text, or a smaller --prompt-tokens or --tokens"
        )
    label = documents.resolve(text).label
    label = f"{label}, given" if label == OWN_TEXT else label
    return [Slice(label, one) for one in slice_windows(ids, count, prompt, scored)]


def needs_prompt(config: PruneConfig) -> bool:
    """Whether a run must see the prompt: what removes nothing need not."""
    return config.target > 0


def score(model: Any, run: Run, one: Slice, reference: Tensor, prompt: Any = None) -> Part:
    """One slice by ``run``, not attached; ``reference``: [C, V] logits of the dense model.

    ``prompt``: the cache of its prompt, which is used up, where the run need not see it.  Raises
    ``ConfigError`` when all scored tokens ran dense though a sparsity was asked for.
    """
    run.reset()
    with run:
        found = compare_window(model, run, one.window, reference, prompt)
    report = run.report().to_dict()
    if report["dense_token_share"] == 1 and run.asks_for_pruning:
        raise ConfigError(
            f"all {report['decoded_tokens']} decoded tokens of slice {one.id} ran dense, so this "
            "would measure the untouched model; give more --prompt-tokens or --tokens"
        )
    return {**found._asdict(), "accounting": {name: report[name] for name in FACTS}}
