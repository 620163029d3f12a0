"""Two texts read by the tiny GPT-2, whose tokens are letters."""

import torch

from dart_llm.studies.inspection.readings import Readings
from dart_llm.studies.inspection.settings import InspectSettings, InspectText
from lm_cases import loaded
from observed_cases import Recorder

A = "the tide comes in twice a day because the moon pulls at the water of the sea. " * 2
B = "11 + 22 = 33; 44 - 12 = 32; 9 * 9 = 81; 100 / 4 = 25; (3 + 4) * 5 = 35; 7 * 8 = 56! " * 2


def read(a=A, b=B, **settings):
    texts = [InspectText(label, label, t) for label, t in zip("AB", (a, b), strict=True) if t]
    given = {"method": "griffin", "sparsity": 0.5, **settings}
    return Readings(*loaded(), InspectSettings(**given), texts)


def seen(text, layer):
    """u, z, r, x of one layer by hooks of our own, [T, width] float64."""
    model, tokenizer = loaded()
    recorder = Recorder(model)
    with torch.no_grad():
        model(tokenizer(text, return_tensors="pt").input_ids)
    for handle in recorder.handles:
        handle.remove()
    found = {key: recorder.get(layer, key) for key in ("u", "z", "r")}
    return {**found, "x": recorder.get(layer, "output") - found["r"]}
