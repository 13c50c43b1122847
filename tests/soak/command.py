"""``python -m tests.soak``: many editors on one daemon, and processes that are killed."""

import sys
from functools import partial

import click

from fimserver.cli.options import run_measurement
from soak.editors import NIGHTLY_EDITS, NIGHTLY_FAULTS, Summary, soak, soak_engine
from soak.trials import Trials, print_trials, try_each
from soak.windows import Manner


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--editors",
    type=click.IntRange(min=1, max=64),
    default=8,
    show_default=True,
    metavar="N",
    help="Number of editor windows.",
)
@click.option("--edits", type=click.IntRange(min=1), metavar="N", help="Edits per editor.  [default: 1000]")
@click.option("--faults", type=click.IntRange(min=0), metavar="N", help="Number of kills and stops.  [default: 10]")
@click.option("--nightly", is_flag=True, help="20,000 edits and 60 faults, which show more about memory.")
@click.option("--each", type=click.IntRange(min=1), metavar="N", help="Instead: try each fault N times.")
@click.option("--only", metavar="TEXT", help="With --each: only faults whose name contains it.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of all random choices.")
@click.option("--torn", is_flag=True, help="Edit at random, until the files are not valid code any more.")
@click.option("--hostile", is_flag=True, help="Also open documents that are hard to analyse; no kills by default.")
@click.option("--human", is_flag=True, help="Type with a user's pauses, and ask at each key.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0.1, max=100),
    default=1.0,
    show_default=True,
    metavar="X",
    help="With --human: divide the pauses by this.",
)
@click.option(
    "--engine",
    type=click.Choice(["llamacpp-server", "ollama", "openai", "vllm"]),
    help="Let a server answer that fails in every way, in place of the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    *,
    editors: int,
    edits: int | None,
    faults: int | None,
    nightly: bool,
    each: int | None,
    only: str | None,
    seed: int,
    torn: bool,
    hostile: bool,
    human: bool,
    speed: float,
    engine: str | None,
    as_json: bool,
) -> None:
    """Run many editors on one daemon, with few pauses and some kills; report what is lost, late or left over.

    Exit code 1 if there is any, or if the daemon's memory grows.
    """
    if only is not None and each is None:
        msg = "--only goes with --each"
        raise click.UsageError(msg)
    if human and (torn or each is not None):
        msg = "--human goes neither with --torn nor with --each"
        raise click.UsageError(msg)
    if each is not None:
        tried: list[Trials] = []

        def measure_each() -> Trials:
            tried.append(try_each(each, only or ""))
            return tried[0]

        run_measurement(measure_each, as_json=as_json, show=print_trials)
        sys.exit(0 if tried and tried[0].is_good else 1)
    manner = Manner(is_torn=torn, speed=speed if human else None, is_hostile=hostile)
    found: list[Summary] = []

    def measure() -> Summary:
        defaults = (NIGHTLY_EDITS, NIGHTLY_FAULTS) if nightly else (1000, 10)
        kills = 0 if hostile else defaults[1]
        length = (edits or defaults[0], kills if faults is None else faults)
        run = partial(soak_engine, engine) if engine is not None else soak
        found.append(run(editors, *length, seed, manner))
        return found[0]

    run_measurement(measure, as_json=as_json)
    sys.exit(0 if found and found[0].is_good else 1)
