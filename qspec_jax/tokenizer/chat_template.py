"""Chat templates: what transformers renders, without its import.

Covered are conversations of plain text, ``{"role": text, "content": text}``, up to where the assistant's answer
begins. They come out as transformers' ``apply_chat_template(add_generation_prompt=True)`` renders them; the
environment below is that of its ``utils/chat_template_utils.py``, and the tests compare the two.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_FIELDS = {"role", "content"}


def is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether :func:`render` covers a conversation: there are messages, with a text as content, and nothing else."""
    return bool(messages) and all(
        isinstance(message, Mapping) and all(key in _FIELDS and type(text) is str for key, text in message.items())
        for message in messages
    )


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """A conversation as text, up to where the assistant's answer begins.

    Args:
        template: Jinja source. It may be anybody's, and sees nothing but what is given here.
        messages: for which :func:`is_plain` holds, oldest first.
        special_tokens: variables of the template such as ``bos_token``.

    Raises:
        jinja2.TemplateError: the template is no Jinja, or refuses the messages.
    """
    return _compiled(template).render(
        messages=[dict(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **special_tokens,
    )


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    names = {"raise_exception": _refuse, "strftime_now": _time_now, "dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(template, globals=names)


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's own words for training; here they are only rendered."""

    tags = {"generation"}  # noqa: RUF012  (the base class's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, as in transformers, for its scope: what is set inside is not seen outside.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` without the attributes of a class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` without names that Python gives a meaning to."""

    def __init__(*args: Any, **values: Any) -> None:  # `self` may be one of the names
        self, *others = args
        attributes = dict(*others, **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}; use a name without leading underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _time_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
