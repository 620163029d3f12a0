"""A screened head on models: exact rows, every executor, restoration, accounting, refusals."""

from dataclasses import replace

import pytest
import torch

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.calls import TokenCall
from dart_llm.models.describe import describe
from dart_llm.models.packed_loading import round_weights
from dart_llm.models.screen import WIDEST, divergence
from dart_llm.patching.executors.screened_head import EVERY
from dart_llm.pruning.config import HeadConfig, PruneConfig
from dart_llm.pruning.records import HeadReport, add_dense, bytes_limit, merge_heads, merge_reports
from dart_llm.reporting.words import bytes_sentence
from dart_llm.session.run import prune
from steps import Same, apart, decode, generate, new_cache, step
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("native")
PROMPT, IDS = 6, tokens(1, 14, seed=4)
WORDS = 2048
OWN = {"sequences": 4, "length": 32, "opening": 0, "tokens": 0}
SCREENED = {"sparsity": 0.0, "head": {"kind": "screened", "bytes": 0.4}, "self_stats": OWN}


def model_of(name="llama", dtype=torch.float32):
    return tiny(name, dtype=dtype, vocab_size=WORDS, hidden_size=64)


@torch.no_grad()
def hidden_of(model, ids):
    return model.get_decoder()(ids, use_cache=False)[0][0, PROMPT:]


@pytest.mark.parametrize(
    ("name", "executor"), [("llama", "masked"), ("gemma2", "compact"), ("gpt2", "compact")]
)
def test_exact_words_have_the_scores_of_the_head_and_others_rough_ones(name, executor):
    model = tiny("gpt2", vocab_size=WORDS, n_embd=64) if name == "gpt2" else model_of(name)
    full, states = decode(model, IDS, PROMPT), hidden_of(model, IDS)
    with prune(model, "griffin", executor=executor, **SCREENED) as run:
        result = decode(model, IDS, PROMPT)
        rough = run.patch.head.screen.rough(states)
        near = run.patch.head.screen.near(rough)
    assert torch.equal(result[:, :PROMPT], full[:, :PROMPT])  # prompts have the whole head
    cap = getattr(model.config, "final_logit_softcapping", None)
    rough = rough if cap is None else cap * torch.tanh(rough / cap)
    want = torch.where(near, full[0, PROMPT:], rough)
    assert 0 < int(near.sum()) < near.numel()
    assert apart(result[0, PROMPT:], want) < 1e-5
    assert "forward" not in model.get_output_embeddings().__dict__
    assert torch.equal(decode(model, IDS, PROMPT), full)


@pytest.mark.parametrize(
    ("name", "rows", "stored"),
    [
        ("llama", 1, "float32"),
        ("gemma2", 8, "bfloat16"),
        ("llama", 8, "q8_0"),
        ("gemma2", 1, "q8_0"),
    ],
)
def test_steps_that_read_everything_are_those_of_the_whole_head(name, rows, stored):
    model = model_of(name, torch.float32 if stored == "float32" else torch.bfloat16)
    if stored == "q8_0":
        round_weights(model, stored)
    ids = tokens(rows, PROMPT, seed=6)
    with prune(model, "griffin", sparsity=0.0, executor="native") as run:
        plain = generate(model, ids, 12)
        whole = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert run.patch.head is None
    with prune(model, "griffin", executor="native", **{**SCREENED, "head": "screened 0.8"}) as run:
        head = run.patch.head  # from now on all directions are read, and every word is exact
        head.screen = replace(head.screen, keep=64, threshold=WIDEST * 1e6)
        run.patch.whole_steps.native.set_screen(*head.screen.tensors(), 64, head.screen.threshold)
        result = generate(model, ids, 12)
        greedy = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert run.patch.steps == 2 * 11
        head = run.report().head
    assert torch.equal(result.sequences, plain.sequences) and torch.equal(greedy, whole)
    assert apart(result.logits, plain.logits) < (1e-6 if stored == "float32" else 1e-2)
    assert head.tokens == 2 * 11 * rows and head.sampled == -(-head.tokens // EVERY)
    looked, weight = head.sampled / head.tokens, model.get_output_embeddings().weight
    screen = 4 * (64 * 64 + WORDS) + WORDS * 64 // 2
    assert head.bytes_share == pytest.approx(1 + screen / weight.nbytes + looked)
    assert head.kl < 1e-3 and head.same_share == 1


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (5, torch.float32)], ids=str)
def test_a_step_scores_and_counts_as_the_head_by_itself_does(dtype, rows):
    model, ids = model_of(dtype=dtype), tokens(rows, PROMPT + 1, seed=7)
    cache = new_cache(model)
    with prune(model, "griffin", executor="native", **SCREENED) as run:
        step(model, ids[:, :PROMPT], cache)
        decoder, head = run.patch.whole_steps, run.patch.head
        logits, hidden = decoder.step(TokenCall(ids[:, PROMPT:], cache), False)
        scores, exact = head._by_kernels(hidden)
        assert torch.equal(logits, scores) and logits.shape == (rows, WORDS)
        assert sum(decoder.native.exact_words()) == exact and rows <= exact < rows * WORDS


def test_the_likeliest_word_is_that_of_the_scores_but_for_what_may_not_come():
    model = model_of("gemma2", torch.bfloat16)
    with prune(model, "griffin", executor="native", **SCREENED) as run:
        cache = new_cache(model)
        step(model, IDS[:, :PROMPT], cache)
        step(model, IDS[:, PROMPT : PROMPT + 1], cache)  # looked at
        decoder, call = run.patch.whole_steps, TokenCall(IDS[:, -1:], cache)
        scores = decoder.step(call, False)[0]
        cache.crop(-1)
        best = scores[0].topk(3).indices.tolist()
        for forbidden in ([], best[:1], best[:2]):
            result = decoder.step(replace(call, forbidden=forbidden), False)[0]
            cache.crop(-1)
            kept = scores[0].clone()
            kept[forbidden] = -torch.inf
            assert result.tolist() == [int(kept.argmax())]


def test_a_model_is_put_back_after_an_error_within_a_step():
    model = model_of(dtype=torch.bfloat16)
    round_weights(model, "q8_0")

    def fail(ids, scores):
        if ids.shape[1] == PROMPT + 4:
            raise KeyError("stop")
        return scores

    settings = {**SCREENED, "head": "screened 0.75"}
    with (
        Same(model),
        pytest.raises(KeyError),
        prune(model, "griffin", executor="native", **settings) as run,
    ):
        model.generate(IDS[:, :PROMPT], max_new_tokens=8, logits_processor=[fail])
    assert run.report().head.tokens == 4
    assert model.get_output_embeddings().weight.matrix.order() == "tiles"


def test_every_32nd_token_is_looked_at():
    model = model_of()
    full, states = decode(model, IDS, PROMPT), hidden_of(model, IDS)
    with prune(model, "griffin", executor="compact", **SCREENED) as run:
        result = decode(model, IDS, PROMPT)
        decode(model, IDS, PROMPT)
        head = run.report().head
        screen = run.patch.head.screen
        assert run.patch.head.nbytes() == 4 * 64 * 64 + 4096 * 64 // 2 + 4 * 4096 > screen.nbytes()
    assert len(states) == 8 and head.tokens == 16 and head.sampled == 1 < EVERY
    assert head.kl == pytest.approx(float(divergence(full, result)[0, PROMPT]), rel=1e-4)


def test_reports_and_limits_by_hand():
    """Of a head of 0.4 of the bytes 0.3 are read, by 30 of 40 tokens: 0.21 of all are saved."""
    first, second = HeadReport(10, 0.2, 1, 1.0, 0.001, 0.4), HeadReport(30, 0.4, 3, 0.5, 0.003, 0.4)
    assert merge_heads([None]) is None
    merged = merge_heads([first, None, second])
    assert (merged.tokens, merged.sampled) == (40, 4)
    assert merged.bytes_share == pytest.approx(0.35)
    assert merged.same_share == pytest.approx(0.625)
    assert merged.kl == pytest.approx(0.0025) and merged.share_of_bytes == pytest.approx(0.4)
    head = HeadReport(30, 0.3, 1, 1.0, 0.0, 0.4)
    assert head.read(40) == pytest.approx(0.475) and head.saved(40) == pytest.approx(0.21)
    assert head.read(30) == head.read(0) == head.read(20) == pytest.approx(0.3)
    assert bytes_limit(0.5, 0.5, 0.1, 0.21) == pytest.approx(1 / (1 - 0.2 - 0.21))
    assert bytes_limit(0.5, 0.5) == pytest.approx(1 / 0.75)


def test_a_report_counts_the_head_as_read():
    model = model_of()
    with prune(model, "griffin", executor="native", **{**SCREENED, "sparsity": 0.5}) as run:
        generate(model, IDS[:, :PROMPT], 20)
        report = run.report()
    head, view = report.head, describe(model)
    assert head.share_of_bytes == pytest.approx(4 * WORDS * 64 / view.parameter_bytes)
    assert head.tokens == report.decoded_tokens == 19
    kept = 1 - report.ffn_share_of_bytes * report.achieved_sparsity
    kept -= head.share_of_bytes * (1 - head.bytes_share)
    assert report.bytes_limit == pytest.approx(1 / kept)
    words = f"{head.bytes_share:.2f} of the output head read = {100 * (1 - kept):.0f} % fewer"
    assert words in bytes_sentence(report.to_dict())
    one = report.to_dict()
    assert merge_reports([one, one])["bytes_limit"] == pytest.approx(1 / kept)
    # as many dense tokens beside it, which read the whole head
    more = add_dense(one, 19)
    assert more["bytes_limit"] == pytest.approx(1 / (1 - (1 - kept) / 2))


def test_a_name_is_enough():
    config = PruneConfig.build("dart", head="screened")
    assert config.screens and config.head.bytes == 0.25
    assert config.replace({"head": "screened 0.2"}).head.bytes == 0.2
    assert config.replace({"head": {"bytes": 0.3}}).head == HeadConfig(kind="screened", bytes=0.3)
    assert not PruneConfig.build("dart").screens
    assert PruneConfig.from_mapping(config.to_dict()) == config
    assert PruneConfig.build("dart", head="full").to_dict() == PruneConfig.build("dart").to_dict()


def test_refusals():
    """A head with a bias, and a model that is being pruned."""
    model = model_of()
    for head, text in (
        ("half", "^head.kind = 'half': input should be 'full' or 'screened'"),
        ({"bytes": 0.0}, "^head.bytes 0.0 must be more than 0"),
        ("screened 1.5", "^head.bytes 1.5 must be at most 1"),
        ("screened much", "^head.bytes = 'much': input should be a valid"),
        ("screened 0.01", "for rough scores .* give a larger head.bytes"),
    ):
        with pytest.raises(ConfigError, match=text):
            prune(model, "griffin", sparsity=0.0, self_stats=OWN, head=head).attach()
    model = tiny("phi", vocab_size=WORDS, hidden_size=64)
    with pytest.raises(ConfigError, match=r'no plain output head.*: leave head\.kind at "full"'):
        prune(model, "griffin", **SCREENED).attach()
    model = model_of()
    with (
        prune(model, "griffin", sparsity=0.0),
        pytest.raises(AttachError, match="already being pruned"),
    ):
        prune(model, "griffin", **SCREENED).attach()
