"""GGUF files of every architecture that is read in blocks, beside transformers' own reading."""

import copy

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, GgufConfig

from checkpoints import write_gguf
from dart_llm.models.gguf_file import ARCHITECTURES
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor
from dart_llm.models.packed_loading import round_weights
from dart_llm.models.steps import step_unsupported_reason
from steps import apart, decode, pruned, same_masks
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("native", "dequantised_prompts")  # numbers to the last bit

EXACT, ROUNDING = 1e-4, 5e-2
"""Of the largest logit: without rounded inputs, and what inputs of 8 bits make of it."""

MIXES = {
    "q8_0": {"ffn": Kind.Q8_0, "attention": Kind.Q8_0},
    "q4_0": {"ffn": Kind.Q4_0, "attention": Kind.Q4_0},
    "q4_k": {"width": 256, "ffn": Kind.Q4_K, "attention": Kind.Q4_K},
}
MIXES["q4_k"] |= {"down": Kind.Q6_K, "embedding": Kind.Q6_K}
PROMPT = 40
IDS = tokens(1, PROMPT + 8, seed=3)


def loaded(folder, architecture, mix):
    """The model in its blocks, dense, and as transformers reads the same file."""
    file = folder / f"{architecture}.gguf"
    tied = mix != "q8_0" or architecture.startswith("gemma")  # whose files have no head
    context = 1024 if architecture == "gpt2" else 128  # which transformers does not read
    write_gguf(file, architecture=architecture, tied=tied, context=context, **MIXES[mix])
    how = {"cache_dir": folder, "dtype": "float32"}
    packed, dense = (load(file, weights=weights, **how)[0] for weights in ("file", "dense"))
    how = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **how)
    return packed, dense, theirs.eval()


def facts(model):
    """What a configuration says, but for where it comes from."""
    about = {"architectures", "_name_or_path", "_model_name_or_path", "dtype"}
    return {key: one for key, one in model.config.to_dict().items() if key not in about}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("mix", MIXES)
def test_models_compute_what_transformers_computes(architecture, mix, tmp_path):
    """Dense to the bit; in blocks a prompt exactly, tokens and steps but for rounded inputs."""
    packed, dense, theirs = loaded(tmp_path, architecture, mix)
    wanted = theirs.state_dict()
    assert type(dense) is type(theirs) and facts(dense) == facts(theirs)
    assert list(dense.state_dict()) == list(wanted)
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    assert type(packed) is type(theirs) and facts(packed) == facts(theirs)
    for name, weight in packed.named_parameters():
        in_blocks = weight.dim() == 2 and "wpe" not in name
        assert isinstance(weight, PackedTensor) == in_blocks, name
        wanted = theirs.get_parameter(name).detach()
        torch.testing.assert_close(weight + 0, wanted, rtol=1e-6, atol=1e-7, msg=name)
    logits, wanted = decode(packed, IDS, PROMPT), decode(theirs, IDS, PROMPT)
    assert apart(logits[:, :PROMPT], wanted[:, :PROMPT]) < EXACT
    assert EXACT < apart(logits[:, PROMPT:], wanted[:, PROMPT:]) < ROUNDING
    assert step_unsupported_reason(packed) is step_unsupported_reason(theirs) is None
    for sparsity in (0.0, 0.5):
        agree(packed, theirs, "native", sparsity)


def agree(packed, dense, executor, sparsity):
    """Both pruned with the same masks and logits."""
    _, masks, wanted = pruned(dense, IDS, PROMPT, executor="masked", sparsity=sparsity)
    _, same, logits = pruned(packed, IDS, PROMPT, executor=executor, sparsity=sparsity)
    assert apart(logits, wanted) < ROUNDING, (executor, sparsity)
    assert len(masks) == len(same) == (sparsity > 0)
    assert all(same_masks(a[2], b[2]) for a, b in zip(masks, same, strict=True))


def test_matrices_that_are_stored_by_inputs_are_rounded():
    """GPT-2's, beside the same model dequantised; llama.cpp keeps positions in float32."""
    dense = tiny("gpt2", n_embd=64, n_inner=160, n_head=2)
    model = copy.deepcopy(dense)
    assert round_weights(model, "q4_0") == []
    for name, weight in model.named_parameters():
        assert isinstance(weight, PackedTensor) == (weight.dim() == 2 and "wpe" not in name), name
        wanted, rounded = dense.get_parameter(name), (weight + 0).detach()
        assert apart(rounded, wanted.detach()) < 0.13
        wanted.data = rounded.contiguous()
    for executor in ("native", "compact"):
        agree(model, dense, executor, 0.5)
