"""``dart-llm chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import Any

from dart_llm.options import Config
from dart_llm.settings_base import merge
from dart_llm.settings_chat import ChatSettings


def chat(flags: dict[str, Any], config: Config = None) -> None:
    """Talk with a pruned model, which stays loaded; settings change while you talk.

    Answers go to stdout, everything else to stderr.  /help lists the commands: /sparsity 0.7,
    /method griffin, /stats, /save FILE, /reset, /quit.  Ctrl-C stops an answer.  Piped input is
    answered line by line.

    Examples:

    dart-llm chat --sparsity 0.3

    dart-llm chat --model Qwen/Qwen2.5-0.5B-Instruct --method griffin --temperature 0.7

    echo "Why is the sky blue?" | dart-llm chat --sparsity 0.5
    """
    from dart_llm.chat_terminal import run_chat
    from dart_llm.ui import Ui

    run_chat(merge(ChatSettings, flags, config), Ui())
