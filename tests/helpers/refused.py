"""What a call says of inputs that it refuses, by the input: for a snapshot of the sentences."""

import pytest

from dart_llm.errors import DartError


def refused(call, inputs, kind=DartError):
    said = {}
    for given in inputs:
        with pytest.raises(kind) as caught:
            call(given)
        said[ascii(given)] = str(caught.value)
    return said
