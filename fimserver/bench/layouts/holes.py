"""Holes that a model fills correctly only if it uses one definition, at a known distance from the cursor.

    shipped_holes    ten holes in seven languages; each needs one definition near it, 600 to 1,500 tokens before it, or
                     at the top of a file, with more than 1,500 tokens in between
    read_holes       the holes of a HumanEval-Infilling file; their distances are not known

The code between is functions that a template writes, which have nothing to do with the hole.

Knows:  texts, files.  Never: tokens, engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fimserver.bench.datasets import find_files, read_items
from fimserver.datatypes import FimContext, Hole, HoleKind

_LINE = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=12)
_BLOCK = Hole(HoleKind.BLOCK, max_lines=8, estimated_tokens=32)
_SPAN = Hole(HoleKind.SPAN, max_lines=10_000, estimated_tokens=32)  # as for ``fimserver eval infilling``


class Distance(StrEnum):
    """Where the definition that a hole needs is: near it, far before it, or at the top of a long file."""

    NEAR = "near"
    FAR = "far"
    TOP = "top"
    UNKNOWN = "unknown"


_FUNCTIONS_BETWEEN = {Distance.NEAR: 0, Distance.FAR: 28, Distance.TOP: 60}
_FILLER = {
    "python": "\n\ndef step_{i}(value):\n    return value * {i} + offset_{i}(value - {j})\n",
    "typescript": "\nfunction step{i}(value: number): number {{\n  return value * {i} + offset{i}(value - {j});\n}}\n",
    "javascript": "\nfunction step{i}(value) {{\n  return value * {i} + offset{i}(value - {j});\n}}\n",
    "go": "\nfunc step{i}(value int) int {{\n\treturn value*{i} + offset{i}(value-{j})\n}}\n",
    "rust": "\nfn step_{i}(value: i64) -> i64 {{\n    value * {i} + offset_{i}(value - {j})\n}}\n",
    "java": "\n    static int step{i}(int value) {{\n        return value * {i} + offset{i}(value - {j});\n    }}\n",
    "c": "\nstatic int step_{i}(int value) {{\n    return value * {i} + offset_{i}(value - {j});\n}}\n",
}


@dataclass(frozen=True, slots=True)
class LayoutHole:
    """A context, its middle, and where the definition is that the middle needs."""

    name: str
    context: FimContext
    middle: str
    distance: Distance = Distance.UNKNOWN

    @property
    def is_line(self) -> bool:
        """Return whether the middle is (the rest of) one line."""
        return "\n" not in self.middle.strip("\n")

    def is_exact(self, text: str) -> bool:
        """Return whether an answer is the middle, except for spaces at its end."""
        return text.rstrip() == self.middle.rstrip()


@dataclass(frozen=True, slots=True)
class _Parts:
    path: str
    language_id: str
    distance: Distance
    definition: str
    before: str
    middle: str
    after: str


_HOLES = (
    _Parts(
        "parcel.py",
        "python",
        Distance.NEAR,
        "class Parcel:\n    def __init__(self, weight_grams, depth_mm):\n"
        "        self.weight_grams = weight_grams\n        self.depth_mm = depth_mm\n",
        "\n\ndef weight_in_kilograms(parcel):\n    return parcel.",
        "weight_grams / 1000",
        "\n\n\ndef depth_in_metres(parcel):\n    return parcel.depth_mm / 1000\n",
    ),
    _Parts(
        "rates.py",
        "python",
        Distance.FAR,
        "OVERNIGHT_SURCHARGE_CENTS = 1250\n",
        '\n\ndef add_surcharge(cents):\n    """Return the price with the surcharge for overnight delivery."""\n'
        "    return cents + ",
        "OVERNIGHT_SURCHARGE_CENTS",
        "\n\n\nprint(add_surcharge(100))\n",
    ),
    _Parts(
        "states.py",
        "python",
        Distance.TOP,
        'from enum import Enum\n\n\nclass Berth(Enum):\n    VACANT = "v"\n    MOORED = "m"\n    FLOODED = "f"\n',
        '\n\nNAMES = {\n    Berth.VACANT: "Vacant",\n',
        '    Berth.MOORED: "Moored",\n    Berth.FLOODED: "Flooded",',
        "\n}\n",
    ),
    _Parts(
        "invoice.ts",
        "typescript",
        Distance.NEAR,
        "interface Invoice {\n  netCents: number;\n  vatCents: number;\n}\n",
        "\nfunction grossCents(invoice: Invoice): number {\n  return invoice.netCents + invoice.",
        "vatCents;",
        "\n}\n",
    ),
    _Parts(
        "cart.js",
        "javascript",
        Distance.FAR,
        "function roundToNickel(cents) {\n  return Math.round(cents / 5) * 5;\n}\n",
        "\n// Swiss prices are rounded to five cents.\nfunction swissPrice(cents) {\n  return round",
        "ToNickel(cents);",
        "\n}\n\nmodule.exports = { swissPrice };\n",
    ),
    _Parts(
        "tide.go",
        "go",
        Distance.TOP,
        "package tide\n\ntype Gauge struct {\n\tHighWaterCm int\n\tLowWaterCm  int\n}\n",
        "\n// Range returns the difference between high and low water.\nfunc (g Gauge) Range() int {\n\treturn g.",
        "HighWaterCm - g.LowWaterCm",
        "\n}\n",
    ),
    _Parts(
        "kiln.rs",
        "rust",
        Distance.FAR,
        "enum Firing {\n    Bisque,\n    Stoneware,\n    Raku,\n}\n",
        "\nfn celsius(firing: &Firing) -> u32 {\n    match firing {\n        Firing::Bisque => 1000,\n"
        "        Firing::Stoneware => 1250,\n        Firing::",
        "Raku => 900,",
        "\n    }\n}\n",
    ),
    _Parts(
        "Ledger.java",
        "java",
        Distance.NEAR,
        "class Ledger {\n    private final int openingBalance;\n    private int turnover;\n\n"
        "    Ledger(int openingBalance) {\n        this.openingBalance = openingBalance;\n    }\n",
        "\n    int closingBalance() {\n        return openingBalance + ",
        "turnover;",
        "\n    }\n}\n",
    ),
    _Parts(
        "valve.c",
        "c",
        Distance.TOP,
        "struct valve {\n    int opening_percent;\n    int is_stuck;\n};\n",
        "\nvoid reset_valve(struct valve *valve) {\n",
        "    valve->opening_percent = 0;\n    valve->is_stuck = 0;",
        "\n}\n",
    ),
    _Parts(
        "glaze.py",
        "python",
        Distance.FAR,
        "def mix_glaze(*, silica_grams, feldspar_grams):\n    return silica_grams + feldspar_grams\n",
        "\n\ndef mix_double_glaze(silica_grams, feldspar_grams):\n    return mix_glaze(\n",
        "        silica_grams=2 * silica_grams,\n        feldspar_grams=2 * feldspar_grams,",
        "\n    )\n",
    ),
)


def shipped_holes() -> list[LayoutHole]:
    """Return the ten shipped holes."""
    return [_build(parts) for parts in _HOLES]


def _build(parts: _Parts) -> LayoutHole:
    template = _FILLER[parts.language_id]
    between = "".join(template.format(i=i, j=7 * i % 31) for i in range(1, 1 + _FUNCTIONS_BETWEEN[parts.distance]))
    prefix = parts.definition + between + parts.before
    hole = _BLOCK if "\n" in parts.middle else _LINE
    context = FimContext(prefix, parts.after, parts.path, parts.language_id, hole)
    return LayoutHole(f"{parts.path} {parts.distance}", context, parts.middle, parts.distance)


def read_holes(paths: Sequence[Path], limit: int | None) -> list[LayoutHole]:
    """Return the holes of HumanEval-Infilling files, at most ``limit`` of each. Raises ``FimserverError``."""
    return [
        LayoutHole(
            item.task_id,
            FimContext(item.prompt, item.suffix, f"{item.task_id}.py", "python", _SPAN),
            item.solution,
        )
        for path in find_files(paths)
        for item in read_items(path, limit)
    ]
