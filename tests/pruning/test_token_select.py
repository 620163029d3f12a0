"""Token-level selection: every token's winners, against independent accounts of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.describe import describe
from dart_llm.patching.executors import token_ffn
from dart_llm.patching.executors.token_ffn import TokenFfn
from dart_llm.pruning.token_level import TokenMask, candidate_count, winner_places
from dart_llm.pruning.token_level import contribution_estimate as strength
from dart_llm.session.run import prune
from low_bit_cases import by_hand
from products import SHAPES
from steps import CACHE, apart, decode, generate, new_cache, shared_model, state_of, step
from tiny import tokens
from token_cases import LEARNT, PLAIN, Exact, best, lost_u, oracle

PROMPT = 12


def _executors(name: str) -> tuple[str, ...]:
    return ("masked",) if name == "opt" else ("masked", "compact")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that lose nothing."""
    monkeypatch.setattr(token_ffn, "low_bit", Exact)
    monkeypatch.setattr(token_ffn, "squared_error", lambda matrix, copy: (0.0, 1.0))


# pure functions


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_winners_are_the_largest_and_ties_go_to_the_lower(values: list[int], data: Any) -> None:
    keep = data.draw(st.integers(1, len(values)))
    found = winner_places(torch.tensor([[values, values[::-1]]]).float(), keep)
    assert found.shape == (1, 2, keep)
    assert found[0, 0].tolist() == best([float(v) for v in values], keep)
    assert found[0, 1].tolist() == best([float(v) for v in values[::-1]], keep)


def test_strength() -> None:
    u, worth = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, -1.0]]), torch.tensor([3.0, 1.0, 5.0])
    assert strength(u, worth).tolist() == [[3.0, 2.0, 0.0], [1.5, 0.0, 5.0]]


@pytest.mark.parametrize(
    ("share", "keep", "wanted"),
    [(None, 5, 40), (1.0, 5, 40), (0.5, 5, 20), (0.1, 5, 5), (0.34, 2, 14), (0.5, 40, 40)],
)
def test_candidate_count(share: float | None, keep: int, wanted: int) -> None:
    assert candidate_count(share, 40, keep) == wanted


# on models


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TokenFfn, Tensor, TokenMask, Tensor]]:
    found: list[tuple[TokenFfn, Tensor, TokenMask, Tensor]] = []
    choose = TokenFfn.winners

    def winners(self: TokenFfn, x: Tensor, mask: TokenMask) -> Tensor:
        ids = choose(self, x, mask)
        found.append((self, x, mask, ids))
        return ids

    monkeypatch.setattr(TokenFfn, "winners", winners)
    return found


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_winners_by_independent_computation(
    name: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, the grid of tests/test_low_bit.py and the block's own modules; no code of the method."""
    model, found = shared_model(name), _recorded(monkeypatch)
    run = prune(model, LEARNT if learns else PLAIN, sparsity=0.75, token={"group": 8})
    with run:
        decode(model, tokens(1, PROMPT + 2), PROMPT)
    assert len(found) == 8
    copies: dict[int, list[Tensor]] = {}
    for token, x, mask, ids in found:
        block = token.block
        gate, up, down = block.matrices()
        parts = [up] if gate is None else [gate, up]
        if block.index not in copies:
            copies[block.index] = [torch.tensor(by_hand(p.detach(), 4, 8)) for p in parts]
        u = [x.reshape(-1) @ copy.t() for copy in copies[block.index]]
        modules = [m for m in (block.gate, block.up) if m is not None]
        biases = [m.bias.detach() for m in modules if getattr(m, "bias", None) is not None]
        if biases:
            u = [a + b for a, b in zip(u, biases, strict=True)]
        estimate = block.act(u[0]) if gate is None else block.act(u[0]) * u[1]
        learnt = run.layers[block.index].learnt
        assert (learnt is not None) == learns
        worth = down.detach().norm(dim=0) if learnt is None else learnt.curvature**0.5
        strengths = estimate.abs() * worth
        assert mask.winners == round(0.25 * mask.width) == ids.shape[-1]
        assert ids.flatten().tolist() == best(strengths.tolist(), mask.winners)


@pytest.mark.parametrize("name", SHAPES)
def test_exact_copies_give_the_oracle(name: str, exact: None) -> None:
    model, ids = shared_model(name), tokens(1, PROMPT + 4)
    width = describe(model).blocks[0].down_width
    with oracle(model, round(0.25 * width), PROMPT):
        wanted = decode(model, ids, PROMPT)
    assert apart(wanted, decode(model, ids, PROMPT)) > 1e-2
    for executor in _executors(name):
        with prune(model, PLAIN, sparsity=0.75, executor=executor):
            assert apart(decode(model, ids, PROMPT), wanted) < 1e-5, executor


@pytest.mark.parametrize("name", SHAPES)
def test_losers_stand_at_their_mean_where_they_lose(name: str, exact: None) -> None:
    model, ids = shared_model(name), tokens(1, PROMPT + 4)
    keep = round(0.25 * describe(model).blocks[0].down_width)
    lost: dict[int, tuple[Tensor, Tensor]] = {}
    with lost_u(model, keep, lost):
        step(model, ids[:, :PROMPT], new_cache(model))
    mean = {layer: total / number.clamp_min(1) for layer, (total, number) in lost.items()}
    with oracle(model, keep, PROMPT, mean):
        wanted = decode(model, ids, PROMPT)
    for executor in _executors(name):
        with prune(model, PLAIN, sparsity=0.75, executor=executor, compensation=True):
            assert apart(decode(model, ids, PROMPT), wanted) < 1e-5, executor


def test_losers_of_a_layer_table_are_those_of_its_counts(exact: None) -> None:
    """What they stand at is their mean where so many lose, not where the default would remove."""
    model, ids = shared_model("llama"), tokens(1, PROMPT + 4)
    means = {}
    for share in (0.25, 0.5):
        lost: dict[int, tuple[Tensor, Tensor]] = {}
        with lost_u(model, round(share * 48), lost):
            step(model, ids[:, :PROMPT], new_cache(model))
        means[share] = {k: total / n.clamp_min(1) for k, (total, n) in lost.items()}
    table = {"budget": {"table": "0:0.25,1:#24,2:0.5"}, "compensation": True}
    with prune(model, PLAIN, **table) as run:
        decode(model, ids, PROMPT)
    masks = state_of(run).selection.masks
    assert [None if mask is None else mask.winners for mask in masks] == [12, 24, 24, None]
    for layer, share in ((0, 0.25), (1, 0.5), (2, 0.5)):
        torch.testing.assert_close(masks[layer].mean, means[share][layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_the_preset_ranks_by_what_it_learnt(name: str, exact: None) -> None:
    """By roots of curvatures; the first four tokens, the sinks, leave no evidence of losers."""
    model, ids = shared_model(name), tokens(1, PROMPT + 4)
    keep = round(0.25 * describe(model).blocks[0].down_width)
    run = prune(model, LEARNT, sparsity=0.75)
    with run:
        pruned = decode(model, ids, PROMPT)
    worth = {layer.index: layer.learnt.curvature**0.5 for layer in run.layers}
    whole: dict[int, tuple[Tensor, Tensor]] = {}
    sinks: dict[int, tuple[Tensor, Tensor]] = {}
    for length, found in ((PROMPT, whole), (4, sinks)):
        with lost_u(model, keep, found, worth):
            step(model, ids[:, :length], new_cache(model))
    mean = {}
    for layer, (total, number) in whole.items():
        number = number - sinks[layer][1]
        mean[layer] = torch.where(number > 0, (total - sinks[layer][0]) / number, 0.0)
    with oracle(model, keep, PROMPT, mean, worth):
        wanted = decode(model, ids, PROMPT)
    assert apart(pruned, wanted) < 1e-4
    with oracle(model, keep, PROMPT, mean):
        assert apart(pruned, decode(model, ids, PROMPT)) > 1e-2


@pytest.mark.parametrize("batch", ["shared", "per_row"])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_and_chunks_equal_single_tokens(name: str, batch: str) -> None:
    """A batch with padding on the left, decoded in one chunk, and each row alone.

    Rows that share the count also share what the losers stand at: only without compensation are
    they what they would be alone.
    """
    method = LEARNT.replace({"compensation": batch == "per_row"})
    model, ids = shared_model(name), tokens(2, PROMPT + 6)
    seen, padding = torch.ones_like(ids), 0 if name == "gpt2" else 3  # its positions would shift
    seen[1, :padding] = 0
    with prune(model, method, sparsity=0.7, batch=batch) as run, run.decoding():
        cache = new_cache(model)
        step(model, ids[:, :PROMPT], cache, seen[:, :PROMPT])
        chunk = step(model, ids[:, PROMPT:], cache, seen)
    report = run.report()
    assert report.decoded_tokens == 12 and report.dense_token_share == 0
    assert report.achieved_sparsity == pytest.approx(0.7, abs=0.01)
    with prune(model, method, sparsity=0.7, batch=batch):
        assert apart(decode(model, ids, PROMPT, seen)[:, PROMPT:], chunk) < 1e-5
    for row, start in ((0, 0), (1, padding)):
        with prune(model, method, sparsity=0.7, executor=_executors(name)[-1]):
            alone = decode(model, ids[row : row + 1, start:], PROMPT - start)
        assert apart(alone[:, PROMPT - start :], chunk[row : row + 1]) < 1e-5


def test_candidates_are_the_sequences_best(monkeypatch: pytest.MonkeyPatch, exact: None) -> None:
    model, found = shared_model("llama-bias"), _recorded(monkeypatch)
    run = prune(model, LEARNT, sparsity=0.75, token={"candidates": 0.5})
    with run:
        masked = decode(model, tokens(1, PROMPT + 2), PROMPT)
    selection = state_of(run).selection
    assert selection.counts == (12, 12, 12, 12)
    for token, x, mask, ids in found:
        index = token.block.index
        assert mask.ids.tolist() == best(selection.scores[index].tolist(), 24)
        u = token.block.hidden(x).detach().flatten()
        strengths = (u.abs() * run.layers[index].learnt.curvature ** 0.5)[mask.ids]
        assert ids.flatten().tolist() == mask.ids[best(strengths.tolist(), 12)].tolist()
    with prune(model, LEARNT, sparsity=0.75, executor="masked", token={"candidates": 0.5}):
        assert apart(decode(model, tokens(1, PROMPT + 2), PROMPT), masked) < 1e-5


def test_as_many_candidates_as_winners_are_a_sequence_mask() -> None:
    model, ids = shared_model(), tokens(1, PROMPT + 3)
    with prune(model, PLAIN, sparsity=0.75, token={"candidates": 0.25}) as run:
        found = decode(model, ids, PROMPT)
    with prune(model, "griffin", sparsity=0.75) as same:
        assert torch.equal(decode(model, ids, PROMPT), found)
    assert all(torch.equal(a, same.masks()[layer]) for layer, a in run.masks().items())
    assert run.report().proxy_bytes_share == 0
    assert run.report().ffn_bytes_share == same.report().ffn_bytes_share


def test_rows_of_a_batch_may_keep_different_numbers() -> None:
    """Layers of one row that stay dense, and a budget of the row's own."""
    model, ids = shared_model(), tokens(2, PROMPT + 3)
    settings: dict[str, Any] = {"budget": "energy", "sparsity": 0.5, "batch": "per_row"}
    with prune(model, LEARNT, **settings) as run:
        both = decode(model, ids, PROMPT)
    kept = [remask.kept for remask in run.remasks]
    assert len(kept) == 2 and kept[0] != kept[1]
    for row in range(2):
        with prune(model, LEARNT, budget="energy", sparsity=0.5):
            assert apart(decode(model, ids[row : row + 1], PROMPT), both[row : row + 1]) < 1e-5


def test_held_masks_prune_the_prompt_too() -> None:
    """As the evaluation protocol ``full`` does: counts from the text, winners of every token."""
    model, ids = shared_model(), tokens(1, PROMPT)
    with prune(model, LEARNT, sparsity=0.75) as run:
        dense = step(model, ids, new_cache(model))
        masks = run.select()
        assert [mask.kept for mask in masks] == [12] * 4
        run.hold(masks)
        with run.decoding(prompt=True):
            pruned = step(model, ids, new_cache(model))
    assert apart(pruned, dense) > 1e-2
    assert run.report().achieved_sparsity == 0.75


def test_a_second_prompt_and_reset() -> None:
    model = shared_model()
    with prune(model, LEARNT, sparsity=0.5) as run:
        first = generate(model, tokens(1, PROMPT), 5)
        turn = torch.cat([first.sequences, tokens(1, 8, seed=5)], 1)
        again = generate(model, turn, 5, **{CACHE: first.past_key_values})
        assert [r.cause for r in run.remasks] == ["first", "prompt"]
        assert [r.overlap for r in run.remasks] == [None, None]
        assert len(again.logits) == 5
        run.reset()
        same = generate(model, tokens(1, PROMPT), 5)
    assert torch.equal(first.sequences, same.sequences)


def test_what_is_made_when() -> None:
    """Copies live while something can be pruned by tokens; given masks need none."""
    model = shared_model()
    for settings in ({"sparsity": 0.0}, {"masks": {0: [1, 2]}}):
        with prune(model, LEARNT, **settings) as run:
            decode(model, tokens(1, PROMPT + 2), PROMPT)
            assert all(layer.token is None for layer in run.patch.layers)
        assert run.report().proxy_error is None and run.report().proxy_bytes_share == 0
    assert {layer: ids.tolist() for layer, ids in run.masks().items()} == {0: [1, 2]}
    with prune(model, LEARNT, sparsity=0.5) as run:
        layers = run.patch.layers
        assert all(layer.token is not None for layer in layers)
    assert all(layer.token is None and layer._captured.fed is None for layer in layers)


def test_there_is_no_sequence_mask(tmp_path: Any) -> None:
    model = shared_model()
    seen: list[Any] = []
    with prune(model, LEARNT, sparsity=0.5) as run:
        run.on_masks = seen.append
        with pytest.raises(AttachError, match="no mask has been built"):
            run.masks()
        decode(model, tokens(1, PROMPT + 2), PROMPT)
        for ask in (run.masks, lambda: run.export(tmp_path)):
            with pytest.raises(ConfigError, match=r"no sequence mask.*e\.g\. dart"):
                ask()
    assert seen == [(None,) * 4]


def test_where_it_is_slower_one_sentence_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Once per process and place, when a prompt is read."""
    token_ffn._say_slower.cache_clear()
    model = shared_model()
    for _ in range(2):
        with prune(model, LEARNT, sparsity=0.5, executor="compact"):
            step(model, tokens(1, PROMPT), new_cache(model))
            said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("dart-token is slower than the unpruned model under executor compact")
    for method, sparsity in ((LEARNT, 0.0), ("griffin", 0.5)):
        token_ffn._say_slower.cache_clear()
        with prune(model, method, sparsity=sparsity):
            step(model, tokens(1, PROMPT), new_cache(model))
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("native")
def test_batches_are_slower_where_one_sequence_is_not(caplog: pytest.LogCaptureFixture) -> None:
    token_ffn._say_slower.cache_clear()
    model = shared_model()
    with prune(model, LEARNT, sparsity=0.5, executor="native"):
        decode(model, tokens(1, 14), 12)
        assert not caplog.records
        decode(model, tokens(2, 14), 12)
        decode(model, tokens(2, 14), 12)
    (said,) = caplog.records
    assert "slower than the unpruned model in a batch of several rows" in said.getMessage()


def test_offloaded_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    run = prune(model, "dart-token", sparsity=0.5)
    monkeypatch.setattr(type(describe(model).blocks[0]), "offloaded", property(lambda b: True))
    with pytest.raises(ConfigError, match=r"layer 0 is offloaded.*without offloading"):
        run.attach()
    monkeypatch.undo()
    with run:
        pass
