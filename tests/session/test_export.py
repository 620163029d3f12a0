"""Masks written as a dense checkpoint of narrower width."""

from contextlib import ExitStack

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dart_llm.errors import ConfigError
from dart_llm.models.describe import describe
from dart_llm.models.loading import load
from dart_llm.session.run import prune
from stand_in import write_model
from steps import apart, decode, generate, picked, shared_model, state_of
from tiny import NAMES, tiny, tokens
from token_cases import before_down

EXPORTED = tuple(name for name in NAMES if name != "bloom")
IDS = tokens(2, 20)


def _outputs(model, masks=None):
    """Logits and FFN outputs with ``masks`` applied to all positions; None: all neurons."""
    outputs = []

    def keep(layer, _, u):
        kept = torch.as_tensor(range(u.shape[-1]) if masks is None else masks[layer])
        return u * torch.zeros(u.shape[-1]).index_fill(0, kept, 1)

    with before_down(model, None, keep), torch.no_grad(), ExitStack() as stack:
        for block in describe(model).blocks:
            handle = block.down.register_forward_hook(lambda m, a, z: outputs.append(z))
            stack.callback(handle.remove)
        return model(IDS).logits, outputs


def _narrowed(model, folder, **settings):
    with prune(model, "griffin", sparsity=0.5, **settings) as run:
        generate(model, tokens(), 4)
        assert run.export(folder) == folder
    return run, AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name, tmp_path):
    model = shared_model(name)
    run, loaded = _narrowed(model, tmp_path / "narrow")
    assert type(loaded) is type(model)
    assert {b.down_width for b in describe(loaded).blocks} == {24}
    wanted, wanted_z = _outputs(model, run.masks())
    got, got_z = _outputs(loaded)
    assert apart(got, wanted) < 1e-5
    assert all(apart(a, b) < 1e-5 for a, b in zip(got_z, wanted_z, strict=True))
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in loaded.parameters())
    gated = describe(model).weights("output", 0)[0].gate is not None
    assert saved >= 4 * 24 * 32 * (3 if gated else 2)
    with prune(loaded, "griffin", sparsity=0.5) as run:  # and it can be pruned again
        generate(loaded, tokens(), 4)
    assert run.report().layers[0].kept == 12


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gpt2", "gpt_neox", "phi", "opt"])
def test_export_with_compensation(name, tmp_path):
    """The constant goes into the output's bias, made where the architecture has room for it."""
    model = shared_model(name)
    run, loaded = _narrowed(model, tmp_path, compensation=True)
    first, plain = _outputs(loaded)[1][0], _outputs(model, run.masks())[1][0]
    extra = state_of(run).selection.masks[0].bias
    assert float(extra.norm()) > 0
    assert apart(first.reshape(-1, 32), (plain + extra).reshape(-1, 32)) < 1e-5


def test_export_refuses_what_it_cannot_write(tmp_path):
    for name, settings, sentence in [
        *(
            (name, {"method": "griffin", "compensation": True}, "use compensation=False to export")
            for name in ("mistral", "qwen2", "phi3", "falcon", "olmo2")
        ),
        ("llama", {"method": "dart"}, "cannot have low-rank compensation: use compensation_rank"),
        ("llama", {"method": "dart-prompt"}, r'keeps \d+ to \d+; use budget "uniform"'),
        ("bloom", {"method": "griffin"}, "BloomForCausalLM fixes its FFN width"),
    ]:
        model = shared_model(name)
        with prune(model, sparsity=0.5, **settings) as run:
            decode(model, tokens(1, 76), 70)
        with pytest.raises(ConfigError, match=sentence):
            run.export(tmp_path / "x")
    with pytest.raises(ConfigError, match="keeps 24 to 48"):
        prune(shared_model(), masks={0: range(24)}).export(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_tokenizer_is_exported_where_it_is_known(tmp_path):
    source = write_model(tmp_path / "source")
    model, tokenizer = load(str(source))
    prune(model, masks={layer: range(8) for layer in range(4)}).export(tmp_path / "narrow")
    known = AutoTokenizer.from_pretrained(tmp_path / "narrow")
    assert known("The sky").input_ids == tokenizer("The sky").input_ids


def test_export_of_given_masks_needs_no_text_and_changes_nothing(tmp_path):
    """A Conv1D, and a model whose head is its token embedding."""
    config = tiny("qwen2").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    for model in (tiny("gpt2"), AutoModelForCausalLM.from_config(config).eval()):
        before, settings = decode(model, IDS, 8), model.config.to_dict()
        prune(model, masks=picked()).export(tmp_path)
        assert torch.equal(decode(model, IDS, 8), before) and model.config.to_dict() == settings
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert apart(_outputs(loaded)[0], _outputs(model, picked())[0]) < 1e-5
