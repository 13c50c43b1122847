"""Count the fate of completions by day, language and hole, and their times: numbers in a file, never text.

    Statistics        counts of days; ``merge`` adds others'
    Ledger            counts for one editor, and adds to the user's files now and then, in a thread
    read_statistics   read the files, one per month

Times are counted in bins, each 10% wider than the last; a percentile is the middle of its bin.

Knows:  names of languages, holes and reasons, files.  Never: texts, LSP.
"""

import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from fimserver.paths import read_plain, write_private

FOLDER_NAME = "statistics"
WRITE_EVERY_S = 30.0
CHARACTERS_PER_TOKEN = 3.0  # for completions that no model wrote
MOST_MONTHS = 13
_VERSION = 1
_BIN = 1.1
_LAST_BIN = 200  # more than a day
_MONTH = len("2026-11")
_MOST_NAMES = 64  # languages per day, for instance: an editor may name any number
_OTHER = "other"
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """Completions that were offered, used and rejected; the rest is undecided.

    ``accepted`` counts all that were used: accepted with a key, or typed out (``typed_out`` of them).
    ``characters`` and ``tokens`` are those that were accepted instead of typed.
    """

    offered: int = 0
    accepted: int = 0
    rejected: int = 0
    characters: int = 0
    tokens: float = 0.0
    typed_out: int = 0

    def add(self, other: "Tally") -> None:
        """Add another tally."""
        self.offered += other.offered
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.characters += other.characters
        self.tokens += other.tokens
        self.typed_out += other.typed_out

    @property
    def acceptance(self) -> float | None:
        """Return the share of the decided completions that were accepted or typed out; ``None`` without any."""
        decided = self.accepted + self.rejected
        return self.accepted / decided if decided else None


@dataclass(slots=True)
class Day:
    """One day's counts."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)  # by language and hole
    times: dict[str, Counter[int]] = field(default_factory=dict)  # counts of bins, by the completion's source
    empty: Counter[str] = field(default_factory=Counter)  # requests without a completion, by reason

    def tally(self, language: str, hole: str) -> Tally:
        """Return the tally of a language and a hole."""
        key = (language, hole)
        if key not in self.tallies and len(self.tallies) >= _MOST_NAMES:
            key = (_OTHER, hole)
        return self.tallies.setdefault(key, Tally())

    def merge(self, other: "Day") -> None:
        """Add another day's counts."""
        for (language, hole), tally in other.tallies.items():
            self.tally(language, hole).add(tally)
        for source, times in other.times.items():
            self.times.setdefault(source, Counter()).update(times)
        self.empty.update(other.empty)


@dataclass
class Statistics:
    """Counts by day (ISO, local time)."""

    days: dict[str, Day] = field(default_factory=dict)

    def day(self, name: str | None = None) -> Day:
        """Return a day's counts, today's by default."""
        return self.days.setdefault(name or date.today().isoformat(), Day())  # noqa: DTZ011  days are the user's local ones

    def merge(self, other: "Statistics") -> None:
        """Add other statistics."""
        for name, day in other.days.items():
            self.day(name).merge(day)

    def by_month(self) -> "dict[str, Statistics]":
        """Return the statistics of each month."""
        months: dict[str, Statistics] = {}
        for name, day in self.days.items():
            months.setdefault(name[:_MONTH], Statistics()).days[name] = day
        return months

    def since(self, first: str) -> "Statistics":
        """Return the days from ``first`` on."""
        return Statistics({name: day for name, day in self.days.items() if name >= first})

    def total(self) -> Day:
        """Return the sum of all days."""
        whole = Day()
        for day in self.days.values():
            whole.merge(day)
        return whole


def bin_of(ms: float) -> int:
    """Return the bin of a time."""
    return min(_LAST_BIN, max(0, math.floor(math.log(max(ms, 1.0), _BIN))))


def middle_of(number: int) -> float:
    """Return the time in the middle of a bin, in ms."""
    return float(_BIN ** (number + 0.5))


def percentile(times: Counter[int], share: float) -> float | None:
    """Return the time in ms below which a share of the counted times is; ``None`` if none was counted."""
    rank, seen = share * (times.total() - 1), 0
    for number in sorted(times):
        seen += times[number]
        if seen > rank:
            return middle_of(number)
    return None


def to_json(statistics: Statistics) -> str:
    """Return the statistics as JSON, the format of the files."""
    days: dict[str, Any] = {}
    for name, day in sorted(statistics.days.items()):
        tallies: dict[str, dict[str, Any]] = {}
        for (language, hole), tally in day.tallies.items():
            tallies.setdefault(language, {})[hole] = astuple(tally)
        times = {source: {str(number): count for number, count in bins.items()} for source, bins in day.times.items()}
        days[name] = {"tallies": tallies, "times": times, "empty": day.empty}
    return json.dumps({"version": _VERSION, "days": days})


def from_json(text: str) -> Statistics:
    """Read what ``to_json`` wrote. Raises ``ValueError``, ``TypeError``, ``KeyError``, ``AttributeError``."""
    values = json.loads(text)
    if values["version"] != _VERSION:
        msg = "of another version"
        raise ValueError(msg)
    statistics = Statistics()
    for name, given in values["days"].items():
        day = statistics.day(date.fromisoformat(name).isoformat())
        for language, holes in given["tallies"].items():
            for hole, counts in holes.items():
                day.tallies[language, hole] = _to_tally(*counts)
        for source, bins in given["times"].items():
            day.times[source] = Counter({_bin(number): _count(count) for number, count in bins.items()})
        day.empty = Counter({reason: _count(count) for reason, count in given["empty"].items()})
    return statistics


def _to_tally(  # noqa: PLR0913, PLR0917  in the order of the file
    offered: Any, accepted: Any, rejected: Any, characters: Any, tokens: Any, typed_out: Any = 0
) -> Tally:
    """Return a tally of a file; earlier versions did not count what was typed out."""
    first, second, third, fourth = map(_count, (offered, accepted, rejected, characters))
    return Tally(first, second, third, fourth, _amount(tokens), _count(typed_out))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        msg = "not a count"
        raise ValueError(msg)
    return value


def _bin(text: str) -> int:
    number = int(text)
    if not 0 <= number <= _LAST_BIN:
        msg = "not a bin"
        raise ValueError(msg)
    return number


def _amount(value: Any) -> float:
    if type(value) not in {int, float} or not 0 <= value < math.inf:
        msg = "not an amount"
        raise ValueError(msg)
    return float(value)


def read_statistics(folder: Path) -> Statistics:
    """Return the counts of all months in a folder."""
    whole = Statistics()
    for path in sorted(folder.glob("????-??.json")):
        whole.merge(_read_month(path))
    return whole


def _read_month(path: Path) -> Statistics:
    """Return the counts in a file; a damaged one is moved aside, with a warning in the log."""
    try:
        return from_json(read_plain(path))
    except FileNotFoundError:
        return Statistics()
    except OSError as error:
        _logger.warning("%s cannot be read (%s); its counts start over", path, error.strerror)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _logger.warning("%s is damaged or from a newer fimserver; it was moved aside and its counts start over", path)
        with suppress(OSError):
            path.replace(path.with_suffix(".damaged"))
    return Statistics()


def forget_statistics(folder: Path) -> None:
    """Delete all counts. Raises ``OSError``."""
    with _writing:
        for path in [*folder.glob("*.json"), *folder.glob("*.damaged")]:
            path.unlink()


_writing = threading.Lock()  # held by one ledger of this process at a time


def _add(folder: Path, more: Statistics) -> None:
    """Add counts to the files of their months, and delete the oldest months. Raises ``OSError``."""
    with _writing:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for month, counts in more.by_month().items():
            path = folder / f"{month}.json"
            merged = _read_month(path)
            merged.merge(counts)
            write_private(path, to_json(merged))
        for path in sorted(folder.glob("????-??.json"))[:-MOST_MONTHS]:
            path.unlink()


@dataclass(eq=False, slots=True)
class _Offer:
    """One completion, or several offered together, of which one may be accepted."""

    language: str
    hole: str
    characters_per_token: float
    is_decided: bool = False


class Ledger:
    """The counts of one editor."""

    def __init__(self, folder: Path, is_on: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._is_on, self._clock = folder, is_on, clock
        self._unsaved = Statistics()
        self._lock = threading.Lock()  # guards counts that are not saved yet
        self._written_at = clock()
        self._offers: dict[str, _Offer] = {}

    def note_answer(self, source: str, ms: float) -> None:
        """Count a request answered with a completion."""
        if self._is_on():
            with self._lock:
                self._unsaved.day().times.setdefault(source, Counter())[bin_of(ms)] += 1
            self._save_now_and_then()

    def note_empty(self, reason: str) -> None:
        """Count a request answered with nothing."""
        if self._is_on():
            with self._lock:
                self._unsaved.day().empty[reason] += 1
            self._save_now_and_then()

    def note_offer(self, completions: Sequence[str], language: str, hole: str, characters_per_token: float) -> None:
        """Count completions (their ids) that are shown together, for the first time or again."""
        if not self._is_on():
            return
        known = next((self._offers[name] for name in completions if name in self._offers), None)
        offer = known or _Offer(language, hole, characters_per_token or CHARACTERS_PER_TOKEN)
        self._offers.update(dict.fromkeys(completions, offer))
        while len(self._offers) > _MOST_NAMES:
            del self._offers[next(iter(self._offers))]
        if known is None:
            with self._lock:
                self._unsaved.day().tally(language, hole).offered += 1

    def note_decision(self, completion: str, *, accepted: bool, characters: int) -> None:
        """Count an acceptance or rejection; a completion accepted word by word counts once, at its first word."""
        offer = self._offers.get(completion)
        if offer is None or not self._is_on():
            return
        with self._lock:
            tally = self._unsaved.day().tally(offer.language, offer.hole)
            if accepted:
                tally.characters += characters
                tally.tokens += round(characters / offer.characters_per_token, 2)
            if not offer.is_decided:
                tally.accepted += accepted
                tally.typed_out += accepted and not characters
                tally.rejected += not accepted
        offer.is_decided = True

    def _save_now_and_then(self) -> None:
        if self._clock() - self._written_at >= WRITE_EVERY_S:
            self.save_soon()

    def save_soon(self) -> None:
        """Save in a thread: reading and writing a month takes some milliseconds. A process ends only after it."""
        self._written_at = self._clock()
        threading.Thread(target=self.save, daemon=False).start()

    def save(self) -> None:
        """Add the counts to the files; counts that cannot be written are kept for the next time."""
        self._written_at = self._clock()
        with self._lock:
            counted, self._unsaved = self._unsaved, Statistics()
        if not counted.days:
            return
        try:
            _add(self._folder, counted)
        except OSError as error:
            _logger.warning("statistics cannot be written to %s: %s", self._folder, error.strerror)
            with self._lock:
                counted.merge(self._unsaved)
                self._unsaved = counted

    def forget(self) -> None:
        """Drop counts that are not saved yet."""
        with self._lock:
            self._unsaved = Statistics()
