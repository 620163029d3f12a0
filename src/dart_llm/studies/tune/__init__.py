"""``dart-llm tune``: which setting for this model?"""

from __future__ import annotations
