"""What the tests of calibration share."""

from __future__ import annotations

from typing import Any

WORDS = " ".join(f"word{i} and {i * i % 97}" for i in range(400))


class Letters:
    """A tokenizer of characters: ids 3 to 95."""

    eos_token_id = 2

    def __init__(self, bos: int | None = None, adds: bool = False) -> None:
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        start = [self.bos_token_id] if self.adds and add_special_tokens else []
        return {"input_ids": start + [3 + ord(letter) % 93 for letter in text]}
