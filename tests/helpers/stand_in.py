"""A small random model in the place of the default one, and one under names that the docs use."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoints import write_gguf
from dart_llm.data import texts
from dart_llm.models.cached import MEMBER, convert, scratch_folder
from dart_llm.models.cached import MODEL_SHA256 as SHA256
from dart_llm.models.gguf_file import read_gguf

VOCABULARY, CONTEXT = 512, 8192
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def write_model(folder):
    """The model in bfloat16 with a tokenizer learnt from the package's texts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts.read(name) for name in texts.subjects()], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(folder)
    return folder


def stand_in(cache):
    """Put a random file, with a token per letter, as the default model into a ``DART_CACHE``."""
    folder = cache / "dart-llm"
    folder.mkdir(parents=True)
    with scratch_folder(folder) as scratch:
        file = read_gguf(write_gguf(scratch / Path(MEMBER).name, context=4 * CONTEXT))
        convert(file, SHA256, folder, {})
