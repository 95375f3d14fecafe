"""A text with what became of each draft: coloured in a notebook or on a terminal, with marks anywhere else.

Colours are those of Okabe and Ito, which people who confuse red and green tell apart. None is alone in what it says:
rejected drafts are struck through, corrections bold, bonus tokens underlined. In HTML they tint the background that is
there, so that dark themes stay dark.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

from qspec_jax.engine.drafts import Drafts, Kind, Piece

_BAR_WIDTH = 20
# Of invisible characters, those that make up a visible one with their neighbours: joiners, and tags of flags.
_JOINERS = {"\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))}


class _Style(NamedTuple):
    """How a kind of token is shown: marks around it, what a terminal does, an element of HTML and its look."""

    marks: tuple[str, str]
    codes: str
    element: str
    css: str


def _tint(red: int, green: int, blue: int) -> str:
    return f"background-color:rgba({red},{green},{blue},0.35);color:inherit;"


# A terminal's own colours may be anything: those with a background of ours have a text of ours.
_STYLES = {
    Kind.ACCEPTED: _Style(("", ""), "38;5;16;48;5;79", "span", _tint(0, 158, 115)),
    Kind.CORRECTION: _Style(("{+", "+}"), "1;38;5;16;48;5;215", "b", _tint(230, 120, 0)),
    Kind.BONUS: _Style(("{*", "*}"), "4;38;5;16;48;5;117", "u", _tint(86, 180, 233)),
    Kind.REJECTED: _Style(("[-", "-]"), "2;9", "s", "opacity:0.65;color:inherit;"),
    Kind.CUT: _Style(("[~", "~]"), "2", "small", "opacity:0.65;color:inherit;"),
    Kind.FIRST: _Style(("", ""), "", "span", ""),
    Kind.PLAIN: _Style(("", ""), "", "span", ""),
}
_NAMES = {
    Kind.ACCEPTED: "accepted draft",
    Kind.CORRECTION: "correction",
    Kind.BONUS: "bonus token",
    Kind.REJECTED: "rejected draft",
    Kind.CUT: "accepted, beyond the end",
    Kind.FIRST: "read with the prompt",
    Kind.PLAIN: "without drafts",
}
_LEGEND = (Kind.ACCEPTED, Kind.CORRECTION, Kind.BONUS, Kind.REJECTED)
_LIKE_A_MARK = re.compile(r"(?<=[\[{])(?=[-+*~])|(?<=[-+*~])(?=[\]}])")


@dataclasses.dataclass(frozen=True, repr=False)
class DraftView:
    """What to show of a text and its drafts. Its ``repr`` is text with marks; a notebook shows it coloured.

    Attributes:
        pieces: of text, in order.
        by_position: for each place in the draft, how many drafts were accepted there, and how many made.
        note: said instead where there were no drafts.
    """

    pieces: tuple[Piece, ...]
    by_position: tuple[tuple[int, int], ...] = ()
    note: str = ""

    @classmethod
    def of(cls, drafts: Drafts) -> DraftView:
        """Of what was drafted for a sequence."""
        positions = tuple(drafts.by_position())
        note = "" if positions else "No cycle made drafts: there are none to show."
        return cls(drafts.pieces, positions, note)

    @classmethod
    def without_drafts(cls, text: str, note: str) -> DraftView:
        """Of a text that was not drafted; ``note`` says why."""
        return cls((Piece(Kind.PLAIN, text, (), 0),), note=note)

    def __repr__(self) -> str:
        """Text with marks."""
        return self.text()

    def text(self, *, color: bool = False) -> str:
        """The text with marks, or with colours of a terminal; acceptance by position below.

        Control characters of the text are escaped: a terminal would obey them.
        """
        mark = _colored if color else _marked
        body = "".join(mark(kind, text) for kind, text in _runs(self.pieces))
        return "\n".join([body, "", *self._foot(mark)]).lstrip("\n")

    def _foot(self, mark: Callable[[Kind, str], str]) -> list[str]:
        """Lines below the text."""
        if self.note:
            return [f"({_visible(self.note)})"]
        lines = ["  ".join(mark(kind, _NAMES[kind]) for kind in self._legend)]
        for place, (accepted, made) in enumerate(self.by_position, 1):
            bar = "#" * round(_BAR_WIDTH * accepted / made)
            lines.append(f"draft {place:2} {bar:.<{_BAR_WIDTH}} {accepted / made:4.0%}  {accepted} of {made} accepted")
        return lines

    @property
    def _legend(self) -> list[Kind]:
        return [*_LEGEND, *{piece.kind for piece in self.pieces} & {Kind.CUT}]

    def _repr_html_(self) -> str:
        body = "".join(map(_html_of, self.pieces))
        text = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7">{body}</div>'
        return f'<div style="font-family:monospace;max-width:60em">{text}{self._html_foot()}</div>'

    def _html_foot(self) -> str:
        if self.note:
            return f"<p style='margin:0.8em 0'><i>{html.escape(_visible(self.note))}</i></p>"
        legend = " &nbsp; ".join(_element(kind, _NAMES[kind]) for kind in self._legend)
        rows = "".join(_html_row(place, *counts) for place, counts in enumerate(self.by_position, 1))
        table = f'<table style="border-collapse:collapse;color:inherit">{rows}</table>'
        return f'<p style="margin:0.8em 0">{legend}</p>{table}'


def _runs(pieces: Iterable[Piece]) -> list[tuple[Kind, str]]:
    """Kinds and texts, neighbours of a cycle and kind joined."""
    groups = itertools.groupby(pieces, key=lambda piece: (piece.cycle, piece.kind))
    return [(kind, "".join(piece.text for piece in group)) for (_, kind), group in groups]


def _marked(kind: Kind, text: str) -> str:
    begin, end = _STYLES[kind].marks
    # What looks like a mark in the text is told apart by a backslash.
    laid_out = _laid_out(kind, text, "\\n" if begin else "")
    return begin + _LIKE_A_MARK.sub(r"\\", laid_out) + end


def _colored(kind: Kind, text: str) -> str:
    codes = _STYLES[kind].codes
    text = _laid_out(kind, text, "\u21b5" if codes else "")
    # A line feed with a background would colour the whole rest of its line.
    parts = text.split("\n")
    return "\n".join(f"\x1b[{codes}m{part}\x1b[0m" if part and codes else part for part in parts)


def _laid_out(kind: Kind, text: str, sign: str) -> str:
    """A text with a sign for its line feeds. Those of tokens that did not come break no line."""
    end = sign if kind in (Kind.REJECTED, Kind.CUT) else f"{sign}\n"
    return end.join(_visible(line) for line in text.split("\n"))


def _visible(text: str) -> str:
    """A text without characters that control where and how others are shown."""
    return "".join(char.encode("unicode_escape").decode() if _controls(char) else char for char in text)


def _controls(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS and char != "\t"


def _html_of(piece: Piece) -> str:
    kind = piece.kind
    title = f"cycle {piece.cycle}: {_NAMES[kind]}" if piece.cycle else _NAMES[kind]
    return _element(kind, _laid_out(kind, piece.text, "\u21b5" if _STYLES[kind].css else ""), title)


def _element(kind: Kind, body: str, title: str = "") -> str:
    style = _STYLES[kind]
    look = f' style="{style.css}"' if style.css else ""
    tip = f' title="{html.escape(title)}"' if title else ""
    return f"<{style.element}{look}{tip}>{html.escape(body)}</{style.element}>"


def _html_row(place: int, accepted: int, made: int) -> str:
    share = accepted / made
    bar = f'<div style="width:{share:.0%};height:0.8em;background-color:rgb(0,158,115)"></div>'
    bar = f'<div style="width:10em">{bar}</div>'
    cells = (f"draft {place}", bar, f"{share:.0%}", f"{accepted} of {made} accepted")
    return "<tr>" + "".join(f'<td style="text-align:left;padding:0 0.6em 0 0">{cell}</td>' for cell in cells) + "</tr>"
