"""Conversations as files: a line ``{"messages": [...]}``, which ``generate --prompt-file`` reads as well.

Read are also a JSON list of messages, and a message on each line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qspec_jax.decoding.values import shown
from qspec_jax.engine.prompts import read_prompt
from qspec_jax.errors import UsageError
from qspec_jax.files import json_lines
from qspec_jax.files.text import is_standard_input, read_text
from qspec_jax.files.whole import check_writable, write_whole

Message = dict[str, Any]


def write_conversation(path: Path, messages: Sequence[Message]) -> None:
    """Writes a conversation as one line; whoever is stopped leaves the old file.

    Raises:
        QSpecError: it cannot be written.
    """
    check_writable(path, option="/save")
    write_whole(path, json_lines.dumps({"messages": list(messages)}) + "\n")


def read_conversation(path: Path) -> list[Message]:
    """The messages of a file, each with its content as one text.

    Raises:
        UsageError: it cannot be read, or has no conversation, or several.
    """
    if is_standard_input(path):
        raise UsageError("/load - is no file; give the name of one")
    text = read_text(path, what="/load")
    try:
        found = _conversations(text)
    except (ValueError, RecursionError) as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f'/load {path} holds no conversation ({reason}); a line is {{"messages": [...]}}') from error
    if len(found) != 1:
        raise UsageError(f"/load {path} has {len(found)} conversations; give a file with one of them")
    messages = read_prompt(found[0], f"/load {path}")
    assert isinstance(messages, list)
    return [dict(message) for message in messages if isinstance(message, dict)]


def _conversations(text: str) -> list[list[Message]]:
    """Lists of messages.

    Raises:
        ValueError: the text is something else.
    """
    try:
        whole = [json.loads(text)]
    except json.JSONDecodeError:
        whole = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not whole:
        raise ValueError("it is empty")
    if len(whole) == 1 and isinstance(whole[0], list):
        return [_messages(whole[0])]
    if all(isinstance(one, dict) and "role" in one for one in whole):
        return [_messages(whole)]
    return [_messages(one.get("messages") if isinstance(one, dict) else one) for one in whole]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) and "role" in one for one in value):
        raise ValueError(f"{shown(value)} is no list of messages")
    if (flaw := json_lines.flaw(value)) is not None:
        raise ValueError(flaw)
    return value
