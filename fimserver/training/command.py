"""Run ``fimserver train``: read the corpus, train with a progress bar, report and plot the losses.

Knows:  the trainer, the terminal.  Never: LSP.
"""

import argparse
import contextlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fimserver.checkpoints.installed import find_model
from fimserver.engine.loading.weights import read_config
from fimserver.engine.modeling.model import find_device
from fimserver.errors import FimserverError
from fimserver.paths import use_private_caches
from fimserver.training.corpus import default_folder, read_documents, read_held_out
from fimserver.training.experiments import EXPERIMENTS, find_experiment, run_experiment, to_table
from fimserver.training.learning_rate import Budget
from fimserver.training.recipe import SHAPE, Recipe
from fimserver.training.run_state import MODEL_FOLDER, has_begun, prepare_base, read_recipe, shape_of
from fimserver.training.trainer import LOG_FILE, Machine, Material, Trainer

_GPU_ROWS = {"rows_per_step": 64, "rows_at_once": 32}  # a GPU would idle with a CPU's few rows
LOCK_FILE = "lock"
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GPU_WORKERS = 8  # processes that make rows
_REPORT_STEPS = 50  # between log lines, without a terminal for a progress bar

LOSSES_FILE = "losses.png"
_TRAINED = ("next_token", "denoise", "denoise_later")
_SMOOTHING = 0.9


def write_losses(log: Path) -> Path | None:
    """Plot training losses (smoothed) and held-out losses over positions, next to the log.

    Returns the plot's path, or ``None`` if nothing was plotted.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  optional
    except ImportError:
        return None
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(_TRAINED):
        found = [(entry["positions"] / 1e6, entry[name]) for entry in entries if name in entry]
        if found:
            axes.plot([x for x, _ in found], _smooth([y for _, y in found]), color=f"C{index}", label=name)
        held = [(e["positions"] / 1e6, e[f"held_{name}"]) for e in entries if f"held_{name}" in e]
        if held:
            axes.plot(
                *zip(*held, strict=True), color=f"C{index}", linestyle="--", marker=".", label=f"{name}, held out"
            )
    if not axes.lines:
        return None
    axes.set(xlabel="million positions", ylabel="nats a token")
    axes.legend()
    path = log.with_name(LOSSES_FILE)
    figure.savefig(path, dpi=120)
    return path


def _smooth(values: list[float]) -> list[float]:
    smooth, mean = [], values[0]
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smooth.append(mean)
    return smooth


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run; losses are of held-out rows, in nats per token."""

    model: str
    steps: int
    positions: int
    hours: float
    held_next_token: float
    held_middle: float
    held_denoise: float
    held_denoise_later: float
    drafted: float


def train_model(  # noqa: PLR0913  one parameter per option
    folder: Path,
    *,
    hours: float | None,
    steps: int | None,
    source: str,
    fresh: bool,
    pairs: tuple[str, ...],
    corpus: Path | None,
    device: str,
    threads: int,
) -> Summary:
    """Train until the budget is spent. Raises ``FimserverError``."""
    place = find_device(device)
    material = _read_material(corpus)
    recipe = _choose_recipe(folder, pairs, on_gpu=place.type == "cuda")
    machine = Machine(str(place), threads=threads, workers=_GPU_WORKERS if place.type == "cuda" else 1)
    begins = not has_begun(folder)
    if not (fresh and begins):
        _check_shape(pairs, recipe, folder / MODEL_FOLDER if not begins else find_model(source))
    with _only_one(folder):
        base = source
        if fresh and begins and recipe.vocabulary != read_config(find_model(source)).get_text_config().vocab_size:
            base = str(prepare_base(folder / "base", source, material.documents, recipe.vocabulary))
        trainer = Trainer.prepare(folder, recipe, material, machine, None if fresh else source, base=base)
        with _progress() as show, _stop_on_signal() as stopped:
            held_out = trainer.run(Budget(hours, steps), on_step=show, interrupted=lambda _state: bool(stopped))
        write_losses(folder / LOG_FILE)
    state = trainer.state
    return Summary(
        model=str(folder / MODEL_FOLDER),
        steps=state.step,
        positions=state.positions,
        hours=state.seconds / 3600,
        held_next_token=held_out.held_next_token,
        held_middle=held_out.held_middle,
        held_denoise=held_out.held_denoise,
        held_denoise_later=held_out.held_denoise_later,
        drafted=held_out.drafted,
    )


def _read_material(corpus: Path | None) -> Material:
    folder = corpus or default_folder()
    return Material(read_documents(folder), read_held_out(folder))


def _choose_recipe(folder: Path, pairs: tuple[str, ...], *, on_gpu: bool) -> Recipe:
    """Return the recipe of a resumed run, or the default with the machine's number of rows at once."""
    known = read_recipe(folder)
    try:
        recipe = Recipe().with_values(known or (_GPU_ROWS if on_gpu else {}))
    except FimserverError as error:
        msg = f"{folder} was begun by another version ({error}); continue elsewhere: --from {folder / MODEL_FOLDER}"
        raise FimserverError(msg) from error
    at_once = _GPU_ROWS["rows_at_once"] if on_gpu else Recipe().rows_at_once
    return recipe.with_values({"rows_at_once": math.gcd(recipe.rows_per_step, at_once)}).with_pairs(pairs)


def _check_shape(pairs: tuple[str, ...], recipe: Recipe, weights: Path) -> None:
    """Raise ``FimserverError`` if a requested shape is not that of the weights."""
    asked = {name: getattr(recipe, name) for name in SHAPE if any(pair.startswith(f"{name}=") for pair in pairs)}
    known = shape_of(read_config(weights), recipe)
    for name, value in asked.items():
        if value != getattr(known, name):
            msg = f"{name}={value}: the weights of {weights} have {getattr(known, name)}; --fresh begins with none"
            raise FimserverError(msg)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock a folder against other training processes. Raises ``FimserverError``."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            yield
    except Timeout as error:
        msg = f"another process trains in {folder}; end it, or choose another folder"
        raise FimserverError(msg) from error


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[float, Mapping[str, Any]], None]]:
    """Yield a function that reports progress: a bar on a terminal, otherwise a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("training", total=1.0)

        def show(share: float, entry: Mapping[str, Any]) -> None:
            text = "  ".join(f"{name} {entry[name]}" for name in ("step", "next_token", "denoise") if name in entry)
            progress.update(task, completed=share, description=text)
            if progress.disable and entry["step"] % _REPORT_STEPS == 0:
                console.print(f"{share:.0%}  {text}  {entry['positions'] / max(1.0, entry['seconds']):.0f} positions/s")

        yield show


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Let Ctrl-C end a run after its step; the same command continues the run from a complete checkpoint."""
    received: list[int] = []
    known = {number: signal.signal(number, lambda n, _frame: received.append(n)) for number in _ENDING_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in known.items():
            signal.signal(number, handler)


def list_experiments() -> list[str]:
    """Return one line per experiment."""
    return [f"{name:16} {e.question}  ({', '.join(e.variants)})" for name, e in EXPERIMENTS.items()]


def run_experiments(
    names: Sequence[str], *, operations: float, source: str, corpus: Path | None, threads: int
) -> list[str]:
    """Run every variant of the named experiments; return Markdown tables. Raises ``FimserverError``."""
    for name in names:
        find_experiment(name)  # fail on a wrong name before hours of training
    material = _read_material(corpus)
    console, lines = Console(stderr=True), []
    for name in names:
        outcomes = run_experiment(
            name,
            material,
            operations=operations,
            source=source,
            machine=Machine(threads=threads),
            report=lambda o: console.print(f"{o.experiment} {o.variant}: {o.seconds:.0f} s", o.held_out),
        )
        console.print("\n".join(to_table(outcomes)), soft_wrap=True)
        lines += [f"{name}: {EXPERIMENTS[name].question}", "", *to_table(outcomes), ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run experiments from the command line: for those who train models, not a command of users."""
    parser = argparse.ArgumentParser(prog="python -m fimserver.training.command", description=run_experiments.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; without any, list them")
    parser.add_argument("--operations", type=float, default=2e13, metavar="N", help="FLOPs of each run (2e13)")
    parser.add_argument("--from", dest="source", default="tiny", metavar="NAME|FOLDER", help="weights to start from")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="folder of the corpus")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="most CPU threads; 0 uses all cores")
    given = parser.parse_args(arguments)
    if not given.names:
        print("\n".join(list_experiments()))  # noqa: T201  its output
        return 0
    try:
        use_private_caches()
        lines = run_experiments(
            given.names,
            operations=given.operations,
            source=given.source,
            corpus=given.corpus,
            threads=given.threads,
        )
    except FimserverError as error:
        print(f"fimserver: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print("\n".join(lines))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
