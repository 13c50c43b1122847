"""Define the ``fimserver`` command.

    lsp        serve an editor over stdio
    daemon     the background process that serves all editors: start, stop, status, logs
    explain    why requests got a completion or none; report: a bug report
    stats      how many completions were offered and accepted, and how long they took
    complete   complete at one position of a file
    eval       measure quality
    bench      measure time
    train      train a model of the shipped model's size
    corpus     collect the files that the shipped model is trained on
    quantize   write a model with 4-bit weights
    model      add published models by name, list and remove them
    doctor     check the installation and the model

Exit codes: 0 done, 1 nothing to complete or a check failed (the reason is on stderr), 2 wrong use.
Standard output is for results; progress, reasons and logs go to stderr.
"""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fimserver import __version__
from fimserver.cli.bench import bench, evaluate
from fimserver.cli.daemon import daemon, explain, report, stats
from fimserver.cli.engine import engine
from fimserver.cli.model import model, quantize_model
from fimserver.cli.options import (
    decoding_options,
    engine_options,
    exit_on_error,
    open_option,
    read_options,
    run_measurement,
    set_option,
    to_overrides,
    with_progress,
)
from fimserver.cli.terminal import echo
from fimserver.errors import FimserverError, PathError
from fimserver.paths import use_private_caches
from fimserver.settings import ENGINES, Settings

_USES_TORCH = {"bench", "eval", "quantize", "train"}  # in this process


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fimserver")
def main() -> None:
    """Complete code on your own machine with a text-diffusion model that fills the middle."""
    try:
        use_private_caches()
    except PathError as error:
        if click.get_current_context().invoked_subcommand in _USES_TORCH:
            echo(f"fimserver: {error}", err=True)
            sys.exit(1)


for command in (bench, daemon, engine, evaluate, explain, model, quantize_model, report, stats):
    main.add_command(command)


@main.command(short_help="Serve one editor over stdio.")
@click.option(
    "--no-daemon",
    is_flag=True,
    help="Serve this editor in a process of its own, without the daemon: for containers and for debugging.",
)
@click.option("--stdio", is_flag=True, hidden=True)  # some editors' clients add this option
@engine_options
def lsp(no_daemon: bool, stdio: bool, **options: Any) -> None:  # noqa: ARG001, FBT001  click passes flags by name
    """Serve one editor over stdio (LSP 3.18, textDocument/inlineCompletion) through the shared daemon."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="fimserver: %(levelname)s %(message)s")
    from fimserver.daemon.stdio import serve  # noqa: PLC0415

    if sys.stdin.isatty():
        echo("fimserver lsp waits for an editor on stdin; see README.md, or try: fimserver complete", err=True)
    sys.exit(serve(to_overrides(options), has_daemon=not no_daemon))


@main.command(
    short_help="Complete at one position of a file.", context_settings={"ignore_unknown_options": True}
)  # click would read -:LINE:COL as an option
@click.argument("target", metavar="FILE:LINE:COL")
@click.option("--path", metavar="NAME", help="File name of the text on standard input (if FILE is -).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trace", is_flag=True, help="Show the hole, the context, the prompt, every canvas and timings.")
@click.option("--watch", is_flag=True, help="Complete again each time the file is saved, until Ctrl-C.")
@set_option
@open_option
@decoding_options
@engine_options
def complete(  # noqa: PLR0913, PLR0917  one parameter per option
    target: str,
    path: str | None,
    as_json: bool,  # noqa: FBT001  click passes flags by name
    trace: bool,  # noqa: FBT001
    watch: bool,  # noqa: FBT001
    pairs: tuple[str, ...],
    others: tuple[str, ...],
    **options: Any,
) -> None:
    """Complete at LINE:COL of FILE, for instance app.py:12:5; FILE - reads standard input.

    Lines and columns count from 1, columns in characters. The end of a line is its length plus 1. With --json the trace
    goes to standard error.

    With --watch, FILE alone is enough: each save completes where it changed the text.
    """
    from fimserver.cli.complete import Target, complete_target, parse_file, parse_target, print_outcome, read_others  # noqa: PLC0415

    settings = read_options(options, pairs, seed=None)  # no seed, as in an editor
    if watch and target.startswith("-:"):
        msg = "--watch cannot read standard input; name a file"
        raise click.UsageError(msg)
    try:
        in_file = watch and Path(target).is_file()
        place: Target = parse_file(target) if in_file else parse_target(target, path, sys.stdin.buffer)
        documents = read_others(others)
    except FimserverError as error:
        raise click.UsageError(str(error)) from error
    if watch:
        _watch(place, settings, documents, as_json=as_json)
        return
    with exit_on_error():
        outcome = complete_target(place, settings, trace=trace, others=documents)
    print_outcome(outcome, place, as_json=as_json, trace=trace)
    sys.exit(0 if outcome.completion is not None else 1)


def _watch(place: Any, settings: Settings, others: Any, *, as_json: bool) -> None:
    from fimserver.cli.watch import watch_file  # noqa: PLC0415

    with exit_on_error():
        try:
            watch_file(place, settings, as_json=as_json, others=others)
        except KeyboardInterrupt:
            echo(err=True)


@main.command()
@engine_options
@click.option(
    "--gpu",
    "--card",
    "gpu",
    metavar="NAME",
    help='Plan memory and times of --model on a GPU: "RTX 5090", auto (of this machine), all (a line for each of the '
    "table) or cpu. --card is the same.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Memory of the GPU: with --bandwidth of one that is not in the table; or chooses among products of one name.",
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/s",
    help="Memory bandwidth of the GPU, as --memory.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Denoising steps of a request in the plan. [default: 20, the median of code]",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Prompt length of the plan's memory. [default: 8192, or the model's limit]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@set_option
def doctor(  # noqa: PLR0913, PLR0917  one parameter per option
    gpu: str | None,
    memory: float | None,
    bandwidth: float | None,
    steps: int | None,
    context: int | None,
    as_json: bool,  # noqa: FBT001
    pairs: tuple[str, ...],
    **options: Any,
) -> None:
    """Check the installation. Each failed check says how to fix it.

    With --gpu, or --memory and --bandwidth, nothing is checked: fimserver plans the memory of --model and the time of a
    request. The model may be a published one that is not downloaded, the shipped model or a folder.
    """
    from fimserver.cli.doctor.checks import run_checks  # noqa: PLC0415
    from fimserver.cli.doctor.plans import GpusPlan, PlanQuery, plan_gpus, plan_model, print_gpus, print_plan  # noqa: PLC0415

    settings = read_options(options, pairs, reports=False)
    if gpu is None and memory is None and bandwidth is None:
        if context is not None or steps is not None or as_json:
            msg = '--context, --steps and --json apply to plans only; add --gpu, for instance --gpu "RTX 5090"'
            raise click.UsageError(msg)
        sys.exit(0 if run_checks(settings) else 1)
    query = PlanQuery(settings.model, gpu, memory, bandwidth, settings.device, context, steps)
    try:
        planned = plan_gpus(query) if query.is_about_all else plan_model(query)
    except FimserverError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        echo(json.dumps(planned.to_values()))
    elif isinstance(planned, GpusPlan):
        print_gpus(planned)
    else:
        print_plan(planned)


@main.command(short_help="Choose a model or a server for this machine, and set it up.")
@click.option("--engine", type=click.Choice(list(ENGINES)), help="Take the first choice with this engine.")
@click.option("--model", metavar="NAME", help="Take this model of the table.")
@click.option(
    "--gpu", "--card", "gpu", metavar="NAME", help="Show what a machine with this GPU could run; needs --dry-run."
)
@click.option("--yes", is_flag=True, help="Download and write without asking.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the machine and the table as one JSON object.")
def setup(**options: Any) -> None:
    """Choose a model or a server for this machine, and set it up.

    Looks at the GPU, the processor, memory, disk, and at servers of Ollama, llama.cpp and vLLM on their usual ports.
    Shows what can run here, downloads the recommended model after a yes (an interrupted download continues), writes
    config.toml, and answers one probe.
    """
    from fimserver.cli.model import add_published  # noqa: PLC0415
    from fimserver.cli.setup import run_setup  # noqa: PLC0415

    with exit_on_error():
        sys.exit(0 if run_setup(add_published, **options) else 1)


@main.command()
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write the corpus to FOLDER."
)
@click.option(
    "--wheels",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder of downloaded wheels. [default: FOLDER/wheels]",
)
@click.option("--yes", is_flag=True, help="Download missing wheels without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def corpus(folder: Path | None, wheels: Path | None, yes: bool, as_json: bool) -> None:  # noqa: FBT001
    """Collect the Python files that the shipped model is trained on. Missing wheels are downloaded from PyPI."""
    from fimserver.training.corpus import build_corpus, default_folder, find_missing  # noqa: PLC0415

    folder = folder or default_folder()
    wheels = wheels or folder / "wheels"
    if missing := find_missing(wheels):
        size = sum(pin.megabytes for pin in missing)
        echo(f"pip will download {len(missing)} wheels from PyPI, about {size:.0f} MB, into {wheels}", err=True)
        if not yes:
            click.confirm("Fetch them?", abort=True, err=True)
    run_measurement(
        lambda: with_progress(lambda report: build_corpus(folder, wheels, report=report)),
        as_json=as_json,
        to_lines=_to_package_lines,
    )


@main.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), metavar="H", help="Train for H hours.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Train until step N.")
@click.option(
    "--from", "source", default="tiny", show_default=True, metavar="NAME|FOLDER", help="Weights to start from."
)
@click.option("--fresh", is_flag=True, help="Start from random weights, with the tokenizer of --from.")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a part of the recipe; see training/recipe.py. May be repeated.",
)
@click.option(
    "--corpus", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Folder of the corpus."
)
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu or cuda.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Maximum number of CPU threads; 0 uses all cores.",
)
def train(  # noqa: PLR0913, PLR0917  one parameter per option
    run: Path,
    hours: float | None,
    steps: int | None,
    source: str,
    fresh: bool,  # noqa: FBT001
    pairs: tuple[str, ...],
    corpus: Path | None,
    device: str,
    threads: int,
) -> None:
    """Train a model in the folder RUN, or continue the training there.

    RUN/model can be served during training. The learning rate decays over the last fifth of the time; create the
    file RUN/stop to start the decay at once. RUN/log.jsonl has the losses, samples.txt has completions of the model,
    losses.png a plot (if matplotlib is installed).
    """
    from fimserver.training.command import train_model  # noqa: PLC0415

    if (hours is None) == (steps is None):
        msg = "the length of the training is missing; add --hours H or --steps N"
        raise click.UsageError(msg)
    run_measurement(
        lambda: train_model(
            run,
            hours=hours,
            steps=steps,
            source=source,
            fresh=fresh,
            pairs=pairs,
            corpus=corpus,
            device=device,
            threads=threads,
        ),
        as_json=False,
    )


def _to_package_lines(manifest: Any) -> Iterator[str]:
    """Return a line for each package, and one for the total."""
    for package in manifest.packages:
        files, characters = package.files + package.held_out_files, package.characters + package.held_out_characters
        held_out = f", {package.held_out_files} held out" if package.held_out_files else ""
        what = f"{package.name} {package.version}"
        yield f"{what:32} {files:6} files {characters / 1e6:7.2f} MB  {package.licence}{held_out}"
    files = sum(package.files for package in manifest.packages)
    characters = sum(package.characters for package in manifest.packages)
    yield f"{'training set':32} {files:6} files {characters / 1e6:7.2f} MB"


if __name__ == "__main__":
    main()
