"""Print to the terminal: texts from outside are never markup, and their control characters are visible.

    echo           print lines
    make_console   a console for tables and colours
    plain          a text as it is shown

A file may be called ``[id].tsx``, or a model's licence hold the code that clears the screen.

Knows:  click, rich.  Never: what is printed.
"""

from typing import TYPE_CHECKING, Any

import click

from fimserver.text import to_printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def plain(text: str) -> str:
    """Return a text with its control characters visible, except line ends and tabs."""
    return "\n".join("\t".join(map(to_printable, line.split("\t"))) for line in text.split("\n"))


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a text to standard output, or to stderr."""
    click.echo(plain(str(text)), err=err)


def make_console(**options: Any) -> "Console":
    """Return a console that takes no text for markup, neither in tables; ``options`` are those of rich."""
    from rich.console import Console  # noqa: PLC0415  only some commands import it

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> "Text":
            return super().render_str(plain(text), **{**options, "markup": False, "emoji": False})

    return PlainConsole(**{"highlight": False, "markup": False, "emoji": False, **options})
