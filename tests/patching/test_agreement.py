"""What runs in a model's place computes what the model does, or does not run."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from dart_llm.errors import AttachError, ConfigError, UnsupportedModel
from dart_llm.models import agreement as checked
from dart_llm.models.agreement import Bare
from dart_llm.models.describe import describe
from dart_llm.models.llama import step_unsupported_reason as why_not_step
from dart_llm.patching.executors.step_agreement import disagreement_reason as why_not_alike
from dart_llm.session.run import prune
from products import DTYPES, SHAPES, cases
from steps import apart, decode, generate, new_cache, picked, snapshot, step
from tiny import NAMES, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

PROMPT, CLOSE = 16, 1e-4
Change = Callable[[Any], None]


@pytest.fixture(autouse=True)
def _classes() -> Iterator[None]:
    """What a test puts on classes and modules of transformers is taken away again."""
    held = [
        (modeling.LlamaAttention, "forward"),
        (modeling.LlamaRMSNorm, "forward"),
        (modeling.LlamaMLP, "forward"),
        (modeling.LlamaDecoderLayer, "forward"),
        (modeling, "apply_rotary_pos_emb"),
        (nn.Linear, "forward"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name in held]
    yield
    for owner, name, value in kept:
        setattr(owner, name, value)


def _decoded(model: Any, executor: str = "auto", **settings: Any) -> tuple[Tensor, str]:
    """Logits [1, T, V] with half of the neurons, and the executor that ran."""
    masks = {layer: ids for layer, ids in picked().items() if layer < len(model.model.layers)}
    with prune(model, masks=masks, executor=executor, **settings) as run:
        found = decode(model, tokens(1, PROMPT + 6), PROMPT)
    return found, run.report().executor


def _scaled(factor: float, function: Any) -> Any:
    """A function whose first result is multiplied; it looks like the one that it calls."""

    @functools.wraps(function)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        return (factor * made[0], *made[1:]) if isinstance(made, tuple) else factor * made

    return scaled


def _attention_function(model: Any) -> None:
    def half(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any) -> Any:
        given = {**rest, "scaling": rest["scaling"] / 2}
        return sdpa_attention_forward(module, q, k, v, mask, **given)

    AttentionInterface.register("half", half)
    ALL_MASK_ATTENTION_FUNCTIONS.register("half", sdpa_mask)
    model.set_attn_implementation("half")


def _class_forward(name: str) -> Change:
    def change(model: Any) -> None:
        kind = getattr(modeling, name)
        kind.forward = _scaled(1.3, kind.forward)

    return change


def _rotary(model: Any) -> None:
    modeling.apply_rotary_pos_emb = _scaled(0.5, modeling.apply_rotary_pos_emb)


def _scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.7


def _eps(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def _angles(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def _instance(place: str) -> Change:
    def change(model: Any) -> None:
        part = model.model.layers[1].get_submodule(place)
        part.forward = _scaled(1.3, part.forward)

    return change


def _of_a_subclass(model: Any) -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 1.3 * super().forward(x)

    model.model.layers[1].self_attn.v_proj.__class__ = Louder


class Packed(Tensor):
    """A weight whose memory is nobody's business."""


def _packed(place: str) -> Change:
    def change(model: Any) -> None:
        part = model.get_submodule(place)
        weight = part.weight.detach().clone().as_subclass(Packed)
        del part._parameters["weight"]
        part._parameters["weight"] = weight

    return change


NOT_SLIM: dict[str, Change] = {
    "attention function": _attention_function,
    "class of attention": _class_forward("LlamaAttention"),
    "class of norms": _class_forward("LlamaRMSNorm"),
    "class of layers": _class_forward("LlamaDecoderLayer"),
    "rotary function": _rotary,
    "scaling": _scaling,
    "eps": _eps,
    "activation": _activation,
    "attention": _instance("self_attn"),
    "projection of attention": _instance("self_attn.q_proj"),
    "norm": _instance("post_attention_layernorm"),
    "linear subclass": _of_a_subclass,
    "tensor class of attention": _packed("model.layers.1.self_attn.k_proj"),
    "tensor class of the head": _packed("lm_head"),
}


@pytest.mark.parametrize("change", NOT_SLIM.values(), ids=NOT_SLIM)
def test_what_a_whole_step_would_pass_by_runs_by_the_native_ffns(change: Change) -> None:
    """The same numbers as ``masked``; ``slim`` itself is refused in a sentence."""
    model = tiny()
    plain, _ = _decoded(model, "masked")
    change(model)
    expected, _ = _decoded(model, "masked")
    found, executor = _decoded(model)
    assert executor == "native" and apart(found, expected) < CLOSE
    with pytest.raises(ConfigError, match=r'executor "slim" cannot run LlamaForCausalLM, which'):
        prune(model, masks=picked(), executor="slim")
    with pytest.raises(ConfigError, match=r'executor "graph" cannot run LlamaForCausalLM, which'):
        prune(model, masks=picked(), executor="graph")
    same_values = change in (NOT_SLIM[name] for name in NOT_SLIM if name.startswith("tensor"))
    assert (apart(expected, plain) > 1e-3) != same_values


def test_a_change_that_hides_its_name_is_found_by_its_numbers() -> None:
    """``functools.wraps`` makes a patch look like what it wraps: only a step tells."""
    model = tiny()
    modeling.LlamaAttention.forward = _scaled(1.05, modeling.LlamaAttention.forward)
    assert why_not_step(model) == ""
    assert why_not_alike(model) == "computes the attention of layer 0 otherwise than its kind"


# FFNs that are something else


def _subclass(model: Any) -> None:
    class Mine(modeling.LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[3].mlp.__class__ = Mine


def _gated_twice(model: Any) -> None:
    mlp = model.model.layers[3].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) ** 2)


def _other_arguments(model: Any) -> None:
    model.model.layers[3].mlp.forward = lambda x, scale: scale * x


def _loud_channel(model: Any) -> None:
    mlp = model.model.layers[3].mlp
    loud = torch.ones(32)
    loud[5] = 1.2
    mlp.forward = lambda x: loud * modeling.LlamaMLP.forward(mlp, x)


@pytest.mark.parametrize("change", [_subclass, _gated_twice, _other_arguments, _loud_channel])
@pytest.mark.parametrize("executor", ["auto", "masked", "compact"])
def test_an_ffn_that_computes_something_else_is_refused(change: Change, executor: str) -> None:
    model = tiny()
    change(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel) as error:
        prune(model, "griffin", sparsity=0.5, executor=executor)
    kind = type(model.model.layers[3].mlp).__name__
    assert str(error.value) == (
        f"LlamaForCausalLM: the FFN of layer 3 ({kind}) computes something else than gate, up, "
        "activation, down: dart-llm cannot prune it"
    )
    assert snapshot(model) == before


def test_a_class_of_ffns_that_was_changed_is_refused() -> None:
    model = tiny()
    describe(model)
    _class_forward("LlamaMLP")(model)
    with pytest.raises(UnsupportedModel, match="the FFN of layer 0"):
        prune(model)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi3", "falcon", "gemma3"])
def test_every_kind_of_ffn_is_compared(name: str) -> None:
    model = tiny(name)
    block = describe(model).blocks[2]
    block.ffn.forward = _scaled(1.1, block.ffn.forward)
    with pytest.raises(UnsupportedModel, match=r"the FFN of layer 2 .* computes something else"):
        prune(model)


def test_an_ffn_of_ones_own_that_computes_the_same_is_pruned() -> None:
    class Renamed(modeling.LlamaMLP):
        def forward(self, hidden: Tensor) -> Tensor:
            up = self.up_proj(hidden)
            return F.linear(up * self.act_fn(self.gate_proj(hidden)), self.down_proj.weight)

    model = tiny()
    expected, _ = _decoded(model, "masked")
    for layer in model.model.layers:
        layer.mlp.__class__ = Renamed
    found, _ = _decoded(model)
    assert apart(found, expected) < CLOSE


def test_layers_that_share_one_ffn_are_refused() -> None:
    model = tiny()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModel, match=r"layers 0 and 2 share one FFN \(LlamaMLP\)"):
        prune(model)
    model.model.layers[2].mlp = copy.deepcopy(model.model.layers[0].mlp)
    prune(model)


# Projections that are not their weights


def _hook(place: str) -> Change:
    def change(model: Any) -> None:
        part = model.model.layers[1].get_submodule(place)
        part.register_forward_hook(lambda module, args, out: 1.5 * out)

    return change


def _pre_hook(model: Any) -> None:
    part = model.model.layers[1].mlp.down_proj
    part.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


ODD: dict[str, Change] = {
    "hook on down": _hook("mlp.down_proj"),
    "hook on gate": _hook("mlp.gate_proj"),
    "hook on act": _hook("mlp.act_fn"),
    "pre-hook": _pre_hook,
    "forward of up": _instance("mlp.up_proj"),
    "forward of down": _instance("mlp.down_proj"),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_a_projection_that_is_more_than_its_weights_runs_itself(change: Change) -> None:
    model = tiny()
    plain, _ = _decoded(model, "masked")
    change(model)
    expected, _ = _decoded(model, "masked")
    found, executor = _decoded(model)
    assert executor == "compact" and apart(found, expected) < CLOSE
    assert apart(expected, plain) > 1e-2
    for other in ("compact", "native", "slim"):
        with pytest.raises(
            ConfigError, match=r"layer 1 has (hooks on|projections that are no plain)"
        ):
            prune(model, masks=picked(), executor=other)


def _all_hooked(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, out: out + 1)


def _all_linears(model: Any) -> None:
    plain = nn.Linear.forward
    nn.Linear.forward = lambda self, x: 1.1 * plain(self, x)


@pytest.mark.parametrize("change", [_all_hooked, _all_linears])
def test_where_no_projection_is_its_weights_masked_runs(change: Change) -> None:
    model = tiny()
    change(model)
    expected, _ = _decoded(model, "masked")
    found, executor = _decoded(model)
    assert executor == "masked" and torch.equal(found, expected)


# torch.compile


def _whole(model: Any) -> None:
    model.compile(backend="eager")


def _forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def _layer(model: Any) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def _ffn(model: Any) -> None:
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")


COMPILED = [_whole, _forward, _layer, _ffn]


@pytest.mark.parametrize("change", COMPILED)
def test_a_model_that_torch_compiled_runs_compact(change: Change) -> None:
    torch._dynamo.reset()
    model = tiny()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    expected, _ = _decoded(model, "masked")
    change(model)
    found, executor = _decoded(model)
    assert executor == "compact" and apart(found, expected) < CLOSE
    with pytest.raises(ConfigError, match="was compiled by torch"):
        prune(model, masks={0: [1]}, executor="slim")


# Changes while attached


CHANGES = (
    _attention_function,
    _class_forward("LlamaRMSNorm"),
    _rotary,
    _scaling,
    _eps,
    _angles,
    _instance("self_attn"),
    *ODD.values(),
)


@pytest.mark.parametrize(
    ("change", "executor"),
    [*((change, "slim") for change in CHANGES), *((change, "compact") for change in CHANGES[-3:])],
)
def test_a_change_while_attached_counts_from_the_next_prompt(change: Change, executor: str) -> None:
    model, ids = tiny(), tokens(1, PROMPT + 6)
    with prune(model, masks=picked(), executor=executor):
        before = decode(model, ids, PROMPT)
        change(model)
        found = decode(model, ids, PROMPT)
    expected, _ = _decoded(model, "masked")  # as it was left
    assert apart(found, expected) < CLOSE < apart(found, before)


@pytest.mark.parametrize(
    ("change", "executor"),
    [
        (_subclass, "slim"),
        (_gated_twice, "compact"),
        (_class_forward("LlamaMLP"), "masked"),
        (_activation, "slim"),
        (_activation, "masked"),
    ],
)
def test_an_ffn_that_is_changed_while_attached_is_noticed(change: Change, executor: str) -> None:
    model, ids = tiny(), tokens(1, PROMPT + 6)
    with prune(model, masks=picked(), executor=executor):
        decode(model, ids, PROMPT)
        change(model)
        with pytest.raises(AttachError, match=r"was changed while this model is being pruned"):
            decode(model, ids, PROMPT)


@pytest.mark.parametrize("executor", ["slim", "native"])
def test_a_linear_that_becomes_another_class_is_noticed(executor: str) -> None:
    model, ids = tiny(), tokens(1, PROMPT + 6)
    kind = type("Louder", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    with prune(model, masks=picked(), executor=executor):
        decode(model, ids, PROMPT)
        model.lm_head.__class__ = kind
        with pytest.raises(AttachError, match="a linear layer was made a Louder while"):
            decode(model, ids, PROMPT)


@pytest.mark.parametrize("executor", ["slim", "native"])
def test_weights_that_another_run_put_back_are_noticed(executor: str) -> None:
    """Two models on the same weights: the order is put back when the first run ends."""
    model, ids = tiny(), tokens(1, PROMPT + 6)
    other = type(model)(model.config).eval()
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, parameter)
    first = prune(model, masks=picked(), executor=executor).attach()
    with prune(other, masks=picked(), executor=executor):
        decode(other, ids, PROMPT)
        first.detach()
        with pytest.raises(AttachError, match="weights were replaced or moved"):
            decode(other, ids, PROMPT)


def test_an_embedding_that_changes_itself_is_left_alone() -> None:
    model, ids = tiny(), tokens(1, PROMPT + 6)
    model.model.embed_tokens.max_norm = 0.5
    before = model.model.embed_tokens.weight.detach().clone()
    with prune(model, masks=picked()) as run:
        assert torch.equal(model.model.embed_tokens.weight, before)
        found = decode(model, ids, PROMPT)
        assert run.report().executor == "native"
    expected, _ = _decoded(model, "masked")
    assert apart(found, expected) < CLOSE


# Who watches


def test_hooks_do_not_see_the_comparison_and_nothing_is_left_behind() -> None:
    model, seen = tiny(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(module))
        module.register_forward_pre_hook(lambda module, args: seen.append(module))
    checked._known.clear()
    before, lot = snapshot(model), torch.get_rng_state()
    describe(model)
    assert why_not_step(model) == "" and why_not_alike(model) == ""
    assert seen == [] and snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), lot)


def test_the_comparison_is_made_once() -> None:
    model, made = tiny(), []
    plain = Bare.of
    try:
        Bare.of = lambda self, module: made.append(module) or plain(self, module)  # type: ignore[method-assign]
        counts = []
        for _ in range(3):
            with prune(model, masks=picked()):
                decode(model, tokens(1, 20), PROMPT)
            counts.append(len(made))
    finally:
        Bare.of = plain  # type: ignore[method-assign]
    assert 0 < counts[0] == counts[2]


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases([*product(NAMES, DTYPES[:1]), *product(SHAPES, DTYPES)], NAMES, DTYPES),
    ids=str,
)
def test_no_false_alarm(name: str, dtype: torch.dtype) -> None:
    """Dropout, layerdrop, training mode, gradients, autocast, inference mode: all the same."""
    model = tiny(name, dtype=dtype)
    model.config.layerdrop = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    ways = [
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ]
    for way, training in zip(ways, (True, False, True), strict=True):
        checked._known.clear()
        model.train(training)
        with way:
            blocks = describe(model).blocks
            assert all(checked.agreement(block).weights for block in blocks)
            assert bool(why_not_step(model)) or why_not_alike(model) == ""


def test_seldom_weights_are_no_alarm() -> None:
    """NaN, infinity, zeros and weights made in inference mode."""
    for value in (float("nan"), float("inf"), 0.0):
        model = tiny()
        model.model.layers[0].mlp.gate_proj.weight.data[5, 3] = value
        checked._known.clear()
        describe(model)
        assert why_not_alike(model) == ""
    with torch.inference_mode():
        made = tiny()
    describe(made)
    assert why_not_alike(made) == ""


# Threads


def test_two_threads_are_told_apart() -> None:
    model, inside, go_on = tiny(), threading.Event(), threading.Event()
    ids, errors = tokens(1, 12), []

    def wait(module: Any, args: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    def other() -> None:
        try:
            step(model, ids, new_cache(model))
        except ConfigError as error:
            errors.append(str(error))

    with prune(model, "griffin", sparsity=0.5):
        handle = model.model.layers[1].register_forward_pre_hook(wait)
        first = threading.Thread(target=step, args=(model, ids, new_cache(model)))
        first.start()
        assert inside.wait(60)
        second = threading.Thread(target=other)
        second.start()
        second.join(60)
        go_on.set()
        first.join(60)
        handle.remove()
        assert errors == [
            "another thread is running this model: a pruned model runs one forward at a time"
        ]
        assert generate(model, ids, 3).sequences.shape == (1, 15)


def test_a_forward_that_was_interrupted_leaves_no_thread_behind() -> None:
    model, ids = tiny(), tokens(1, 12)

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    done: list[Tensor] = []
    with prune(model, "griffin", sparsity=0.5):
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            step(model, ids, new_cache(model))
        handle.remove()
        later = threading.Thread(target=lambda: done.append(step(model, ids, new_cache(model))))
        later.start()
        later.join(60)
    assert apart(done[0], step(model, ids, new_cache(model))) < CLOSE
