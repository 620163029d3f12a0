"""Every text, prompt, passage and data set; what is shipped lies in ``shipped/``.

Start with ``documents.py`` for texts to measure on and ``texts.py`` for prompts.
"""
