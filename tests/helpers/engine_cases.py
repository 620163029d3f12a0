"""What the tests of the engine share: a tokenizer for tiny models, answers, texts without it."""

import functools
import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dart_llm.engine.requests import GenerationRequest as Ask
from dart_llm.engine.requests import Sampling, Token
from dart_llm.models.checkpoint import remember_tokenizer, tokenizer_of
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.run import prune
from tiny import VOCAB, tiny, tokens

HALVES = "ÃĤ©¨¼¶"
"""Bytes that make é, è, ü, ö and others in pairs, as byte-level tokenizers spell them."""

PROMPT = tuple(tokens(1, 24)[0].tolist())

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@functools.cache
def tokenizer():
    """One token per letter or byte; 1 begins and 2 ends a text, as in the tiny models."""
    letters = string.ascii_letters + string.digits + ".,:;!?'\"()-_=+/" + "Ġ" + "Ċ" + HALVES
    names = ["<pad>", "<s>", "</s>", *letters]
    names += [f"<unused{i}>" for i in range(VOCAB - len(names))]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


@functools.cache
def own_model(name="llama"):
    """A model of these tests alone: what others taught theirs began with other words."""
    model = tiny(name)
    remember_tokenizer(model, tokenizer())
    return model


def half(method="griffin", **changes):
    return PruneConfig.build(method, sparsity=0.5, **changes)


CONFIGS = {
    "dense": None,
    "dart": half("dart"),
    "dart-prompt": half("dart-prompt"),
    "griffin": half(),
    "published": half("published"),
    "dart-token": half("dart-token"),
    "teal-attention": half("teal-attention"),
    "cats": half("cats"),
    "static": half("static"),
    "late": half("griffin", masking_step=5, release_step=20),
    "none": half("griffin").replace({"sparsity": 0.0}),
    "attention": half("griffin", drift={"rule": "paper", "signal": "attention"}, masking_step=2),
    "per row": half("griffin", batch="per_row"),
}
"""Every way to prune that the engine must keep apart; None: dense."""


def alone(model, config, ids=PROMPT, new=40):
    """The greedy tokens of ``generate`` in a block of its own, and its accounting."""

    def write():
        given = torch.tensor([ids])
        settings = {"attention_mask": torch.ones_like(given), "do_sample": False}
        made = model.generate(given, max_new_tokens=new, **settings)
        return tuple(made[0, len(ids) :].tolist())

    if config is None:
        return write(), None
    if tokenizer_of(model) is None:  # what is learnt begins with its words
        remember_tokenizer(model, tokenizer())
    with prune(model, config) as run:
        written = write()
    return written, run.report()


def ask(engine, config=None, ids=PROMPT, new=40, conversation=None, **sampling):
    """An answer and all its records."""
    records = []
    asked = Ask(ids, Sampling(max_tokens=new, **sampling), config, conversation)
    return engine.run(asked, records.append), records


def kinds(records):
    return [record.kind for record in records if record.kind != "token"]


def made_of(records):
    return [record for record in records if isinstance(record, Token)]
