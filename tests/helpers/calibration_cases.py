"""What the tests of calibration share."""

WORDS = " ".join(f"word{i} and {i * i % 97}" for i in range(400))


class Letters:
    """A tokenizer of characters: ids 3 to 95."""

    eos_token_id = 2

    def __init__(self, bos=None, adds=False):
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if self.adds and add_special_tokens else []
        return {"input_ids": start + [3 + ord(letter) % 93 for letter in text]}
