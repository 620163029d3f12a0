"""``bench speed`` (``study.py``) and ``tune``: candidates, timed in repetitions, and scored."""
