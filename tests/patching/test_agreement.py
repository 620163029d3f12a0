"""What runs in a model's place computes what the model does, or does not run."""

import functools
from itertools import product

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from dart_llm.errors import AttachError, ConfigError, UnsupportedModel
from dart_llm.models import agreement as checked
from dart_llm.models.describe import describe, widths
from dart_llm.models.steps import step_unsupported_reason
from dart_llm.session.run import prune
from products import DTYPES, SHAPES
from steps import apart, decode, picked, snapshot
from tiny import HIDDEN, NAMES, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

PROMPT, CLOSE = 16, 1e-4
IDS = tokens(1, PROMPT + 6)


@pytest.fixture(autouse=True)
def _classes():
    """What a test puts on classes and modules of transformers is taken away again."""
    kinds = ("LlamaAttention", "LlamaRMSNorm", "LlamaMLP", "LlamaDecoderLayer")
    patched = [(getattr(modeling, kind), "forward") for kind in kinds]
    patched += [(modeling, "apply_rotary_pos_emb"), (nn.Linear, "forward")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in patched]
    yield
    for owner, name, value in kept:
        setattr(owner, name, value)


def _masks(model):
    return {
        layer: [one for one in picked()[layer] if one < width]
        for layer, width in enumerate(widths(model))
    }


def no_steps_reason(model):
    with prune(model, masks=_masks(model), executor="native") as run:
        return run.patch.no_steps


def _decoded(model, executor="auto"):
    with prune(model, masks=_masks(model), executor=executor) as run:
        result = decode(model, IDS, PROMPT)
    return result, run.report().executor


def _scaled(factor, function):
    """A function whose first result is multiplied; it looks like the one that it calls."""

    @functools.wraps(function)
    def scaled(*args, **kwargs):
        made = function(*args, **kwargs)
        return (factor * made[0], *made[1:]) if isinstance(made, tuple) else factor * made

    return scaled


def _attention_function(model):
    def half(module, q, k, v, mask, **rest):
        settings = {**rest, "scaling": rest["scaling"] / 2}
        return sdpa_attention_forward(module, q, k, v, mask, **settings)

    AttentionInterface.register("half", half)
    ALL_MASK_ATTENTION_FUNCTIONS.register("half", sdpa_mask)
    model.set_attn_implementation("half")


def _replaced(owner, name="forward", factor=1.3):
    """Replaces a function of ``owner``, a class or a module, whatever the model."""
    return lambda model: setattr(owner, name, _scaled(factor, getattr(owner, name)))


class Louder(nn.Linear):
    def forward(self, x):
        return 1.3 * super().forward(x)


class Packed(Tensor):
    """A weight whose memory is nobody's business."""


def _at(place, change, *values):
    return lambda model: change(model.model.layers[1].get_submodule(place), *values)


def _patch(part):
    part.forward = _scaled(1.3, part.forward)


def _hook(part):
    part.register_forward_hook(lambda module, args, out: 1.5 * out)


def _pack(part):
    part._parameters["weight"] = part.weight.detach().clone().as_subclass(Packed)


def _by_inputs(part):
    part.weight = nn.Parameter(part.weight.detach().t().contiguous().t())


def _two_on_one(model):
    first, second = (layer.mlp.down_proj for layer in model.model.layers[:2])
    second.weight = nn.Parameter(first.weight.data)


def _down(make):
    """The first down projection's weight lies where ``make`` puts it."""

    def change(model):
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data = make(weight.data)

    return change


SCALING = _at("self_attn", setattr, "scaling", 0.7)
EPS = _at("input_layernorm", setattr, "variance_epsilon", 0.5)
ACTIVATION = _at("mlp", setattr, "act_fn", nn.GELU())
KERNELS, WEIGHTS = ("native",), ("native", "compact")
PASSED_BY = {
    "attention function": _attention_function,
    "class of attention": _replaced(modeling.LlamaAttention),
    "class of norms": _replaced(modeling.LlamaRMSNorm),
    "rotation": _replaced(modeling, "apply_rotary_pos_emb", 0.5),
    "scaling": SCALING,
    "eps": EPS,
    "activation": ACTIVATION,
    "linear subclass": _at("self_attn.v_proj", setattr, "__class__", Louder),
    "tensor class of the head": lambda model: _pack(model.lm_head),
    "attention by inputs": _at("self_attn.q_proj", _by_inputs),
}
"""What a whole step would pass by."""

ODD = {
    "hook on down": _at("mlp.down_proj", _hook),
    "hook on act": _at("mlp.act_fn", _hook),
    "forward of up": _at("mlp.up_proj", _patch),
    "forward of down": _at("mlp.down_proj", _patch),
}
"""A projection that is more than its weights runs itself."""

PRUNED = _at("mlp.down_proj", l1_unstructured, "weight", 0.3)
NORMED = _at("self_attn.q_proj", weight_norm)
SHARED = "layers.0.mlp.down_proj.weight and model.layers.1.mlp.down_proj.weight"
VIEW = _down(lambda one: torch.cat([one, one])[HIDDEN:])
PLAIN = "layer 1 has (hooks on|projections that are not plain)"
CASES = {
    **{name: (change, "native", (), "") for name, change in PASSED_BY.items()},
    "parametrized": (NORMED, "native", (), ""),
    # what the kernels cannot read
    "up by inputs": (_at("mlp.up_proj", _by_inputs), "compact", KERNELS, ""),
    "computed from others": (PRUNED, "compact", ("native",), "weights that are computed from"),
    # memory that is not its own
    "two on one": (_two_on_one, "compact", KERNELS, SHARED),
    "larger": (VIEW, "compact", KERNELS, "of layer 0 is a view of a larger"),
    "processes": (_down(lambda one: one.share_memory_()), "compact", KERNELS, "another process"),
    **{name: (change, "compact", WEIGHTS, PLAIN) for name, change in ODD.items()},
    "all linears": (_replaced(nn.Linear, factor=1.1), "masked", WEIGHTS, ""),
}
"""A change, what ``auto`` runs then (never by whole steps), what refuses, and its message."""


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_the_modules(case):
    """Whatever was changed: the same as ``masked``, by the fastest executor that computes them."""
    change, executor, refused, sentence = CASES[case]
    model = tiny()
    change(model)
    expected, _ = _decoded(model, "masked")
    result, ran = _decoded(model)
    assert ran == executor and apart(result, expected) < CLOSE
    for one in refused:
        with pytest.raises(ConfigError, match=f'executor "{one}" cannot run Llama.*{sentence}'):
            prune(model, masks=_masks(model), executor=one)


class Doubled(modeling.LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def _subclass(model):
    model.model.layers[3].mlp.__class__ = Doubled


def _loud_channel(model):
    mlp = model.model.layers[3].mlp
    loud = torch.ones(32)
    loud[5] = 1.2
    mlp.forward = lambda x: loud * modeling.LlamaMLP.forward(mlp, x)


def test_an_ffn_that_computes_something_else_is_refused():
    for change in (_subclass, _loud_channel):
        model = tiny()
        change(model)
        before = snapshot(model)
        kind = type(model.model.layers[3].mlp).__name__
        for executor in ("auto", "masked", "compact"):
            with pytest.raises(UnsupportedModel) as error:
                prune(model, "griffin", sparsity=0.5, executor=executor)
            assert str(error.value) == (
                f"LlamaForCausalLM: the FFN of layer 3 ({kind}) computes something other than "
                "gate, up, activation, down: dart-llm cannot prune it"
            )
        assert snapshot(model) == before
    model = tiny()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModel, match=r"layers 0 and 2 share one FFN \(LlamaMLP\)"):
        prune(model)
    for name in ("gpt2", "bloom", "phi3", "falcon"):
        model = tiny(name)
        _patch(describe(model).blocks[2].ffn)
        with pytest.raises(UnsupportedModel, match=r"FFN of layer 2 .* computes something other"):
            prune(model)
    model = tiny()
    describe(model)
    _replaced(modeling.LlamaMLP)(model)
    with pytest.raises(UnsupportedModel, match="the FFN of layer 0"):
        prune(model)


def test_a_model_of_which_torch_compiled_a_part_runs_compact():
    torch._dynamo.reset()
    model = tiny()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    expected, _ = _decoded(model, "masked")
    layer = model.model.layers[1]
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    result, executor = _decoded(model)
    assert executor == "compact" and apart(result, expected) < CLOSE
    with pytest.raises(ConfigError, match="was compiled by torch"):
        prune(model, masks={0: [1]}, executor="native")


CHANGES = (
    *(_replaced(modeling.LlamaRMSNorm), SCALING, EPS),
    lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    _at("self_attn", _patch),
    _at("input_layernorm", _patch),
    *ODD.values(),
)


@pytest.mark.parametrize(
    ("change", "executor"), [*product(CHANGES, ["native"]), *product(CHANGES[-2:], ["compact"])]
)
def test_a_change_while_attached_counts_from_the_next_prompt(change, executor):
    model = tiny()
    with prune(model, masks=picked(), executor=executor):
        before = decode(model, IDS, PROMPT)
        change(model)
        result = decode(model, IDS, PROMPT)
    expected, _ = _decoded(model, "masked")  # as it was left
    assert apart(result, expected) < CLOSE < apart(result, before)


CHANGED = "was changed while this model is being pruned"
LOUD_HEAD = lambda model: setattr(model.lm_head, "__class__", Louder)  # noqa: E731
MOVES = (
    lambda model: model.to(torch.bfloat16),
    lambda model: model.resize_token_embeddings(130),
    lambda model: model.load_state_dict(tiny(seed=5).state_dict(), assign=True),
)
NOTICED = [
    (_subclass, "native", CHANGED),
    (_replaced(modeling.LlamaMLP), "masked", CHANGED),
    *((ACTIVATION, one, CHANGED) for one in ("native", "masked")),
    (LOUD_HEAD, "native", "the forward of a Louder was changed while"),
    *((move, "native", "replaced or moved") for move in MOVES),
]


@pytest.mark.parametrize(("change", "executor", "noticed"), NOTICED)
def test_what_cannot_be_while_attached_is_noticed(change, executor, noticed):
    model = tiny()
    with prune(model, masks=picked(), executor=executor):
        decode(model, IDS, PROMPT)
        change(model)
        with pytest.raises(AttachError, match=noticed):
            decode(model, IDS, PROMPT)
    assert model.model.layers[0].mlp.down_proj.weight.is_contiguous()
    decode(model, IDS, PROMPT)  # it is as it was left


def test_hooks_do_not_see_the_comparison_and_nothing_is_left_behind():
    model, seen = tiny(), []
    for name, module in model.named_modules():
        if "mlp." not in name:  # with hooks on its projections an FFN runs them
            module.register_forward_hook(lambda module, args, out: seen.append(module))
            module.register_forward_pre_hook(lambda module, args: seen.append(module))
    checked._compared.clear()
    before, lot = snapshot(model), torch.get_rng_state()
    assert no_steps_reason(model) is None
    assert seen == [] and snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), lot)


@pytest.mark.parametrize(
    ("name", "dtype"), [*product(NAMES, DTYPES[:1]), *product(SHAPES[:4], DTYPES[1:2])], ids=str
)
def test_no_false_alarm(name, dtype):
    """Dropout, layerdrop, training mode, gradients, autocast, inference mode: all the same."""
    model = tiny(name, dtype=dtype)
    model.config.layerdrop = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    cast = torch.autocast("cpu", dtype=torch.bfloat16)
    for way, training in ((torch.enable_grad(), True), (torch.inference_mode(), 0), (cast, True)):
        checked._compared.clear()
        model.train(bool(training))
        with way:
            assert all(checked.agreement(block).weights for block in describe(model).blocks)
            if not name.startswith("opt"):
                assert step_unsupported_reason(model) == no_steps_reason(model)
