"""A tiny random GPT-2 as a folder that ``from_pretrained`` loads, with a tokenizer of letters."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tiny import CONFIGS, VOCAB

CONTEXT = 1024  # as the real GPT-2 has
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_gpt2(folder, seed=0):
    """Save the model and a tokenizer with one token per character, lower case, into ``folder``."""
    torch.manual_seed(seed)
    config = GPT2Config(**{**CONFIGS["gpt2"][1], "n_positions": CONTEXT})
    GPT2LMHeadModel(config).save_pretrained(folder)
    letters = string.ascii_lowercase + string.digits + string.punctuation + " \n"
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *letters])}
    assert len(vocabulary) <= VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return folder


def make_talk(model, tokenizer):
    """Larger weights than a new GPT-2 has, so that texts differ and pruning changes them."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(3 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        letters = model.transformer.wte.weight  # tied to the head: only letters are generated
        letters[: len(SPECIAL)] = letters[len(tokenizer) :] = 0
