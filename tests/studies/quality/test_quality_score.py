"""One slice of ``bench quality``: the shared prompt, the live detector, the known moment."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from dart_llm.errors import ConfigError
from dart_llm.evaluation.perplexity import score_window
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import PreparedMethod as Candidate
from dart_llm.session.run import Run
from dart_llm.studies.quality.slices import CONTINUATION, LEAD, MOMENT, SHIFT, Part
from dart_llm.studies.quality.slices import score_shared_prompt as shared
from dart_llm.studies.quality.slices import score_single as alone
from lm_cases import Forwards, loaded
from quality_cases import PROMPT, TOKENS, read_pairs

GRIFFIN = PruneConfig.build("griffin")
CELLS = (CONTINUATION, SHIFT)


def dart(sparsity: float = 0.5, **settings: object) -> PruneConfig:
    return PruneConfig.build("dart", sparsity=sparsity, **settings)


def measured(config: PruneConfig, cell: str, told: bool = False) -> Part:
    """``told``: the moment of the change."""
    candidate = Candidate(*loaded(), config)
    return alone(candidate, None if told else candidate.run(), cell, read_pairs(1)[0])


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def test_one_prompt_serves_dense_and_griffin_at_every_sparsity() -> None:
    model, pair = loaded()[0], read_pairs(1)[0]
    wanted = [(cell, sparsity) for cell in CELLS for sparsity in (0.0, 0.3, 0.7)]
    with Forwards(model) as seen:
        found = {(cell, s): part for cell, s, part in shared(model, GRIFFIN, pair, wanted)}
    assert seen.shapes.count((1, PROMPT - 1)) == 1  # and then only what follows it
    assert list(found) == wanted
    for (cell, sparsity), part in found.items():
        window = pair.window(cell)
        if not sparsity:
            alone_losses = score_window(model, None, window).losses
            assert part["accounting"] is None
        else:
            with Run(model, GRIFFIN.replace({"sparsity": sparsity})) as run:
                alone_losses = score_window(model, run, window).losses
            report = run.report().to_dict()
            own = dict(part["accounting"])
            assert own.pop("remask_steps") == [] and own.pop("extra_memory_bytes") > 0
            assert own == {name: report[name] for name in own}
            assert own["decoded_tokens"] == (TOKENS if cell == CONTINUATION else LEAD + TOKENS)
        assert part["tokens"] == TOKENS
        assert part["loss"] == pytest.approx(mean(list(alone_losses[-TOKENS:])), abs=1e-8)
    assert len({round(part["loss"], 5) for part in found.values()}) == 6


@torch.inference_mode()
def test_the_untouched_model_by_one_plain_forward() -> None:
    """No cache, no chunks: what is scored are the last tokens of the window."""
    model, pair = loaded()[0], read_pairs(1)[0]
    for cell, _, part in shared(model, GRIFFIN, pair, [(cell, 0.0) for cell in CELLS]):
        ids = pair.window(cell).ids
        logits = model(ids[None]).logits[0, -TOKENS - 1 : -1]
        assert part["loss"] == pytest.approx(float(cross_entropy(logits, ids[-TOKENS:])), abs=1e-5)


@torch.inference_mode()
def step_by_step(run: Run, ids: torch.Tensor) -> list[float]:
    model, kept = run.model, []
    output = model(ids[None, : PROMPT - 1], use_cache=True)
    for place in range(PROMPT - 1, len(ids) - 1):
        run.tokens_until_change()
        with run.decoding():
            output = model(ids[None, place : place + 1], cache=output.cache)
        kept.append(float(cross_entropy(output.logits[0, -1:], ids[None, place + 1])))
    return kept


@pytest.mark.parametrize("cell", CELLS)
def test_a_live_detector_reads_all_that_is_decoded(cell: str) -> None:
    config = dart(drift={"rule": "interval 20", "min_distance": 0, "max_dense_share": None},
                  remask={"observe_tokens": 7})  # fmt: skip
    part, pair = measured(config, cell), read_pairs(1)[0]
    with Run(loaded()[0], config) as run:
        slow = step_by_step(run, pair.window(cell).ids)
    assert part["loss"] == pytest.approx(mean(slow[-TOKENS:]), abs=2e-5)
    decoded = TOKENS + (LEAD if cell == SHIFT else 0)
    steps = list(range(27, decoded, 27))
    own = part["accounting"]
    assert own["remask_steps"] == steps == [r.step for r in run.remasks[1:]]
    dense = sum(step % 27 >= 20 for step in range(decoded))
    assert own["dense_token_share"] == pytest.approx(dense / decoded)
    assert own["achieved_sparsity"] == pytest.approx(0.5 * (1 - dense / decoded))


def test_told_the_moment_the_new_topic_begins_dense() -> None:
    config = dart(drift="never", remask={"observe_tokens": 9})
    part, pair = measured(config, SHIFT, told=True), read_pairs(1)[0]
    own = part["accounting"]
    assert own["remask_steps"] == [MOMENT + 9]
    assert own["dense_token_share"] == pytest.approx(9 / (LEAD + TOKENS))
    # by hand: step 0 feeds the prompt's last token, so step LEAD + 1 the new topic's first
    ids = pair.window(SHIFT).ids
    assert ids[PROMPT - 1 + MOMENT] == pair.second.body[0]
    with Run(loaded()[0], config) as run:
        model, first = run.model, PROMPT - 1 + MOMENT
        with torch.inference_mode():
            output = model(ids[None, : PROMPT - 1], use_cache=True)
            kept = []
            for place in range(PROMPT - 1, len(ids) - 1):
                if place == first:
                    run.controller.flush()
                    with torch.inference_mode(False):
                        run.controller.sequences[-1].trigger("forced")
                with run.decoding():
                    output = model(ids[None, place : place + 1], cache=output.cache)
                kept.append(float(cross_entropy(output.logits[0, -1:], ids[None, place + 1])))
    assert part["loss"] == pytest.approx(mean(kept[-TOKENS:]), abs=2e-5)
    assert part["loss"] != measured(config, SHIFT)["loss"]


def test_the_model_is_left_as_it_was() -> None:
    model, pair = loaded()[0], read_pairs(1)[0]
    before = score_window(model, None, pair.window(SHIFT)).losses
    list(shared(model, GRIFFIN, pair, [(SHIFT, 0.5)]))
    measured(dart(), SHIFT, told=True)
    assert score_window(model, None, pair.window(SHIFT)).losses == before


def test_a_slice_that_ran_dense_is_refused() -> None:
    config = dart(min_evidence=PROMPT + LEAD + TOKENS + 1)
    with pytest.raises(ConfigError, match=r"all 40 decoded tokens of slice bees/0 ran dense"):
        measured(config, CONTINUATION)
