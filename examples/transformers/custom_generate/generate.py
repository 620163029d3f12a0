"""``model.generate(..., custom_generate="examples/transformers", trust_remote_code=True)``."""

from dart_llm import prune
from dart_llm.pruning.config import DEFAULT_METHOD


def generate(
    model, *args, method=DEFAULT_METHOD, sparsity=None, dart=None, on_report=None, **kwargs
):
    """Generate as ``model.generate`` does, pruned by ``prune(model, method, sparsity=sparsity)``.

    ``dart``: further settings of the method, by name.  ``on_report`` is called with the accounting.
    All other arguments, and the return value, are those of ``generate``.
    """
    with prune(model, method, sparsity=sparsity, **(dart or {})) as run:
        output = model.generate(*args, **kwargs)
    if on_report is not None:
        on_report(run.report())
    return output
