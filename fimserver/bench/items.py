"""Items of HumanEval-Infilling (github.com/openai/human-eval-infilling), read from files that are there.

The benchmark's four files are ``HumanEval-SingleLineInfilling.jsonl.gz``, ``HumanEval-MultiLineInfilling.jsonl.gz``,
``HumanEval-RandomSpanInfilling.jsonl.gz`` and ``HumanEval-RandomSpanInfillingLight.jsonl.gz``. An item's kind stands
before the first slash of its ``task_id``. Nothing is downloaded.

Knows:  files, fields.  Never: engines.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fimserver.errors import FimserverError

KINDS = {
    "SingleLineInfilling": "single-line",
    "MultiLineInfilling": "multi-line",
    "RandomSpanInfilling": "random-span",
    "RandomSpanInfillingLight": "random-span-light",
}
OTHER = "other"
_PATTERNS = ("HumanEval-*.jsonl", "HumanEval-*.jsonl.gz")


@dataclass(frozen=True, slots=True)
class Item:
    """One hole and what stood in it; ``test`` defines ``check``, which is called with ``entry_point``."""

    task_id: str
    prompt: str
    suffix: str
    solution: str
    entry_point: str = ""
    test: str = ""

    @property
    def kind(self) -> str:
        """Which of the benchmark's four it belongs to, or ``other``."""
        return KINDS.get(self.task_id.split("/", 1)[0], OTHER)

    def to_program(self, middle: str) -> str:
        """The whole program with its tests, as the benchmark puts it together."""
        return f"{self.prompt}{middle}{self.suffix}\n{self.test}\ncheck({self.entry_point})\n"


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and the benchmark's own in the folders named. Raises ``FimserverError`` for a bare folder."""
    found: dict[Path, None] = {}
    for path in paths:
        files = sorted(f for p in _PATTERNS for f in path.glob(p)) if path.is_dir() else [path]
        if not files:
            msg = f"{path} holds no file {' or '.join(_PATTERNS)}"
            raise FimserverError(msg)
        found |= dict.fromkeys(files)
    return list(found)


def read_items(path: Path, limit: int | None, *, tests: bool = False) -> Iterator[Item]:
    """Items of a ``.jsonl`` or ``.jsonl.gz`` file, with their tests where those are wanted.

    Raises ``FimserverError`` naming the line.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read ({error}); it has to be .jsonl or .jsonl.gz in UTF-8"
        raise FimserverError(msg) from error
    count = 0
    for number, line in enumerate(text.split("\n"), 1):
        if count == limit:
            return
        if not line.strip():
            continue
        count += 1
        try:
            yield _to_item(json.loads(line), tests=tests)
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{path}, line {number} is no HumanEval-Infilling item ({error!r})"
            raise FimserverError(msg) from error


def _to_item(values: dict[str, str], *, tests: bool) -> Item:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what is no item."""
    names = ["task_id", "prompt", "suffix", "canonical_solution", *(["entry_point", "test"] if tests else [])]
    for name in names:
        if not isinstance(values[name], str):
            msg = f"{name} is no text"
            raise TypeError(msg)
    if tests and not values["entry_point"].isidentifier():
        msg = "entry_point is no name"
        raise ValueError(msg)
    return Item(*(values[name] for name in names))
