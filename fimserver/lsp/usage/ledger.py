"""What came of completions, counted by day, language and hole, and how long they took: numbers in a file, never text.

    Statistics        counts of days; ``merge`` adds others'
    Ledger            counts what one editor sees, and adds it to the person's files now and then, in a thread
    read_statistics   the files, one a month

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
CHARACTERS_PER_TOKEN = 3.0  # of what no model wrote
MOST_MONTHS = 13
_VERSION = 1
_BIN = 1.1
_LAST_BIN = 200  # more than a day
_MONTH = len("2026-11")
_MOST_NAMES = 64  # languages of a day, and the like: an editor may name as many as it likes
_OTHER = "other"
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """Completions that were offered, and what is known to have become of them; the rest is still open.

    ``characters`` and ``tokens`` are those that were accepted and that nobody typed.
    """

    offered: int = 0
    accepted: int = 0
    rejected: int = 0
    characters: int = 0
    tokens: float = 0.0

    def add(self, other: "Tally") -> None:
        """Count another's too."""
        self.offered += other.offered
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.characters += other.characters
        self.tokens += other.tokens

    @property
    def acceptance(self) -> float | None:
        """Share of the accepted in what was decided; ``None`` where nothing was."""
        decided = self.accepted + self.rejected
        return self.accepted / decided if decided else None


@dataclass(slots=True)
class Day:
    """One day's counts."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)  # by language and hole
    times: dict[str, Counter[int]] = field(default_factory=dict)  # bins, by the completion's source
    empty: Counter[str] = field(default_factory=Counter)  # requests that got nothing, by reason

    def tally(self, language: str, hole: str) -> Tally:
        """The tally of a language and a hole."""
        key = (language, hole)
        if key not in self.tallies and len(self.tallies) >= _MOST_NAMES:
            key = (_OTHER, hole)
        return self.tallies.setdefault(key, Tally())

    def merge(self, other: "Day") -> None:
        """Count another's too."""
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
        """A day's counts, today's unless named."""
        return self.days.setdefault(name or date.today().isoformat(), Day())  # noqa: DTZ011  a person's days are local

    def merge(self, other: "Statistics") -> None:
        """Count another's too."""
        for name, day in other.days.items():
            self.day(name).merge(day)

    def by_month(self) -> "dict[str, Statistics]":
        """The same, a month each."""
        months: dict[str, Statistics] = {}
        for name, day in self.days.items():
            months.setdefault(name[:_MONTH], Statistics()).days[name] = day
        return months

    def since(self, first: str) -> "Statistics":
        """Only the days from one on."""
        return Statistics({name: day for name, day in self.days.items() if name >= first})

    def total(self) -> Day:
        """All days as one."""
        whole = Day()
        for day in self.days.values():
            whole.merge(day)
        return whole


def bin_of(ms: float) -> int:
    """The bin of a time."""
    return min(_LAST_BIN, max(0, math.floor(math.log(max(ms, 1.0), _BIN))))


def middle_of(number: int) -> float:
    """The time in the middle of a bin, in ms."""
    return float(_BIN ** (number + 0.5))


def percentile(times: Counter[int], share: float) -> float | None:
    """The time, in ms, below which a share of the counted is; ``None`` of none."""
    rank, seen = share * (times.total() - 1), 0
    for number in sorted(times):
        seen += times[number]
        if seen > rank:
            return middle_of(number)
    return None


def to_json(statistics: Statistics) -> str:
    """As it is written."""
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
    for name, said in values["days"].items():
        day = statistics.day(date.fromisoformat(name).isoformat())
        for language, holes in said["tallies"].items():
            for hole, (offered, accepted, rejected, characters, tokens) in holes.items():
                tally = Tally(_count(offered), _count(accepted), _count(rejected), _count(characters), _amount(tokens))
                day.tallies[language, hole] = tally
        for source, bins in said["times"].items():
            day.times[source] = Counter({_bin(number): _count(count) for number, count in bins.items()})
        day.empty = Counter({reason: _count(count) for reason, count in said["empty"].items()})
    return statistics


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
    """The counts of all months in a folder."""
    whole = Statistics()
    for path in sorted(folder.glob("????-??.json")):
        whole.merge(_read_month(path))
    return whole


def _read_month(path: Path) -> Statistics:
    """The counts in a file; one that is not in order is put aside, which is said in the log."""
    try:
        return from_json(read_plain(path))
    except FileNotFoundError:
        return Statistics()
    except OSError as error:
        _logger.warning("%s cannot be read (%s); it is counted anew", path, error.strerror)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _logger.warning("%s is damaged, or of a newer fimserver; it is put aside and counted anew", path)
        with suppress(OSError):
            path.replace(path.with_suffix(".damaged"))
    return Statistics()


def forget_statistics(folder: Path) -> None:
    """Delete all that was counted. Raises ``OSError``."""
    with _writing:
        for path in [*folder.glob("*.json"), *folder.glob("*.damaged")]:
            path.unlink()


_writing = threading.Lock()  # of this process' ledgers


def _add(folder: Path, more: Statistics) -> None:
    """Add counts to the files of their months; the oldest months go. Raises ``OSError``."""
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
    """What was offered at once: one completion, or several of which one may be taken."""

    language: str
    hole: str
    characters_per_token: float
    is_decided: bool = False


class Ledger:
    """What one editor's person is offered and takes."""

    def __init__(self, folder: Path, is_on: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._is_on, self._clock = folder, is_on, clock
        self._unsaved = Statistics()
        self._lock = threading.Lock()  # of what is not saved yet
        self._written_at = clock()
        self._offers: dict[str, _Offer] = {}

    def note_answer(self, source: str, ms: float) -> None:
        """A completion was sent."""
        if self._is_on():
            with self._lock:
                self._unsaved.day().times.setdefault(source, Counter())[bin_of(ms)] += 1
            self._save_now_and_then()

    def note_empty(self, reason: str) -> None:
        """A request got nothing."""
        if self._is_on():
            with self._lock:
                self._unsaved.day().empty[reason] += 1
            self._save_now_and_then()

    def note_offer(self, completions: Sequence[str], language: str, hole: str, characters_per_token: float) -> None:
        """Completions (their ids) are on the person's screen side by side, for the first time or again."""
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
        """It was accepted or rejected; of one that is accepted by and by, the first word counts as one acceptance."""
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
                tally.rejected += not accepted
        offer.is_decided = True

    def _save_now_and_then(self) -> None:
        if self._clock() - self._written_at >= WRITE_EVERY_S:
            self.save_soon()

    def save_soon(self) -> None:
        """Save in a thread: reading and writing a month takes some milliseconds. A process ends after it."""
        self._written_at = self._clock()
        threading.Thread(target=self.save, daemon=False).start()

    def save(self) -> None:
        """Add what was counted here to the files; where they cannot be written, it is kept for the next time."""
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
        """Count anew: what is not saved yet is dropped."""
        with self._lock:
            self._unsaved = Statistics()
