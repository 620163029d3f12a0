"""A run belongs to one ``generate`` at a time."""

import pytest
import torch

from dart_llm import prune
from dart_llm.errors import ConfigError
from tiny import tiny


def test_a_second_generate_is_refused_and_the_run_goes_on():
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7, 8]])
    said = []

    def again(_):
        with pytest.raises(ConfigError, match=r"let threads wait for a lock") as error:
            model.generate(ids, max_new_tokens=2)
        said.append(str(error.value))

    with prune(model, "griffin", sparsity=0.5, on_remask=again) as run:
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(said) == 1
    assert run.report().decoded_tokens == 5
