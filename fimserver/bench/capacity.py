"""Simulate a team that shares GPUs: ``fimserver bench capacity``.

Typists press the keys of ``bench keystroke --human`` (``simulated_editor.py``), each a different part of them. A
client does what fimserver does: it waits for a pause, sends one request at a time, lets later keys wait for it while
what they type may be its beginning, and shows the rest of what was offered without another request. An answer that the
typed text contradicts is thrown away and asked for again.

A GPU answers up to ``slots`` requests at the same time, the others wait. A request alone takes the time of a new place
or of a further key (the prompt's other tokens are cached, if the same GPU had a request of the typist at this place); n
at the same time take ``1 + growth * (n - 1)`` times as long. The right number of GPUs is the smallest whose 95th
percentile, from the key that was the last when a request was sent to its answer, is within the target. Answers that
are thrown away do not count; a user sees none of them.

What is assumed, not measured: the typist's pauses, the share of users who type at the same moment, how often an answer
is right and for how many keys. The last two were chosen so that one typist asks as often as in the recorded sessions of
docs/reference/results.md (2026-11-23).

Knows:   times of requests.  Never: models, HTTP.
Source:  times of published engines: see ``ENGINES``.
"""

import math
import random
import sys
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from fimserver.bench.metrics import percentile
from fimserver.bench.simulated_editor import Key, draw_pause, to_keystrokes
from fimserver.errors import FimserverError, install_command

if TYPE_CHECKING:
    import simpy

_NUM_KEYS = 2000  # of which each typist types a part
_WARM_UP_S = 5.0
_KEYS_A_RUN = 60_000
_SHORTEST_S, _LONGEST_S = 15.0, 300.0
_KEYS_PER_S = 4.6  # of the typist
_DEBOUNCE_S = 0.04
_ROUNDING_S = 1e-9
_KEYS_RIGHT = 5.0  # mean, of an answer that begins right
_HOURS_A_MONTH = 730
_MOST_FOR_EACH = 4  # GPUs for each typist


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """How fast one GPU answers: milliseconds for one request alone, and how requests at the same time slow each other.

    ``growth`` is 0 where another request costs nothing, 1 where n requests take n times as long. ``source`` says where
    the times are from.
    """

    new_place_ms: float
    further_key_ms: float
    slots: int
    growth: float
    right: float  # share of answers that begin right
    source: str


ENGINES = {
    "diffusiongemma-4090": EngineTimes(
        339,
        103,
        slots=16,
        growth=1.0,
        right=0.7,
        source="DiffusionGemma 26B-A4B, 4 bits, RTX 4090, short answers: 168 ms with 577 prompt tokens, 339 ms with "
        "2,100 (Deveraux-Parker/diffusiongemma-fieldguide); a further key is the line through both, without a prompt",
    ),
    "diffusiongemma-h100": EngineTimes(
        489,
        200,
        slots=4,
        growth=1.0,
        right=0.7,
        source="DiffusionGemma 26B-A4B, bf16, H100, whole canvases of 256: 489 ms to the first token, 1,282 tokens a "
        "second (vllm-project/recipes)",
    ),
    "qwen-0.5b-cpu": EngineTimes(
        1057,
        103,
        slots=1,
        growth=1.0,
        right=0.7,
        source="Qwen2.5-Coder-0.5B, llama.cpp's server on two CPU cores, measured (docs/explanation/engines.md)",
    ),
}


def find_times(name: str) -> EngineTimes:
    """Return published or measured times by name. Raises ``FimserverError``."""
    if name not in ENGINES:
        msg = f"there are no times named {name!r}; take one of {', '.join(ENGINES)}, and replace its times by your own"
        raise FimserverError(msg)
    return ENGINES[name]


def adapt(times: EngineTimes, **changes: float | None) -> EngineTimes:
    """Return the times with those that a user gave in place of the published ones."""
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return replace(times, **given, source=f"given on the command line; the rest: {times.source}") if given else times


@dataclass(frozen=True, slots=True)
class Row:
    """One number of users: the GPUs that they need, and what the simulation saw with so many."""

    users: int
    typing: int
    gpus: int
    outcome: "Outcome"
    usd_per_user_month: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows, and what they are based on."""

    engine: str
    times: EngineTimes
    team: "Team"
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Team:
    """The users, and what is wanted.

    ``routing`` is typist (always the same GPU, drawn at random) or least (the least busy one).
    """

    typing_share: float
    target_ms: float
    usd_per_gpu_hour: float
    routing: str
    seed: int


def plan_capacity(engine: str, times: EngineTimes, users: list[int], team: Team) -> Plan:
    """Find the GPUs for each number of users. Raises ``FimserverError`` if no number of them is enough."""
    keys = list(to_keystrokes(_NUM_KEYS))
    shown = track(users, "users", console=Console(stderr=True), disable=not sys.stderr.isatty())
    rows = [_find_row(times, number, team, keys) for number in shown]
    return Plan(engine, times, team, rows)


def _find_row(times: EngineTimes, users: int, team: Team, keys: list[Key]) -> Row:
    """Return the row for the smallest number of GPUs that is enough, by doubling and halving."""
    typing = max(1, round(users * team.typing_share))

    def run(gpus: int) -> "Outcome":
        return simulate(times, typing, gpus, team, keys)

    enough, too_few = 1, 0
    while (found := run(enough)).p95_ms > team.target_ms:
        if enough >= _MOST_FOR_EACH * typing:
            msg = (
                f"with {_MOST_FOR_EACH} GPUs for each typist 95 of 100 answers take up to {found.p95_ms:.0f} ms, and "
                f"{team.target_ms:.0f} were asked for: give a higher --target, or times of a faster engine"
            )
            raise FimserverError(msg)
        enough, too_few = min(enough * 2, _MOST_FOR_EACH * typing), enough
    while enough - too_few > max(1, enough // 50):  # within 2%
        middle = (enough + too_few) // 2
        outcome = run(middle)
        if outcome.p95_ms <= team.target_ms:
            enough, found = middle, outcome
        else:
            too_few = middle
    cost = enough * team.usd_per_gpu_hour * _HOURS_A_MONTH / users
    return Row(users, typing, enough, found, cost)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one simulation saw.

    Times are milliseconds to an answer that is shown, from the last key before its request. ``reused`` is the share of
    keys that show the rest of an earlier answer, ``wasted`` that of answers that came to nothing.
    """

    p50_ms: float
    p95_ms: float
    keys: int
    asked: int
    asked_per_s: float
    reused: float
    wasted: float
    busy: float


def simulate(  # noqa: PLR0913
    times: EngineTimes, typing: int, gpus: int, team: Team, keys: list[Key], *, seconds: float | None = None
) -> Outcome:
    """Let a number of typists share a number of GPUs for a while; the same seed gives the same outcome.

    Raises ``FimserverError`` without the package simpy.
    """
    try:
        import simpy  # noqa: PLC0415  only this command needs it
    except ImportError as error:
        msg = f"this simulation needs the package simpy; run: {install_command(extra='capacity')}"
        raise FimserverError(msg) from error
    if seconds is None:
        seconds = min(_LONGEST_S, max(_SHORTEST_S, _KEYS_A_RUN / (typing * _KEYS_PER_S)))
    world = simpy.Environment()
    rng = random.Random(team.seed)
    replicas = [Replica(world, times) for _ in range(gpus)]
    counts = Counts()
    for _ in range(typing):
        typist = _Typist(world, times, replicas, team.routing, counts, random.Random(rng.random()))
        world.process(typist.type(keys))
    world.run(until=_WARM_UP_S)
    counts.clear()
    for replica in replicas:
        replica.busy_s = 0.0
    world.run(until=_WARM_UP_S + seconds)
    waits = counts.waits_ms or [math.inf]  # nothing was answered in time to be of use
    return Outcome(
        percentile(waits, 0.5),
        percentile(waits, 0.95),
        counts.keys,
        counts.asked,
        counts.asked / seconds,
        counts.reused / max(1, counts.keys),
        counts.wasted / max(1, counts.answered),
        sum(replica.busy_s for replica in replicas) / seconds / gpus,
    )


@dataclass(slots=True)
class Counts:
    """What happened so far."""

    keys: int = 0
    asked: int = 0
    answered: int = 0
    reused: int = 0
    wasted: int = 0
    waits_ms: list[float] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything."""
        self.keys = self.asked = self.answered = self.reused = self.wasted = 0
        self.waits_ms.clear()


@dataclass(eq=False, slots=True)
class Job:
    """A request on a GPU: seconds of work that remain, and the event of its end."""

    remaining_s: float
    done: "simpy.Event"


class Replica:
    """A GPU that answers a few requests at the same time, all equally fast; the others wait in order."""

    def __init__(self, world: "simpy.Environment", times: EngineTimes) -> None:
        self._world = world
        self._times = times
        self._running: list[Job] = []
        self._waiting: list[Job] = []
        self._since = world.now
        self._turn = 0  # a timer of an earlier turn means nothing
        self.busy_s = 0.0

    @property
    def load(self) -> int:
        """Return the number of requests here."""
        return len(self._running) + len(self._waiting)

    def ask(self, work_s: float) -> Job:
        """Accept a request that takes ``work_s`` alone."""
        job = Job(work_s, self._world.event())
        self._advance()
        self._waiting.append(job)
        self._fill()
        return job

    def _slowdown(self) -> float:
        return 1 + self._times.growth * (len(self._running) - 1)

    def _advance(self) -> None:
        """Count the work that was done since the last change."""
        passed, self._since = self._world.now - self._since, self._world.now
        if self._running:
            self.busy_s += passed
            done = passed / self._slowdown()
            for job in self._running:
                job.remaining_s -= done

    def _fill(self) -> None:
        """Start what fits, and set a timer for the next end."""
        while self._waiting and len(self._running) < self._times.slots:
            self._running.append(self._waiting.pop(0))
        self._turn += 1
        if not self._running:
            return
        turn = self._turn
        wait_s = max(0.0, min(job.remaining_s for job in self._running) * self._slowdown())
        self._world.timeout(wait_s).callbacks.append(lambda _event: self._on_timer(turn))

    def _on_timer(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._advance()
        for job in [job for job in self._running if job.remaining_s <= _ROUNDING_S]:
            self._running.remove(job)
            job.done.succeed()
        self._fill()


class _Typist:
    """One typist and the client of that editor."""

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        world: "simpy.Environment",
        times: EngineTimes,
        replicas: list[Replica],
        routing: str,
        counts: Counts,
        rng: random.Random,
    ) -> None:
        self._world, self._times, self._replicas, self._counts, self._rng = world, times, replicas, counts, rng
        self._own = rng.choice(replicas) if routing == "typist" else None
        self._cached: set[Replica] = set()  # that have this typist's prompt
        self._place = 0  # number of places so far
        self._key_at = 0.0
        self._position = 0
        self._offered = 0  # keys for which what is on the screen stays right
        self._is_asking = False

    def type(self, keys: list[Key]) -> Generator["simpy.Event", Any, None]:
        """Type for ever, beginning somewhere in the keys."""
        index = self._rng.randrange(len(keys))
        yield self._world.timeout(self._rng.random())
        while True:
            key = keys[index]
            index = (index + 1) % len(keys)
            self._press(key)
            yield self._world.timeout(draw_pause(key, self._rng))

    def _press(self, key: Key) -> None:
        self._counts.keys += 1
        self._position += 1
        self._key_at = self._world.now
        if key.opens is not None:
            self._place, self._offered = self._place + 1, 0
            self._cached.clear()
        if self._offered:
            self._offered -= 1
            self._counts.reused += 1
        elif not self._is_asking:
            self._is_asking = True
            self._world.process(self._ask())

    def _ask(self) -> Generator["simpy.Event", Any, None]:
        """Wait for a pause, then ask until an answer fits what has been typed by then."""
        while (pause_s := self._key_at + _DEBOUNCE_S - self._world.now) > _ROUNDING_S:  # a further key starts it again
            yield self._world.timeout(pause_s)
        while True:
            asked_at, place, key_at = self._position, self._place, self._key_at
            replica = self._own or self._find_least_busy()
            work_ms = self._times.further_key_ms if replica in self._cached else self._times.new_place_ms
            self._cached.add(replica)
            self._counts.asked += 1
            yield replica.ask(work_ms / 1e3).done
            self._counts.answered += 1
            is_right = self._rng.random() < self._times.right
            right_for = self._rng.expovariate(1 / _KEYS_RIGHT) if is_right else 0.0
            typed = self._position - asked_at
            if typed <= right_for and place == self._place:
                self._counts.waits_ms.append((self._world.now - key_at) * 1e3)
                self._offered = int(right_for) - typed
                break
            self._counts.wasted += 1
        self._is_asking = False

    def _find_least_busy(self) -> Replica:
        """Return the GPU with the fewest requests, the first of those after one drawn at random."""
        begin = self._rng.randrange(len(self._replicas))
        return min((*self._replicas[begin:], *self._replicas[:begin]), key=lambda replica: replica.load)
