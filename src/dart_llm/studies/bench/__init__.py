"""``bench speed`` (``study.py``) and ``tune``: candidates are timed in repetitions and scored."""
