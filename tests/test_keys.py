"""Names under which finished work is kept: another name would compute it all again.

These strings are in people's folders.  A change here needs a line in the changelog.
"""

import pytest
import torch

from dart_llm import PruneConfig
from dart_llm.calibration.cache import key_of, rule_of
from dart_llm.evaluation import perplexity
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.cell import Cell
from dart_llm.models.describe import describe
from dart_llm.pruning.selection import MaskSelector
from dart_llm.session.run import BoundMethod
from tiny import tiny

pytestmark = pytest.mark.contract("keys of kept work stay")


def test_keys_of_results_and_of_what_was_learnt():
    options, changes = MeasureOptions(limit=2), {"masking_step": 3}
    cell = Cell("m", "griffin", "perplexity:embedded", 0.5, 1, options=options, overrides=changes)
    assert cell.key == "m-griffin@0.5-perplexity-embedded-decode-7a298b2eef"
    method = BoundMethod(None, None, PruneConfig.build("griffin", sparsity=0.5))
    key = perplexity.part_key(method, "text", "decode", Window(torch.arange(6), 2))
    assert key == "ppl/text/griffin@0.5/decode/0-6-2/0f840037c483c8c53acaf76b"
    assert key_of("f" * 64, "a", 1) == "ffffffffffff-155e18f16de7d2d23c7e8120662f8d7e"


@pytest.mark.parametrize(
    ("method", "name"), [("dart", "squared"), ("flap", "squared"), ("griffin", "squared_share")]
)
def test_a_score_keeps_its_name_where_its_file_moves(method, name):
    config = PruneConfig.build(method, sparsity=0.5)
    layers = describe(tiny()).weights(config.score.proxy_embedding, config.seed)
    rule = rule_of(MaskSelector(config, layers).statistics)
    assert isinstance(rule, list) and rule[0] == f"dart_llm.statistics.{name}"
