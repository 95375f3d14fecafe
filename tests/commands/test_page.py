"""``docs/commands.md`` says what the parsers say."""

from __future__ import annotations

from tests.golden import make_commands


def test_the_page_of_the_commands_is_that_of_their_parsers():
    written = make_commands.PAGE.read_text(encoding="utf-8")
    assert written == make_commands.page(), "write it anew: python -m tests.golden.make_commands"


def test_every_command_has_a_section():
    headings = {line for line in make_commands.page().splitlines() if line.startswith("## ")}
    assert headings == {f"## {prog}" for prog in (*make_commands._ABOUT, "python -m qspec_jax.harness")}
