"""Baselines whose tokens choose, by hand and by hooks; bytes per token by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from dart_llm.errors import ConfigError
from dart_llm.experiments.comparison import read_traffic
from dart_llm.models.describe import describe
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.packed_loading import round_weights
from dart_llm.patching.executors import token_ffn as ways
from dart_llm.pruning.accounting import TokenTraffic
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.records import add_dense, merge_reports
from dart_llm.pruning.registry import METHODS, TOKEN_RULES
from dart_llm.pruning.token_level import TokenMask, at_largest
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule
from dart_llm.session.run import prune
from steps import decode, pruned, shared_model
from tiny import HIDDEN, LAYERS, VOCAB, WIDTH, tiny, tokens

GATE = [[4.0, 0, 1], [1, 1, 0], [0, -1, 1]]
UP = [[1.0, 1, 1], [0, -1, 2], [3, 0, -0.5]]
DOWN = [[1.0, 0, 2], [0, 1, 1], [1, 1, 0]]
X = [1.0, -3, 2]
"""Dense: gate x = (6, -2, 5), up x = (0, 7, 2), u = (0, -14, 10), z = (20, -4, -14)."""


def linear(rows):
    made = nn.Linear(len(rows[0]), len(rows), bias=False)
    made.weight = nn.Parameter(torch.tensor(rows))
    return made


def three_neurons(plain=False):
    """A block of three neurons with three inputs and no activation function."""
    gate, up, down = None if plain else linear(GATE), linear(UP), linear(DOWN)
    ffn = nn.Module()
    return FfnBlock(0, ffn, up, gate, down, nn.Identity(), *(False,) * 3, *(None,) * 4)


def run(config, winners=2, plain=False):
    """z of the tiny block where every token keeps ``winners`` of three; ``config``: or a method."""
    block = three_neurons(plain)
    config = METHODS.get(config).token if isinstance(config, str) else config
    mask = TokenMask(torch.arange(3), 3, winners=winners)
    x = torch.tensor([[X]])
    _, z = ways.token_ffn(block, config).run_dense(block.down, x, x, mask)
    return z.flatten().tolist()


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        # gate (6, -2, 5): neurons 0 and 2, whose u is 0 and 10
        ("cats", [20, 10, 0]),
        # times norms of down's columns (1.4, 1.4, 2.2)
        ("gate", [20, 10, 0]),
        # up (0, 7, 2): neurons 1 and 2, whose u is -14 and 10
        ("countdown", [20, -4, -14]),
        # x = (0, -3, 2): gate (2, -3, 5), up (-1, 7, -1), u = (-2, -21, -5), of which 0 goes
        *((method, [-10, -26, -21]) for method in ("teal", "teal-attention")),
        # columns of gate (4.1, 1.4, 1.4): x = (1, -3, 0), gate (4, -2, 3); of up (3.2, 1.4, 2.3):
        # x = (0, -3, 2), up (-1, 7, -1); u = (-4, -14, -3) times (1.4, 1.4, 2.2): 0 goes
        ("wina", [-6, -17, -14]),
        # estimates at x = (0, -3, 2): u~ = (-2.3, -22, -4.3), neurons 1 and 2, exactly computed
        ("prox", [20, -4, -14]),
    ],
)
def test_three_neurons_by_hand(method, wanted):
    assert run(method) == wanted and run(method, winners=3) == [20, -4, -14]
    if method in ("cats", "gate", "countdown"):  # without a gate all of u = (0, 7, 2) is read
        assert run(method, winners=1, plain=True) == [0, 7, 7]


def test_gate_ranks_by_what_was_learned():
    block, x = three_neurons(), torch.tensor([[X]])
    mask = TokenMask(torch.arange(3), 3, winners=2, saliency=torch.tensor([1.0, 6.0, 1.0]))
    _, z = ways.token_ffn(block, METHODS.get("gate").token).run_dense(block.down, x, x, mask)
    assert z.flatten().tolist() == [0, -14, -14]  # neurons 0 and 1 of 6, 12, 5; u is 0 and -14


values = st.lists(st.integers(-9, 9), min_size=1, max_size=12)


@examples(deadline=None)
@given(values, st.data())
def test_the_largest_inputs_stay_as_they_are(xs, data):
    count = data.draw(st.integers(1, len(xs)))
    norms = data.draw(st.lists(st.integers(0, 5), min_size=len(xs), max_size=len(xs)))
    x, weights = torch.tensor([xs, xs[::-1]]).float(), torch.tensor(norms).float()
    for norm in (None, weights, torch.full_like(weights, 2.0)):
        result = at_largest(x, count, norm)
        strengths = x.abs() if norm is None else x.abs() * norm
        for row, largest, strong in zip(x, result, strengths, strict=True):
            kept = sorted(range(len(xs)), key=lambda place: (-strong[place], place))[:count]
            assert largest.tolist() == [v if i in kept else 0 for i, v in enumerate(row.tolist())]
        assert torch.equal(at_largest(result, count, norm), result)
    assert torch.equal(at_largest(x, count, torch.full_like(weights, 2.0)), at_largest(x, count))


def _nonzeros(module, counts):
    def take(_, args):
        if args[0].shape[-2] == 1:  # a decoded token
            counts.append(int((args[0] != 0).sum(-1).max()))

    return module.register_forward_pre_hook(take)


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt2", "falcon"])
@pytest.mark.parametrize("method", ["teal", "teal-attention", "wina"])
def test_every_matrix_is_given_its_share_of_inputs(name, method):
    """What reaches the modules of a real forward; the hooks come after those of the run."""
    model, view = shared_model(name), describe(shared_model(name))
    block, attention = view.blocks[1], view.attention[1]
    seen = {"up": [], "down": [], "attention": []}
    with prune(model, method, sparsity=0.75) as run:
        handles = [_nonzeros(block.up, seen["up"]), _nonzeros(block.down, seen["down"])]
        handles += [_nonzeros(projection, seen["attention"]) for projection in attention]
        decode(model, tokens(1, 15), 12)
        for handle in handles:
            handle.remove()
    hidden, width = block.matrices()[2].shape
    assert set(seen["up"]) == {hidden // 4} and set(seen["down"]) <= {width // 4, width // 4 - 1}
    inputs = hidden // 4 if method == "teal-attention" else hidden
    assert len(seen["attention"]) == 3 * len(attention) and set(seen["attention"]) == {inputs}
    report = run.report()
    assert report.achieved_sparsity == 0.75 and report.executor == "masked"


I, D, K = WIDTH, HIDDEN, WIDTH // 4  # noqa: E741 - the method's own names
WEIGHTS = I * 3 * D


def report(method, dtype=torch.float32, model=None, **settings):
    settings = {"method": method, "sparsity": 0.75, **settings}
    model = model or shared_model("llama-bias", dtype)
    return pruned(model, tokens(1, 17), 12, **settings)[0].report()


FFN = LAYERS * 3 * HIDDEN * WIDTH * 2
ATTENTION = LAYERS * 3 * HIDDEN * HIDDEN * 2
"""q and o of H x H, k and v of half as many rows; at two bytes a weight."""
CACHE = LAYERS * HIDDEN * 2
"""Of one position: keys and values of H / 2 each."""
CONTEXT = 12 + 3
"""5 tokens after 12: they see 13 to 17."""


def others(model):
    """Head, norms and biases; the token embedding is looked up."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    small = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in weights)
    return 2 * (small + VOCAB * HIDDEN)


def share(ffn, attention=1.0):
    rest = others(shared_model("llama-bias")) + CACHE * CONTEXT
    return (ffn + attention * ATTENTION + rest) / (FFN + ATTENTION + rest)


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("method", "more", "ffn", "attention"),
    [
        ("teal", 0, FFN / 4, 1),
        ("teal-attention", 0, FFN / 4, 0.25),
        ("wina", 4 * (2 * D + I), FFN / 4 + LAYERS * 4 * (2 * D + I), 1),
        ("cats", (I - K) * D * 4, FFN / 3 + FFN * 2 / 3 / 4, 1),
        ("countdown", (I - K) * D * 4, FFN / 3 + FFN * 2 / 3 / 4, 1),
        ("gate", (I - K) * D * 4 + 4 * I, FFN / 3 + FFN * 2 / 3 / 4 + LAYERS * 4 * I, 1),
        # 16 of 32 inputs in half a byte and a scale of two, of gate and up; 4 for norm(w)
        ("prox", I * (2 * (8 + 2) + 4), FFN / 4 + LAYERS * I * (2 * (8 + 2) + 4), 1),
        ("random", None, FFN / 4 + LAYERS * 12 * 3 * D * 2 * 2 / 5, 1),  # copied once in 5 tokens
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_by_hand(method, more, ffn, attention, dtype):
    """``more``: bytes of one layer beyond the rows of the winners, in float32."""
    result = report(method, dtype)
    assert result.mean_context == CONTEXT
    assert result.token_bytes_share == pytest.approx(share(ffn, attention))
    assert result.dense_token_bytes_share == 1
    if dtype == torch.float32 and more is not None:
        assert result.proxy_bytes_share == pytest.approx(more / (4 * WEIGHTS))
        assert result.ffn_bytes_share_if_compact == pytest.approx(K / I + more / (4 * WEIGHTS))
        computed = {"cats": more, "countdown": more, "gate": (I - K) * D * 4}  # by masked, anyway
        read = more - computed.get(method, 0)
        assert result.ffn_bytes_share == pytest.approx(1 + read / (4 * WEIGHTS))


@pytest.mark.usefixtures("native")
def test_no_kernel_is_said_to_have_read_less():
    result = report("cats", executor="native")
    assert result.executor == "native" and result.ffn_bytes_share == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"token": {"rule": "cats", "inputs": 0.5}}, 'token rule "cats" does not read inputs'),
        ({"token": {"rule": "wina", "proxy": "always"}}, 'token rule "wina" does not read proxy'),
        ({"token": {"inputs": 0.5}}, 'token rule "low-bit" does not read inputs'),
        ({"token": {"rule": "teal"}, "compensation": True}, '"teal" does not support compensation'),
        ({"token": {"inputs": 0}}, "inputs 0 must be more than 0"),
        ({"token": {"rule": "teel"}}, "did you mean teal"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prune(shared_model(), "griffin", sparsity=0.5, drift="never", **settings)


class Last(TokenRule):
    """The last neurons of every token: what a new rule needs."""

    @classmethod
    def selection_bytes(cls, config, cost: LayerCost):
        return 100.0

    def strengths(self, fed, u, mask):
        return torch.arange(u.shape[-1]).float().expand_as(u)


def test_a_new_rule_is_one_class():
    TOKEN_RULES.register("last", Last)
    try:
        assert run("cats") != run(TokenConfig(rule="last")) == [20, -4, -14]
        result = report("griffin", token={"rule": "last"}, score="weight")
        assert result.achieved_sparsity == 0.75
        assert result.proxy_bytes_share == pytest.approx(100 / (4 * WEIGHTS))
    finally:
        TOKEN_RULES.unregister("last")


def test_merged_reports_weigh_tokens():
    one, two = report("teal").to_dict(), report("teal", sparsity=0.5).to_dict()
    merged = merge_reports([one, {**two, "decoded_tokens": 15}])
    mean = (5 * one["token_bytes_share"] + 15 * two["token_bytes_share"]) / 20
    assert merged["token_bytes_share"] == pytest.approx(mean)
    assert add_dense(merged, 20)["token_bytes_share"] == pytest.approx((mean + 1) / 2)
    old = {name: value for name, value in one.items() if name != "token_bytes_share"}
    assert merge_reports([one, old])["token_bytes_share"] is None  # of an older version


@pytest.mark.usefixtures("native")
def test_weights_in_blocks_count_as_stored():
    model = tiny("llama", hidden_size=64, intermediate_size=64)
    plain = describe(model).traffic
    assert round_weights(model, "q8_0") == []
    result = describe(model).traffic
    view = describe(model)
    ffn = [part.weight.nbytes for block in view.blocks for part in block.projections]
    heads = [part.weight.nbytes for layer in view.attention for part in layer]
    assert result.dense == plain.dense and result.ffn == sum(ffn) < 0.6 * plain.ffn
    assert result.attention == sum(heads) < 0.6 * plain.attention
    dense = report("griffin", model=model, sparsity=0.0)
    assert dense.token_bytes_share == dense.dense_token_bytes_share == result.share(CONTEXT) < 0.6
    half = report("teal", model=model, sparsity=0.5)
    assert half.token_bytes_share == pytest.approx(result.share(CONTEXT, result.ffn / 2))


def test_windows_bound_the_cache():
    traffic = TokenTraffic(1000, 500, 200, 300, ((10, None), (20, 8)))
    assert traffic.share(4) == 1
    assert traffic.share(100, ffn=0) == (500 + 1000 + 160) / (1000 + 1000 + 160)
    facts = {"token_traffic": traffic.to_dict()}
    assert read_traffic(facts) == traffic and read_traffic({}) is None
    assert {most for _, most in describe(shared_model("gemma2")).traffic.cache} == {None, WINDOW}


WINDOW = shared_model("gemma2").config.sliding_window
