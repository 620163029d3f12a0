"""GGUF files of every architecture that is read in blocks, beside transformers' own reading."""

import copy
import functools

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, GgufConfig

from checkpoints import write_gguf
from dart_llm.models.gguf_file import ARCHITECTURES
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor
from dart_llm.models.packed_loading import random_packed, round_weights
from dart_llm.models.steps import step_unsupported_reason
from steps import apart, decode, pruned, same_masks
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("native", "dequantised_prompts")  # numbers to the last bit

EXACT, ROUNDING = 1e-4, 5e-2
"""Of the largest logit: without rounded inputs, and what inputs of 8 bits make of it."""

MIXES = {
    "q8_0": {"ffn": Kind.Q8_0, "attention": Kind.Q8_0},
    "q4_0": {"ffn": Kind.Q4_0, "attention": Kind.Q4_0},
    "q4_k": {
        "width": 256,
        "ffn": Kind.Q4_K,
        "attention": Kind.Q4_K,
        "down": Kind.Q6_K,
        "embedding": Kind.Q6_K,
    },
}
PROMPT = 40
IDS = tokens(1, PROMPT + 8, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def files(folder):
    @functools.cache
    def both(architecture, mix):
        """The model in its blocks, and as transformers reads the same file."""
        file = folder / f"{architecture}-{mix}.gguf"
        tied = mix != "q8_0" or architecture.startswith("gemma")  # whose files have no head
        context = 1024 if architecture == "gpt2" else 128  # which transformers does not read
        shape = {"architecture": architecture, "tied": tied, "context": context}
        write_gguf(file, **shape, **MIXES[mix])
        packed, _ = load(file, cache_dir=folder, dtype="float32", weights="file")
        how = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **how)
        return packed, theirs.eval()

    return both


def facts(model):
    """What a configuration says, but for where it comes from."""
    about = {"architectures", "_name_or_path", "_model_name_or_path", "dtype"}
    return {key: one for key, one in model.config.to_dict().items() if key not in about}


CASES = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
OF_MIXES = pytest.mark.parametrize("mix", MIXES)


@CASES
@OF_MIXES
def test_modules_say_what_transformers_says(architecture, mix, files):
    """A prompt by dequantised rows, exactly; then tokens by products with rounded inputs."""
    packed, theirs = files(architecture, mix)
    assert type(packed) is type(theirs) and facts(packed) == facts(theirs)
    for name, one in packed.named_parameters():
        assert isinstance(one, PackedTensor) == (one.dim() == 2 and "wpe" not in name), name
        wanted = theirs.get_parameter(name).detach()
        torch.testing.assert_close(one + 0, wanted, rtol=1e-6, atol=1e-7, msg=name)
    found, wanted = decode(packed, IDS, PROMPT), decode(theirs, IDS, PROMPT)
    assert apart(found[:, :PROMPT], wanted[:, :PROMPT]) < EXACT
    assert EXACT < apart(found[:, PROMPT:], wanted[:, PROMPT:]) < ROUNDING


@CASES
@OF_MIXES
def test_dense_weights_are_what_transformers_reads(architecture, mix, files, folder):
    """To the last bit, and the same configuration."""
    _, theirs = files(architecture, mix)
    file = folder / f"{architecture}-{mix}.gguf"
    ours, _ = load(file, cache_dir=folder, dtype="float32", weights="dense")
    assert type(ours) is type(theirs) and facts(ours) == facts(theirs)
    wanted = theirs.state_dict()
    assert list(ours.state_dict()) == list(wanted)
    for name, one in ours.state_dict().items():
        assert torch.equal(one, wanted[name]), name
    half, _ = load(file, cache_dir=folder, weights="dense")
    assert torch.equal(half.state_dict()[name], one.bfloat16())


@CASES
@OF_MIXES
def test_whole_steps_say_it_too(architecture, mix, files):
    """Dense and pruned, with the masks of the dequantised model."""
    packed, theirs = files(architecture, mix)
    assert step_unsupported_reason(packed) is step_unsupported_reason(theirs) is None
    for sparsity in (0.0, 0.5):
        _, masks, wanted = pruned(theirs, IDS, PROMPT, executor="masked", sparsity=sparsity)
        for executor in ("native",):
            _, same, found = pruned(packed, IDS, PROMPT, executor=executor, sparsity=sparsity)
            assert apart(found, wanted) < ROUNDING, (executor, sparsity)
            assert len(masks) == len(same) == (sparsity > 0)
            assert all(same_masks(a[2], b[2]) for a, b in zip(masks, same, strict=True))


@pytest.mark.parametrize(("name", "positions"), [("gpt2", "wpe"), ("opt", "embed_positions")])
def test_embeddings_of_positions_are_not_rounded(name, positions):
    """llama.cpp keeps them in float32."""
    model = tiny(name)
    before = copy.deepcopy(model)
    round_weights(model, "q4_0")
    kept = {key: one for key, one in model.named_parameters() if positions in key}
    assert len(kept) == 1 and isinstance(model.get_input_embeddings().weight, PackedTensor)
    for key, one in kept.items():
        assert type(one) is torch.nn.Parameter and torch.equal(one, before.get_parameter(key))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_matrices_that_are_stored_by_inputs_are_rounded(kind):
    """GPT-2's, beside the same model dequantised."""
    dense = tiny("gpt2", n_embd=64, n_inner=160, n_head=2)
    model = copy.deepcopy(dense)
    assert round_weights(model, kind) == []
    for name, one in model.named_parameters():
        assert isinstance(one, PackedTensor) == (one.dim() == 2 and "wpe" not in name), name
        wanted, held = dense.get_parameter(name), (one + 0).detach()
        assert apart(held, wanted.detach()) < 0.13
        wanted.data = held.contiguous()
    for sparsity in (0.0, 0.5):
        _, masks, wanted = pruned(dense, IDS, PROMPT, executor="masked", sparsity=sparsity)
        for executor in ("native", "compact"):
            _, same, found = pruned(model, IDS, PROMPT, executor=executor, sparsity=sparsity)
            assert apart(found, wanted) < ROUNDING, (executor, sparsity)
            assert all(same_masks(a[2], b[2]) for a, b in zip(masks, same, strict=True))
    drawn = random_packed(model.config, kind, torch.float32)
    assert drawn.transformer.h[0].mlp.c_proj.weight.shape == (160, 64)
    assert 0.01 < drawn.transformer.wpe.weight.std() < 0.03
    assert decode(drawn, IDS, PROMPT).isfinite().all()
