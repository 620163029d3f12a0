"""What a GGUF file states of its model beside what transformers reads; dense and in blocks."""

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoints import WIDTH, write_gguf
from dart_llm.errors import LoadError
from dart_llm.models.gguf_file import left_out, read_gguf
from dart_llm.models.loading import load
from steps import apart, decode, pruned
from tiny import tokens

pytestmark = pytest.mark.usefixtures("native")

PLAIN_16 = 10000.0 ** -(torch.arange(16) / 16)
"""Frequencies of a head of 32 values, as they are without factors."""

IDS = tokens(1, 48, seed=3)
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 32.0, "rope_theta": 10000.0}
LLAMA_3 |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 2}
LLAMA = AutoConfig.for_model("llama", **SIZES, rope_parameters=LLAMA_3)
LLAMA_3_ANGLES = ROPE_INIT_FUNCTIONS["llama3"](LLAMA, "cpu")[0]
SOME, MORE = torch.linspace(1, 3, 16), torch.linspace(1, 9, 16)
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
YARN |= {"rope.scaling.original_context_length": 32}
PARTS = {"attention.sliding_window": 24, "rope.dimension_count": 24}
LONG = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
FACTORS = {"rope_factors_short.weight": SOME, "rope_factors_long.weight": MORE}

CASES = {
    "llama 3": ({"tensors": {"rope_freqs.weight": PLAIN_16 / LLAMA_3_ANGLES}}, LLAMA_3),
    "factors": ({"tensors": {"rope_freqs.weight": SOME}}, {"rope_type": "longrope"}),
    "long": (
        {"architecture": "phi3", "facts": LONG, "tensors": FACTORS},
        {"rope_type": "longrope", "long_factor": pytest.approx(MORE.tolist())},
    ),
    "linear": ({"facts": LINEAR}, {"rope_type": "linear", "factor": 8}),
    # whose sliding layers, both of these, keep their angles
    "gemma3": ({"architecture": "gemma3", "facts": LINEAR}, {"rope_type": "linear", "factor": 8}),
    "yarn": (
        {"architecture": "qwen2", "facts": YARN},
        {"rope_type": "yarn", "original_max_position_embeddings": 32},
    ),
    "phi3": ({"architecture": "phi3", "facts": PARTS}, {"partial_rotary_factor": 0.75}),
    "gpt2": ({"architecture": "gpt2", "context": 128}, {}),
}
"""Settings of a file, and what the configuration then says of angles."""

ANGLES = {"llama 3": LLAMA_3_ANGLES, "factors": PLAIN_16 / SOME, "long": PLAIN_16 / SOME}
ANGLES |= {"linear": PLAIN_16 / 8}


@pytest.mark.parametrize("name", CASES)
def test_settings_that_transformers_leaves_out(name, tmp_path):
    settings, angles = CASES[name]
    file = write_gguf(tmp_path / "tiny.gguf", **settings)
    where = {"cache_dir": tmp_path, "dtype": "float32"}
    models = [load(file, weights=weights, **where)[0] for weights in ("file", "dense")]
    for model in models:
        stated = getattr(model.config, "rope_parameters", None) or {}
        assert angles.items() <= stated.get("full_attention", stated).items()
        if name in ANGLES:
            torch.testing.assert_close(model.model.rotary_emb.inv_freq, ANGLES[name])
        if name == "long":
            assert model.model.rotary_emb.attention_scaling == 1.25
        if name == "phi3":
            assert model.config.sliding_window == 24 and len(model.model.rotary_emb.inv_freq) == 12
        if name == "gpt2":
            assert model.config.n_positions == model.transformer.wpe.weight.shape[0] == 128
    about = {"architectures", "_name_or_path"}
    packed, dense = ({**model.config.to_dict(), **dict.fromkeys(about)} for model in models)
    assert packed == dense
    assert apart(*(decode(model, IDS, 40) for model in models)) < 5e-2
    if name == "phi3":
        executors = zip(models, ("native", "masked"), strict=True)
        logits = [pruned(m, IDS, 40, executor=how, sparsity=0.5)[2] for m, how in executors]
        assert apart(*logits) < 5e-2


def test_factors_without_effect_and_bad_ones(tmp_path):
    for settings in (
        {"tensors": {"rope_freqs.weight": [1.0] * 16}},
        {"architecture": "starcoder2", "facts": LINEAR},  # where these words may mean another thing
    ):
        assert left_out(read_gguf(write_gguf(tmp_path / "tiny.gguf", **settings))) == {}
    for bad in ([0.0] * 16, [float("nan")] * 16, [float("inf")] * 16, [2.0] * 5000):
        file = write_gguf(tmp_path / "bad.gguf", tensors={"rope_freqs.weight": bad})
        for weights in ("file", "dense"):
            with pytest.raises(LoadError, match=r"\Abad.gguf.* tensor rope_freqs.weight must"):
                load(file, cache_dir=tmp_path, weights=weights)


def test_mistral_keeps_its_window(tmp_path):
    """Which transformers takes for its type by the name; beside such a model of these weights."""
    file = write_gguf(tmp_path / "tiny.gguf", ffn=Kind.Q8_0)
    dense, _ = load(file, cache_dir=tmp_path, weights="dense", dtype="float32")
    settings = {**dense.config.to_dict(), "sliding_window": 24, "model_type": "mistral"}
    wanted = AutoModelForCausalLM.from_config(MistralConfig.from_dict(settings)).eval()
    wanted.load_state_dict(dense.state_dict())
    write_gguf(file, ffn=Kind.Q8_0, name="mistral", facts={"attention.sliding_window": 24})
    model, _ = load(file, cache_dir=tmp_path, dtype="float32", weights="file")
    assert (model.config.model_type, model.config.sliding_window) == ("mistral", 24)
    logits = decode(wanted, IDS, 40)
    assert apart(decode(model, IDS, 40), logits) < 5e-2 < apart(decode(dense, IDS, 40), logits)
    _, _, theirs = pruned(wanted, IDS, 40, executor="masked", sparsity=0.5)
    _, _, ours = pruned(model, IDS, 40, executor="native", sparsity=0.5)
    assert apart(ours, theirs) < 5e-2
