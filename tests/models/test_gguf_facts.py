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

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
PLAIN_16 = 10000.0 ** -(torch.arange(16) / 16)
"""Frequencies of a head of 32 values, as they are without factors."""

IDS = tokens(1, 48, seed=3)


def both(tmp_path, **settings):
    """The same file in its blocks and dense, in float32."""
    file = write_gguf(tmp_path / "tiny.gguf", **settings)
    where = {"cache_dir": tmp_path, "dtype": "float32"}
    return [load(file, weights=weights, **where)[0] for weights in ("file", "dense")]


def frequencies(model):
    return model.model.rotary_emb.inv_freq


def check_alike(packed, dense):
    about = {"architectures", "_name_or_path"}
    facts = [
        {k: v for k, v in m.config.to_dict().items() if k not in about} for m in (packed, dense)
    ]
    assert facts[0] == facts[1]
    assert apart(decode(packed, IDS, 40), decode(dense, IDS, 40)) < 5e-2


def test_llama_3(tmp_path):
    """Whose file holds the factors, and no word of what they were made of."""
    settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
    settings |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, "factor": 32.0}
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, rope_parameters=settings)
    factors = PLAIN_16 / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    assert factors[0] == 1 and factors[-1] == 32 and 1 < factors[11] < 32
    packed, dense = both(tmp_path, tensors={"rope_freqs.weight": factors})
    for model in (packed, dense):
        assert model.config.rope_parameters.items() >= settings.items()
        torch.testing.assert_close(frequencies(model), PLAIN_16 / factors)
    check_alike(packed, dense)


def test_other_factors_of_frequencies(tmp_path):
    factors = torch.linspace(1, 3, 16)
    packed, dense = both(tmp_path, tensors={"rope_freqs.weight": factors})
    for one in (packed, dense):
        assert one.config.rope_parameters["rope_type"] == "longrope"
        torch.testing.assert_close(frequencies(one), PLAIN_16 / factors)
        assert one.model.rotary_emb.attention_scaling == 1
    check_alike(packed, dense)
    file = write_gguf(tmp_path / "ones.gguf", tensors={"rope_freqs.weight": [1.0] * 16})
    assert left_out(read_gguf(file)) == {}
    file = write_gguf(tmp_path / "other.gguf", architecture="starcoder2", facts=LINEAR)
    assert left_out(read_gguf(file)) == {}  # where these words may mean something else
    for bad in ([0.0] * 16, [float("nan")] * 16, [float("inf")] * 16, [2.0] * 5000):
        file = write_gguf(tmp_path / "bad.gguf", tensors={"rope_freqs.weight": bad})
        for weights in ("file", "dense"):
            with pytest.raises(LoadError, match=r"\Abad.gguf: tensor rope_freqs.weight must have"):
                load(file, cache_dir=tmp_path, weights=weights)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_scaled_positions(architecture, tmp_path):
    """Linearly; and by yarn."""
    packed, dense = both(tmp_path, architecture=architecture, facts=LINEAR)
    for one in (packed, dense):
        known = one.config.rope_parameters
        if architecture == "gemma3":  # whose sliding layers, both of these, keep their angles
            assert known["sliding_attention"]["rope_type"] == "default"
            known = known["full_attention"]
        else:
            torch.testing.assert_close(frequencies(one), PLAIN_16 / 8)
        assert (known["rope_type"], known["factor"]) == ("linear", 8)
    check_alike(packed, dense)
    if architecture == "qwen2":
        yarn = {**YARN, "rope.scaling.original_context_length": 32}
        packed, dense = both(tmp_path, architecture=architecture, facts=yarn)
        for one in (packed, dense):
            known = one.config.rope_parameters
            assert known["original_max_position_embeddings"] == 32 and known["rope_type"] == "yarn"
            assert not torch.allclose(frequencies(one), PLAIN_16)
        check_alike(packed, dense)


def test_phi3(tmp_path):
    """A window, a part of each head that is turned, and factors for short and long texts."""
    packed, dense = both(
        tmp_path,
        architecture="phi3",
        facts={"attention.sliding_window": 24, "rope.dimension_count": 24},
    )
    for one in (packed, dense):
        assert one.config.sliding_window == 24 and len(frequencies(one)) == 12
    check_alike(packed, dense)
    _, _, wanted = pruned(dense, IDS, 40, executor="masked", sparsity=0.5)
    _, _, found = pruned(packed, IDS, 40, executor="native", sparsity=0.5)
    assert apart(found, wanted) < 5e-2
    short, long = torch.linspace(1, 2, 16), torch.linspace(1, 9, 16)
    packed, dense = both(
        tmp_path,
        architecture="phi3",
        facts={"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25},
        tensors={"rope_factors_short.weight": short, "rope_factors_long.weight": long},
    )
    for one in (packed, dense):
        torch.testing.assert_close(frequencies(one), PLAIN_16 / short)
        assert one.model.rotary_emb.attention_scaling == 1.25
        assert one.config.rope_parameters["long_factor"] == pytest.approx(long.tolist())
    check_alike(packed, dense)


def test_mistral_keeps_its_window(tmp_path):
    """Which transformers takes for its type by the name; beside such a model of these weights."""
    file = write_gguf(tmp_path / "tiny.gguf", ffn=Kind.Q8_0)
    dense, _ = load(file, cache_dir=tmp_path, weights="dense", dtype="float32")
    known = {**dense.config.to_dict(), "sliding_window": 24, "model_type": "mistral"}
    wanted = AutoModelForCausalLM.from_config(MistralConfig.from_dict(known)).eval()
    wanted.load_state_dict(dense.state_dict())
    write_gguf(file, ffn=Kind.Q8_0, name="mistral", facts={"attention.sliding_window": 24})
    model, _ = load(file, cache_dir=tmp_path, dtype="float32", weights="file")
    assert (model.config.model_type, model.config.sliding_window) == ("mistral", 24)
    logits = decode(wanted, IDS, 40)
    assert apart(decode(model, IDS, 40), logits) < 5e-2 < apart(decode(dense, IDS, 40), logits)
    _, _, theirs = pruned(wanted, IDS, 40, executor="masked", sparsity=0.5)
    _, _, ours = pruned(model, IDS, 40, executor="native", sparsity=0.5)
    assert apart(ours, theirs) < 5e-2
