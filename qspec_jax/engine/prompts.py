"""Prompts of any kind as users give them: which kind one is, and what is wrong with it, without a tokenizer."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from qspec_jax.decoding.values import check_text, plain, shown, untraced, whole
from qspec_jax.errors import UsageError

Prompt = Any
"""A text, token ids (a list, or an array of NumPy or JAX), or the messages of a conversation. All else is refused."""

_KINDS = "a text, token ids, or a conversation (a list of messages)"
_PARTS = ("text", "input_text", "output_text")


def prompts_of(given: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list. A text, a conversation and a flat list or array of token ids are one.

    Raises:
        UsageError: there is none, or what is given holds no prompts.
    """
    if isinstance(given, str):
        return [given]
    members = _members(given, "prompts")
    if not members:
        raise UsageError("there is no prompt; give at least one")
    if all(isinstance(one, Mapping) for one in members) or all(map(_is_number, members)):
        return [members]
    return members


def read_prompt(prompt: Prompt, what: str) -> str | list[int] | list[dict[str, Any]]:
    """A prompt as what it is: a text, token ids, or messages, each with its content as one text.

    Args:
        prompt: anything.
        what: names it in errors.

    Raises:
        UsageError: it is none of these, is empty, or has half a character in it.
    """
    if isinstance(prompt, str):
        check_text(what, prompt)
        if not prompt:
            raise _empty(what)
        return str(prompt)
    members = _members(prompt, what)
    if not members:
        raise _empty(what)
    if all(isinstance(one, Mapping) for one in members):
        return [_message(one, f"message {place} of {what}") for place, one in enumerate(members, 1)]
    if any(isinstance(one, str) for one in members):
        raise UsageError(f"{what} is {shown(members)}; give each text as a prompt of its own")
    if odd := [one for one in members if not _is_number(one)]:
        raise UsageError(
            f"{what} has {shown(odd[0])} among its token ids; use whole numbers, or {_KINDS}{untraced(odd[0])}"
        )
    return [
        whole(f"a token id of {what}", one, "token ids of the model", least=-(2**63), most=2**64) for one in members
    ]


def _empty(what: str) -> UsageError:
    return UsageError(f"{what} is empty; give it some text")


def _members(given: Any, what: str) -> list[Any]:
    """What a list or an array holds: numbers of Python where it holds numbers."""
    if given is None or isinstance(given, (bytes, bytearray, Mapping, set, frozenset)):
        raise UsageError(f"{what} is {shown(given)}; use {_KINDS}")
    try:
        if hasattr(given, "__array__"):
            import numpy as np

            given = np.asarray(given)
            if given.ndim == 1 and given.dtype.kind not in "fcb":
                return given.tolist()
        return list(given)
    except Exception as error:  # it is no list, or whatever an object raises
        raise UsageError(f"{what} is {shown(given)}; use {_KINDS}{untraced(given)}") from error


def _is_number(value: Any) -> bool:
    """Whether it is a whole number, of Python or an array without dimensions."""
    if type(value) is int:  # nearly always
        return True
    try:
        value = plain(value)
        return not isinstance(value, bool) and not hasattr(value, "shape") and operator.index(value) is not None
    except Exception:
        return False


def _message(given: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """A message without what is null or has no name, and with one text as content."""
    message = {key: value for key, value in given.items() if value is not None and isinstance(key, str)}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise UsageError(f'{what} has no role, such as "user": {shown(dict(given))}')
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise UsageError(f"{what} has no content; give it a text")
    if content is not None and not isinstance(content, str):
        content = "".join(_part(part, what) for part in _parts(content, what))
    check_text(what, role)
    check_text(what, content or "")
    return {**message, "content": content or ""}


def _parts(content: Any, what: str) -> list[Any]:
    if isinstance(content, (list, tuple)):
        return list(content)
    raise UsageError(f"{what} has {shown(content)} as its content; use a text, or a list of parts that are text")


def _part(part: Any, what: str) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) and kind in _PARTS else None
    if not isinstance(text, str):
        named = f"a part of type {shown(kind)}" if isinstance(kind, str) else shown(part)
        raise UsageError(f'{what} has {named} in its content; only parts {{"type": "text", "text": ...}} are read')
    return text
