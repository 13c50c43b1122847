"""What is typed in a bench: functions of held-out standard library files, taken out of a file of 10,000 lines.

A person's pauses are an assumption, not a recording: log-normal, with a median of 180 ms (a fast typist; transcribing,
people take 240 ms on average, Dhakal et al., "Observations on Typing from 136 Million Keystrokes", CHI 2018), and of
700 ms after every tenth word and 1,200 ms after every other line, for thinking.

Knows:  files of the running Python.  Never: servers, engines.
"""

import ast
import math
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fimserver.bench.lines import HELD_OUT, read_module

NUM_LINES = 10_000
_DRAW_SEED = 5
_LONGEST_FUNCTION = 12  # lines
_KEY_S, _WORD_S, _LINE_S = 0.18, 0.7, 1.2  # medians
_SPREAD = 0.45  # standard deviation of the logarithm
_LONGEST_S = 4.0
_WORD_SHARE, _LINE_SHARE = 0.1, 0.5


@dataclass(frozen=True, slots=True)
class Key:
    """One key and where it is pressed; ``opens`` is the whole file where a new place is begun.

    ``rest`` is what is typed after it, up to the function's end.
    """

    text: str
    line: int
    column: int
    rest: str
    opens: str | None = None

    @property
    def after(self) -> tuple[int, int]:
        """Line and column behind it."""
        if self.text[0] == "\n":
            return self.line + 1, len(self.text) - 1
        return self.line, self.column + 1


def to_keystrokes(limit: float, seed: int = _DRAW_SEED) -> Iterator[Key]:
    """The same typing each time; a line's end comes with the indentation that an editor adds."""
    rng = random.Random(seed)
    while limit > 0:
        text, first, last = _draw_function(rng)
        lines = text.split("\n")
        body = "\n".join(lines[first:last])
        opens: str | None = "\n".join([*lines[:first], "", *lines[last:]])
        line, column, position = first, 0, 0
        while position < len(body) and limit > 0:
            key = body[position]
            if key == "\n":
                after = body[position + 1 :]
                key += after[: len(after) - len(after.lstrip(" "))]
            pressed = Key(key, line, column, body[position + len(key) :], opens)
            yield pressed
            opens, limit, position = None, limit - 1, position + len(key)
            line, column = pressed.after


def draw_pause(key: Key, rng: random.Random) -> float:
    """Seconds between a key and the next."""
    median = _KEY_S
    if key.text[0] == "\n":
        median = _LINE_S if rng.random() < _LINE_SHARE else _KEY_S
    elif key.text.isalnum() and not key.rest[:1].isalnum():
        median = _WORD_S if rng.random() < _WORD_SHARE else _KEY_S
    return min(_LONGEST_S, rng.lognormvariate(math.log(median), _SPREAD))


def _draw_function(rng: random.Random) -> tuple[str, int, int]:
    """A file of 10,000 lines with a held-out module in its middle, and the lines of a function of that."""
    name = rng.choice(HELD_OUT)
    module = read_module(name)
    functions = [
        node
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.FunctionDef) and 3 <= (node.end_lineno or 0) - node.lineno <= _LONGEST_FUNCTION  # noqa: PLR2004
    ]
    chosen = rng.choice(functions)
    above = _fill((NUM_LINES - module.count("\n")) // 2)
    below = _fill(NUM_LINES - module.count("\n") - len(above))
    text = "\n".join([*above, module.rstrip("\n"), *below])
    return text, len(above) + chosen.lineno - 1, len(above) + (chosen.end_lineno or chosen.lineno)


def _fill(num_lines: int) -> list[str]:
    """Lines of large modules, up to the last whole statement before the number."""
    found: list[str] = []
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("typing", "inspect", "tarfile", "pydoc", "doctest", "subprocess", "pickletools", "turtle"):
        for node in ast.parse(text := (stdlib / f"{name}.py").read_text(encoding="utf-8")).body:
            lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
            if len(found) + len(lines) > num_lines:
                return found
            found += lines
    return found
