"""How one cell runs: a passage read token by token (forced), or a text written (free); metrics.

Forced mode: the first P tokens of a passage are prefilled dense and observed; the others run as
decode tokens.  Token k after the prompt is fed in decode step k, so the loss of token k + 1 is the
first that step k decides: token 0, which the dense prompt predicts, has none, and the last token is
never fed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dart_llm.data.passages import encode, first_tokens
from dart_llm.data.prompts import encode_prompt
from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.perplexity import DIGITS, score_window
from dart_llm.evaluation.windows import Window
from dart_llm.files import finite
from dart_llm.session.generation import CheckedModel, generate, text_ends
from dart_llm.session.run import Run
from dart_llm.studies.drift.cells import DriftCell, Source, shortened
from dart_llm.studies.drift.record import StudyFiles
from dart_llm.studies.drift.settings import DENSE, FORCED, DriftSettings

if TYPE_CHECKING:
    from dart_llm.evaluation.text_metrics import TextTools
    from dart_llm.reporting.console import Ui


@dataclass(frozen=True, eq=False)
class Reading:
    """A passage as tokens ``ids`` [n], of which the first ``prompt`` are the prompt.

    ``starts``: index, counted after the prompt, of the first token of every topic; 0 for the first
    topic.  ``pieces``: the text of every token after the prompt.  ``cut``: whether the context
    ended before the passage did.
    """

    source: Source
    ids: Tensor
    prompt: int
    starts: tuple[int, ...]
    pieces: tuple[str, ...]
    cut: bool

    @property
    def decoded(self) -> int:
        """Tokens after the prompt."""
        return len(self.ids) - self.prompt


def read(source: Source, tokenizer: Any, prompt: int, longest: int | None) -> Reading:
    """Tokenise a passage; ``longest``: tokens of the model's context.

    Raises ``ConfigError`` when the first topic is too short for a prompt of ``prompt`` tokens, or
    the context for the first change.
    """
    ids, ends = encode(tokenizer, source.text)
    count = min(len(ids), longest or len(ids))
    cut = count < len(ids)
    kept = shortened(source, ends[count - 1]) if cut else source
    if not kept.changes:
        raise ConfigError(
            f'the passage "{source.id}" changes its topic after the {longest} tokens of the '
            "model's context: give a model with a longer one, or shorter passages"
        )
    firsts = first_tokens(ends, kept.changes)
    if firsts[0] < prompt + 2:
        raise ConfigError(
            f'the passage "{source.id}" has {firsts[0]} tokens before its first change of topic, '
            f"too few for a prompt of {prompt} and a token after it: give a smaller "
            "--prompt-tokens, or a longer passage"
        )
    bounds = [ends[prompt - 1], *ends[prompt:count]]
    pieces = [kept.text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    starts = (0, *(first - prompt for first in firsts))
    return Reading(kept, torch.tensor(ids[:count]), prompt, starts, tuple(pieces), cut)


def triggers(reading: Reading, observed: int, moment: int) -> list[int]:
    """Decode steps at which a timed method starts to observe, so that its masks hold in time.

    ``moment`` tokens after each change, of which the last ``observed`` ran dense.  A change whose
    topic is shorter than that has none.
    """
    ends = [*reading.starts[2:], reading.decoded]
    return [
        start + moment - observed
        for start, end in zip(reading.starts[1:], ends, strict=True)
        if start + moment < end
    ]


def losses(model: Any, run: Run | None, reading: Reading) -> list[float | None]:
    """The loss in nats of every token after the prompt; None for the first of them.

    ``run``: an attached run, or None for the untouched model.  Raises ``DartError`` when a loss is
    not finite.
    """
    try:
        found = score_window(model, run, Window(reading.ids, reading.prompt + 1))
    except DartError as error:
        if type(error) is not DartError:
            raise
        words = str(error).removeprefix("slice 0: ")
        raise DartError(f"the passage {reading.source.id}: {words}") from None
    return [None, *(round(loss, DIGITS) for loss in found.losses)]


# Free mode: the model writes after a prompt, through its own ``generate``.


@dataclass(frozen=True, eq=False)
class Asking:
    """A prompt as tokens ``ids`` [1, T]; ``chat``: through the model's chat template."""

    source: Source
    ids: Tensor
    chat: bool


@dataclass(frozen=True)
class Written:
    """A text and the pieces of its tokens; ``ended``: by the model itself."""

    text: str
    pieces: tuple[str, ...]
    ended: bool


def ask(
    source: Source, tokenizer: Any, chat: bool | None, tokens: int, longest: int | None
) -> Asking:
    """Tokenise a prompt; ``chat`` None: with the chat template where there is one.

    Raises ``ConfigError`` when prompt and ``tokens`` do not fit the context of ``longest``.
    """
    wrap = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    ids = encode_prompt(tokenizer, source.text, wrap)
    if longest and ids.shape[1] + tokens > longest:
        raise ConfigError(
            f'the prompt "{source.id}" has {ids.shape[1]} tokens and {tokens} are to be written, '
            f"but the model's context is {longest}: give a smaller --generation"
        )
    return Asking(source, ids, wrap)


def write(
    model: Any,
    tokenizer: Any,
    asking: Asking,
    tokens: int,
    run: Run | None,
    temperature: float | None = None,
    seed: int = 0,
) -> Written:
    """Up to ``tokens`` tokens; greedy unless ``temperature``.

    ``run``: an attached run, or None for the untouched model.  The token that ends a text is one
    of its tokens, with an empty piece.  Raises ``DartError`` when a logit is not finite.
    """
    ends = text_ends(model, tokenizer)
    checked = CheckedModel(model, ends, f"the text after {asking.source.id}")
    made = generate(
        checked, tokenizer, asking.ids, tokens, run=run, temperature=temperature, seed=seed
    )
    ended = bool(made.token_ids) and made.token_ids[-1] in ends
    pieces = [*made.tokens[:-1], ""] if ended else made.tokens
    return Written("".join(pieces), tuple(pieces), ended)


# Every free text against the dense text of the same source and seed.


@dataclass(frozen=True)
class Judge:
    """Loaded tools, or why there are none.  ``notes``: what a reader of the numbers must know."""

    tools: TextTools | None
    notes: tuple[str, ...] = ()

    def measure(self, files: StudyFiles, cell: DriftCell) -> None:
        """Compare the cell's text with the dense one and keep it, unless that was done before."""
        if self.tools is None or cell.method.name == DENSE or files.metrics(cell) is not None:
            return
        own, dense = files.part(cell), files.folder.part(cell.dense_key)
        if own is None or dense is None:
            return
        from dart_llm.evaluation.text_metrics import compare

        began = time.perf_counter()
        found = compare(own["text"], dense["text"], self.tools).to_dict()
        part = {"values": finite(found), "seconds": time.perf_counter() - began}
        files.folder.save_part(f"metrics/{cell.key}", part)

    def facts(self) -> dict[str, Any] | None:
        """The models behind the numbers, for config.json."""
        return None if self.tools is None else self.tools.to_dict()


def load_judge(settings: DriftSettings, ui: Ui) -> Judge:
    """The tools of free mode, loaded before anything long is computed.

    What is missing is said and costs the metrics alone, never the study.
    """
    compared = any(method.name != DENSE for method in settings.method_list())
    if settings.kind == FORCED or not settings.metrics or not compared:
        return Judge(None)
    from dart_llm.evaluation.text_metrics import load_tools

    embedder, bertscore, place = settings.embedder, settings.bertscore, settings.cache_dir
    try:
        with ui.status("loading the models of the metrics") as news:
            tools = load_tools(embedder, bertscore=bertscore, cache_dir=place, progress=news)
    except DartError as error:
        ui.say(f"no metrics: {error}")
        return Judge(None, (f"no metrics: {error}",))
    return Judge(tools, tools.notes)
