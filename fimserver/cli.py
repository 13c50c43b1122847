"""The ``fimserver`` command.

    lsp        serve an editor over stdio
    daemon     the process behind all editors: start, stop, status, logs
    explain    why there was or was no ghost text; report: the same for others to read
    stats      what was offered and taken, and how long it took
    complete   complete at one place of one file
    eval       measure quality
    bench      measure time
    train      train a model of the shipped one's size
    corpus     gather the files that the shipped model is trained on
    quantize   write a model's weights in 4 bits
    model      add published models by name, list and remove them
    doctor     what is installed, and whether the model answers

Exit codes: 0 done, 1 nothing to complete or a check failed (the reason is on stderr), 2 wrong use.
Standard output is for results; progress, reasons and logs go to stderr.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fimserver import __version__
from fimserver.daemon_commands import daemon, explain, report, stats
from fimserver.errors import FimserverError, SettingsError
from fimserver.paths import config_file
from fimserver.settings import MODES, Settings, parse_settings, read_config_file, to_wire_name

_SEED = 0  # of commands: the same answer each time


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fimserver")
def main() -> None:
    """Code completion on your own machine: fill the middle with a text-diffusion model."""


for command in (daemon, explain, report, stats):
    main.add_command(command)


def _engine_options(command: Any) -> Any:
    """Options that every command with a model has; each is a setting of the same name."""
    for option in (
        click.option(
            "--model",
            metavar="NAME|FOLDER",
            help="The shipped model's name, one that was added, or a checkpoint folder.",
        ),
        click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--threads", type=int, metavar="N", help="CPU threads; 0 means physical cores less one."),
    ):
        command = option(command)
    return command


def _decoding_options(command: Any) -> Any:
    for option in (
        click.option("--mode", type=click.Choice(list(MODES)), help="How the middle is decoded."),
        click.option(
            "--seed", type=int, metavar="N", help=f"Seed of all that is drawn; {_SEED} unless config.toml says."
        ),
        click.option("--max-denoising-steps", type=int, metavar="N", help="Most steps for one canvas."),
    ):
        command = option(command)
    return command


def _wire_values(options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given, under their settings' names on the wire."""
    return {to_wire_name(name): value for name, value in options.items() if value is not None}


def _parse(values: dict[str, Any], base: Settings) -> Settings:
    try:
        return parse_settings(values, base)
    except SettingsError as error:
        raise click.UsageError(str(error)) from error


def _settings(
    options: dict[str, Any], pairs: tuple[str, ...] = (), *, reports: bool = True, seed: int | None = _SEED
) -> Settings:
    """Settings from config.toml, options and ``--set NAME=VALUE`` pairs; a wrong option is wrong use."""
    configured, problems = read_config_file(config_file())
    for problem in problems if reports else ():
        click.echo(f"fimserver: {problem}", err=True)
    values = _wire_values(options)
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            msg = f"--set {pair}: write NAME=VALUE, for instance --set comments=true"
            raise click.UsageError(msg)
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return _parse(values, parse_settings(configured, Settings(seed=seed, candidates=1)))


@main.command(short_help="Serve one editor over stdio.")
@click.option(
    "--no-daemon",
    is_flag=True,
    help="All in this process and its worker, shared with no other editor: for containers, and to look for faults.",
)
@click.option("--stdio", is_flag=True, hidden=True)  # what some editors' clients add
@_engine_options
def lsp(no_daemon: bool, stdio: bool, **options: Any) -> None:  # noqa: ARG001, FBT001  click hands flags over by name
    """Serve one editor over stdio (LSP 3.18, textDocument/inlineCompletion), by the daemon that serves all."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="fimserver: %(levelname)s %(message)s")
    from fimserver.__main__ import serve  # noqa: PLC0415  the command's first step, which comes by here for help alone

    if sys.stdin.isatty():
        click.echo("fimserver lsp waits for an editor on stdin; see README.md, or try: fimserver complete", err=True)
    _parse(_wire_values(options), Settings())
    sys.exit(serve(_wire_values(options), has_daemon=not no_daemon))


@main.command(
    short_help="Complete at one place of a file.", context_settings={"ignore_unknown_options": True}
)  # or -:LINE:COL would be taken for one
@click.argument("target", metavar="FILE:LINE:COL")
@click.option("--path", metavar="NAME", help="File name of the text on standard input (FILE is -).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trace", is_flag=True, help="Show hole, context, prompt, every canvas and timings.")
@click.option("--watch", is_flag=True, help="Go on: show what would be offered as the file is saved.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Any setting; see docs/settings.md.")
@_decoding_options
@_engine_options
def complete(  # noqa: PLR0913, PLR0917  one parameter an option
    target: str,
    path: str | None,
    as_json: bool,  # noqa: FBT001  click hands flags over by name
    trace: bool,  # noqa: FBT001
    watch: bool,  # noqa: FBT001
    pairs: tuple[str, ...],
    **options: Any,
) -> None:
    """Complete at LINE:COL of FILE, for instance app.py:12:5; - reads standard input.

    With --watch FILE is enough, and the place is where a save changed it.

    Lines and columns count from 1, columns in characters; the end of a line is its length and 1.
    With --json the trace goes to standard error.
    """
    from fimserver.completion import Target, complete_target, parse_file, parse_target, print_result  # noqa: PLC0415

    settings = _settings(options, pairs)
    if watch and target.startswith("-:"):
        msg = "--watch needs a file, not standard input"
        raise click.UsageError(msg)
    try:
        in_file = watch and Path(target).is_file()
        place: Target = parse_file(target) if in_file else parse_target(target, path, sys.stdin.buffer)
    except FimserverError as error:
        raise click.UsageError(str(error)) from error
    if watch:
        _watch(place, settings, as_json=as_json)
        return
    result = complete_target(place, settings, trace=trace)
    print_result(result, place, as_json=as_json, trace=trace)
    sys.exit(0 if result.completion is not None else 1)


def _watch(place: Any, settings: Settings, *, as_json: bool) -> None:
    from fimserver.watch import watch_file  # noqa: PLC0415

    try:
        watch_file(place, settings, as_json=as_json)
    except KeyboardInterrupt:
        click.echo(err=True)
    except FimserverError as error:
        click.echo(f"fimserver: {error}", err=True)
        sys.exit(1)


@main.group(name="eval")
def evaluate() -> None:
    """Measure quality."""


@evaluate.command()
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="HumanEval-Infilling items, .jsonl or .jsonl.gz, or the folder of its files; may be given several times.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N items of each file.")
@click.option(
    "--execute",
    is_flag=True,
    help="Also pass@1. THIS RUNS GENERATED CODE, in a child process with limits that guard against accidents only.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_decoding_options
@_engine_options
def infilling(
    data: tuple[Path, ...],
    limit: int | None,
    execute: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Fill the holes of HumanEval-Infilling: exact match, edit similarity, calibration, pass@1, time; by kind."""
    from fimserver.bench.infilling import evaluate_files, to_lines  # noqa: PLC0415

    settings = _settings(options)
    _run_measurement(
        lambda: evaluate_files(data, settings, limit=limit, execute=execute), as_json=as_json, to_lines=to_lines
    )


@evaluate.command()
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Holes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_decoding_options
@_engine_options
@click.option("--guesses/--no-guesses", default=True, help="Offer what followed the same text elsewhere, or never.")
def lines(limit: int, as_json: bool, guesses: bool, **options: Any) -> None:  # noqa: FBT001
    """Complete cut code lines of the standard library, as an editor would ask: answered, exact, sound, time."""
    from fimserver.bench.lines import evaluate_lines  # noqa: PLC0415

    settings = _settings(options)
    _run_measurement(lambda: evaluate_lines(settings, limit=limit, guesses=guesses), as_json=as_json)


@evaluate.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of Python files that the model was not trained on.",
)
@click.option("--limit", type=click.IntRange(min=1), default=1500, show_default=True, metavar="N", help="Lines drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_engine_options
def ranking(data: Path, limit: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Fit the weights that choose between the model and guesses, and say what they are worth."""
    from fimserver.bench.fitting import fit_ranking  # noqa: PLC0415

    settings = _settings(options)
    _run_measurement(lambda: fit_ranking(data, settings, limit=limit), as_json=as_json)


@evaluate.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of Python files that the model was not trained on; the corpus' held-out files unless given.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Holes of each kind."
)
@click.option(
    "--corpus", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER", help="Where it is."
)
@click.option("--kinds", metavar="A,B", help="Only these of rest_of_line, expression, statement, block, identifier.")
@click.option("--modes", metavar="A,B", help="Only these of verified, diffusion, autoregressive.")
@click.option("--against", metavar="NAME|FOLDER", help="Another model, filling the same holes.")
@click.option("--guesses/--no-guesses", default=False, help="Give the engine what followed the same text elsewhere.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--seed", type=int, metavar="N", help="Seed of all that is drawn.")
@_engine_options
def holes(  # noqa: PLR0913, PLR0917  one parameter an option
    data: Path | None,
    corpus: Path | None,
    limit: int,
    kinds: str | None,
    modes: str | None,
    against: str | None,
    guesses: bool,  # noqa: FBT001
    plots: Path | None,
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Fill holes of five kinds in every mode: exact match, passes, calibration, time; two models on the same holes."""
    from fimserver.bench.quality import evaluate_holes, parse_kinds, parse_modes  # noqa: PLC0415
    from fimserver.bench.tables import print_quality  # noqa: PLC0415

    settings = _settings(options)
    _run_measurement(
        lambda: evaluate_holes(
            data,
            settings,
            limit=limit,
            modes=parse_modes(modes),
            against=against,
            guesses=guesses,
            plots=plots,
            kinds=parse_kinds(kinds),
            corpus=corpus,
        ),
        as_json=as_json,
        show=print_quality,
    )


@main.group()
def bench() -> None:
    """Measure time."""


_speed_option = click.option(
    "--speed",
    type=click.FloatRange(min=0.1, max=100),
    default=1.0,
    show_default=True,
    metavar="X",
    help="Pauses of --human are so many times shorter.",
)


@bench.command()
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Keystrokes; 600, or 300 with --human, unless given."
)
@click.option("--human", is_flag=True, help="With a person's pauses: what is shown before the next key. 2 minutes.")
@_speed_option
@click.option(
    "--debounce",
    type=click.IntRange(0, 2000),
    metavar="MS",
    help="With --human: always wait so long behind a key. [default: it adapts]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_decoding_options
@_engine_options
def keystroke(
    limit: int | None,
    human: bool,  # noqa: FBT001
    speed: float,
    debounce: int | None,
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Type in a file of 10,000 lines: server time without the model, model time, tokens encoded again.

    With --human: how many completions come before the next key, from where, how soon, and how many begin right.
    """
    from fimserver.bench.keystroke import measure_typing  # noqa: PLC0415
    from fimserver.bench.replay import replay_typing  # noqa: PLC0415

    settings = _settings(options, seed=None)  # as in an editor
    if human:
        settings = replace(settings, debounce_ms=debounce)
        _run_measurement(lambda: replay_typing(settings, limit=limit or 300, speed=speed), as_json=as_json)
    else:
        _run_measurement(lambda: measure_typing(settings, limit=limit or 600), as_json=as_json)


@bench.command()
@click.option(
    "--editors", type=click.IntRange(min=1, max=64), default=8, show_default=True, metavar="N", help="Windows."
)
@click.option("--edits", type=click.IntRange(min=1), metavar="N", help="Of each.  [default: 1000]")
@click.option("--faults", type=click.IntRange(min=0), metavar="N", help="Kills and stops.  [default: 10]")
@click.option("--nightly", is_flag=True, help="20,000 edits and 60 faults, which say more of memory.")
@click.option("--each", type=click.IntRange(min=1), metavar="N", help="Instead: try each fault N times.")
@click.option("--only", metavar="TEXT", help="With --each: those whose name has it.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of all that is drawn.")
@click.option("--torn", is_flag=True, help="Edit at random, until the files are no code any more.")
@click.option("--human", is_flag=True, help="Type with a person's pauses, and ask at each key.")
@_speed_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def soak(  # noqa: PLR0913
    *,
    editors: int,
    edits: int | None,
    faults: int | None,
    nightly: bool,
    each: int | None,
    only: str | None,
    seed: int,
    torn: bool,
    human: bool,
    speed: float,
    as_json: bool,
) -> None:
    """Many editors at one daemon, edits with hardly a pause, kills now and then: what is lost, late or left behind.

    Exit code 1 where anything was, or where the daemon's memory grows.
    """
    from fimserver.bench import soak as bench_soak  # noqa: PLC0415
    from fimserver.bench.trials import Trials, print_trials, try_each  # noqa: PLC0415
    from fimserver.bench.windows import Manner  # noqa: PLC0415

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

        _run_measurement(measure_each, as_json=as_json, show=print_trials)
        sys.exit(0 if tried and tried[0].is_good else 1)
    manner = Manner(is_torn=torn, speed=speed if human else None)
    found: list[bench_soak.Summary] = []

    def measure() -> bench_soak.Summary:
        defaults = (bench_soak.NIGHTLY_EDITS, bench_soak.NIGHTLY_FAULTS) if nightly else (1000, 10)
        length = (edits or defaults[0], defaults[1] if faults is None else faults)
        found.append(bench_soak.soak(editors, *length, seed, manner))
        return found[0]

    _run_measurement(measure, as_json=as_json)
    sys.exit(0 if found and found[0].is_good else 1)


@bench.command()
@click.option("--limit", type=click.IntRange(min=1), default=102, show_default=True, metavar="N", help="Holes.")
@click.option("--modes", metavar="A,B", help="Only these ways, for instance diffusion,autoregressive,generate.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--seed", type=int, metavar="N", help="Seed of all that is drawn.")
@_engine_options
def decode(limit: int, modes: str | None, plots: Path | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Fill holes in every mode, with transformers' generate and token by token: time, passes, exact match."""
    from fimserver.bench.decode import compare_ways, parse_ways  # noqa: PLC0415
    from fimserver.bench.tables import print_comparison  # noqa: PLC0415

    settings = _settings(options)
    _run_measurement(
        lambda: compare_ways(settings, limit=limit, ways=parse_ways(modes), plots=plots),
        as_json=as_json,
        show=print_comparison,
    )


@bench.command()
@click.option("--synthetic", default="26b", show_default=True, metavar="NAME", help="Which model, of random weights.")
@click.option("--context", default=8192, show_default=True, type=click.IntRange(min=64), metavar="TOKENS")
@click.option("--stages", metavar="A,B", help="Only these of kernels, load, steps, encode, requests, profile.")
@click.option(
    "--generate/--no-generate",
    default=None,
    help="Transformers' generate in bf16, which takes 52 GB. [default: where there is room]",
)
@click.option("--simulate", is_flag=True, help="Every stage on this machine at a reduced size: nothing is measured.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write gpu.json, gpu.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def gpu(  # noqa: PLR0913, PLR0917  one parameter an option
    synthetic: str,
    context: int,
    stages: str | None,
    generate: bool | None,  # noqa: FBT001
    simulate: bool,  # noqa: FBT001
    out: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Measure a CUDA card with a model of the 26B's size: memory, steps beside their floor, prompts, requests."""
    from fimserver.bench.gpu import STAGES, measure_card, to_markdown  # noqa: PLC0415

    chosen = tuple(stages.split(",")) if stages else STAGES
    found = []

    def measure() -> Any:
        found.append(
            measure_card(
                synthetic,
                simulate=simulate,
                stages=chosen,
                context_tokens=context,
                with_generate=generate,
                out=out,
                report=lambda stage: click.echo(f"{stage} ...", err=True),
            )
        )
        return found[0]

    _run_measurement(measure, as_json=as_json, to_lines=to_markdown)
    sys.exit(1 if found[0].failures else 0)


@bench.command()
@click.option("--limit", type=click.IntRange(min=1), default=12, show_default=True, metavar="N", help="Requests.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_decoding_options
@_engine_options
def profile(limit: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Say where one request's time goes, and how far that is from what this machine could do."""
    from fimserver.bench.profile import profile_requests  # noqa: PLC0415
    from fimserver.bench.tables import print_profile  # noqa: PLC0415

    settings = _settings(options)
    _run_measurement(lambda: profile_requests(settings, limit=limit), as_json=as_json, show=print_profile)


@main.command()
@_engine_options
@click.option(
    "--card", metavar="NAME", help='Plan instead: what --model needs of this card, say "RTX 5090", or of cpu.'
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of the plan's prompt; 8192, or all a shorter model takes, unless given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def doctor(card: str | None, context: int | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Check the installation; every line that fails says how to mend it.

    With --card nothing is checked: --model is a published name, the shipped one or a folder, and need not be here.
    """
    from fimserver.doctor import plan_model, print_plan, run_checks  # noqa: PLC0415

    settings = _settings(options, reports=False)
    if card is None:
        if context is not None or as_json:
            msg = '--context and --json are for plans; say --card too, for instance --card "RTX 5090"'
            raise click.UsageError(msg)
        sys.exit(0 if run_checks(settings) else 1)
    try:
        plan = plan_model(settings.model, card, context)
    except FimserverError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(plan)))
    else:
        print_plan(plan)


@main.command()
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Where the corpus goes."
)
@click.option(
    "--wheels",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where wheels are, and go; FOLDER/wheels unless given.",
)
@click.option("--yes", is_flag=True, help="Fetch what is missing without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def corpus(folder: Path | None, wheels: Path | None, yes: bool, as_json: bool) -> None:  # noqa: FBT001
    """Gather the Python files that the shipped model is trained on; wheels that are missing are fetched from PyPI."""
    from fimserver.training.corpus import build_corpus, default_folder, find_missing  # noqa: PLC0415

    folder = folder or default_folder()
    wheels = wheels or folder / "wheels"
    if missing := find_missing(wheels):
        size = sum(pin.megabytes for pin in missing)
        click.echo(f"pip will fetch {len(missing)} wheels from PyPI, about {size:.0f} MB, into {wheels}", err=True)
        if not yes:
            click.confirm("Fetch them?", abort=True, err=True)
    _run_measurement(
        lambda: _with_progress(lambda report: build_corpus(folder, wheels, report=report)),
        as_json=as_json,
        to_lines=_to_package_lines,
    )


@main.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), metavar="H", help="Train for so long.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Train to step N instead.")
@click.option(
    "--from", "source", default="tiny", show_default=True, metavar="NAME|FOLDER", help="Weights to begin with."
)
@click.option("--fresh", is_flag=True, help="Begin with no weights; the tokenizer is that of --from.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Part of the recipe; see training/recipe.py.")
@click.option(
    "--corpus", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Where the corpus is."
)
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu or cuda.")
@click.option("--threads", type=click.IntRange(min=0), default=0, metavar="N", help="At most; 0 means all cores.")
def train(  # noqa: PLR0913, PLR0917  one parameter an option
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
    """Train a model in the folder RUN, or go on with the one that is there; RUN/model can be served all the while.

    The rate falls over the last fifth of the time; a file RUN/stop lets it fall at once. RUN/log.jsonl has the losses,
    samples.txt what the model says, losses.png a picture (with matplotlib).
    """
    from fimserver.training.command import train_model  # noqa: PLC0415

    if (hours is None) == (steps is None):
        msg = "say how long: --hours H or --steps N"
        raise click.UsageError(msg)
    _run_measurement(
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


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--operations", type=click.FloatRange(min=1e9), default=2e13, show_default=True, metavar="N", help="Each."
)
@click.option(
    "--from", "source", default="tiny", show_default=True, metavar="NAME|FOLDER", help="Weights to begin with."
)
@click.option(
    "--corpus", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Where the corpus is."
)
@click.option("--threads", type=click.IntRange(min=0), default=0, metavar="N", help="At most; 0 means all cores.")
def experiment(names: tuple[str, ...], operations: float, source: str, corpus: Path | None, threads: int) -> None:
    """Change one part of the recipe at equal compute and measure; without NAME, say what there is."""
    from fimserver.training.command import list_experiments, run_experiments  # noqa: PLC0415

    if not names:
        click.echo("\n".join(list_experiments()))
        return
    _run_measurement(
        lambda: run_experiments(names, operations=operations, source=source, corpus=corpus, threads=threads),
        as_json=False,
        to_lines=lambda lines: lines,
    )


@main.group()
def model() -> None:
    """Add published models by name, list and remove them. Nothing but `model add` fetches a model."""


@model.command(name="add")
@click.argument("name", metavar="OWNER/NAME[@REVISION]")
@click.option("--yes", is_flag=True, help="Fetch without asking.")
def add(name: str, yes: bool) -> None:  # noqa: FBT001
    """Fetch a published model into the Hugging Face cache; licence and size are shown first.

    A download that was interrupted goes on where it stopped.
    """
    from fimserver.model_store import add_model, find_offer, parse_name, to_gigabytes  # noqa: PLC0415

    try:
        parse_name(name)
    except FimserverError as error:
        raise click.UsageError(str(error)) from error
    with _exit_on_error():
        offer = find_offer(name)
        gated = f" (gated: accept the licence on {offer.page})" if offer.is_gated else ""
        for label, value in (
            ("model", f"{offer.name} at {offer.commit[:12]}, changed {offer.changed}"),
            ("licence", f"{offer.licence}{gated}"),
            (
                "size",
                f"{to_gigabytes(offer.num_bytes)}, of which {to_gigabytes(offer.missing_bytes)} are to be fetched",
            ),
            ("to", f"{offer.folder}, where {to_gigabytes(offer.free_bytes)} are free"),
        ):
            click.echo(f"{label:8} {value}", err=True)
        if offer.missing_bytes and not yes:
            if not sys.stdin.isatty():
                msg = "without a terminal nothing is fetched but with --yes"
                raise click.UsageError(msg)
            click.confirm("Fetch it?", abort=True, err=True)
        added = _with_progress(lambda report: add_model(offer, report))
        click.echo(f"added {added.name}, {added.folder}")
        click.echo(f'Set fimserver.model to "{added.name}", or say: --model {added.name}', err=True)


@model.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_all(as_json: bool) -> None:  # noqa: FBT001
    """Models that are shipped, were added, or are known and not downloaded."""
    from fimserver.model_store import list_models, to_gigabytes  # noqa: PLC0415

    with _exit_on_error():
        listed = list_models()
    if as_json:
        click.echo(json.dumps({"models": [dataclasses.asdict(one) for one in listed]}))
        return
    for one in listed:
        gone = "its files are gone; add it again" if one.state == "added" and one.num_bytes is None else None
        place = gone or one.folder or f"not downloaded: fimserver model add {one.name}"
        click.echo(f"{one.name:42} {one.state:8} {to_gigabytes(one.num_bytes):>12}  {place}")


@model.command(name="remove")
@click.argument("name", metavar="OWNER/NAME")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def remove(name: str, yes: bool) -> None:  # noqa: FBT001
    """Forget a model that was added, and delete its files from the Hugging Face cache."""
    from fimserver.model_store import find_removal, to_gigabytes  # noqa: PLC0415

    with _exit_on_error():
        removal = find_removal(name)
        what = f"{to_gigabytes(removal.num_bytes)} in {removal.folder}, which other programs may share"
        if removal.num_bytes and not yes:
            if not sys.stdin.isatty():
                msg = f"{what}: without a terminal nothing is deleted but with --yes"
                raise click.UsageError(msg)
            click.confirm(f"Delete {what}?", abort=True, err=True)
        removal.execute()
        click.echo(f"removed {name}, {to_gigabytes(removal.num_bytes)}")


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """What cannot be done is exit 1 with the reason."""
    try:
        yield
    except FimserverError as error:
        click.echo(f"fimserver: {error}", err=True)
        sys.exit(1)


@main.command(name="quantize")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--all", "everything", is_flag=True, help="Attention, dense MLPs and self-conditioning too, not experts alone."
)
@click.option(
    "--format",
    "dialect",
    type=click.Choice(["modelopt", "compressed-tensors"]),
    default="modelopt",
    show_default=True,
    help="Whose names the file has.",
)
@click.option(
    "--search/--no-search", "searched", default=True, help="Scales of the least squared error, or the nearest."
)
@click.option(
    "--calibrate",
    "calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A text that says which weights matter; takes the memory of the whole model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize_model(source: str, target: Path, dialect: str, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Write the model SRC, a name or a folder, to the new folder DST with its weights in 4 bits (NVFP4).

    A run that was stopped goes on when the same command is given again.
    """
    from fimserver.engine.nvfp4 import Dialect  # noqa: PLC0415
    from fimserver.engine.quantizer import quantize_folder  # noqa: PLC0415
    from fimserver.engine.quantizer_plan import QuantizerOptions  # noqa: PLC0415

    chosen = QuantizerOptions(dialect=Dialect(dialect), **options)
    _run_measurement(
        lambda: _with_progress(lambda report: quantize_folder(source, target, chosen, report=report)),
        as_json=as_json,
        show=_print_quantized,
    )


def _print_quantized(summary: Any) -> None:
    """Every layer a row, then sizes and what stayed in floats."""
    from rich.box import SIMPLE  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(width=100, highlight=False)
    table = Table(title=f"{summary.model} in 4 bits, relative errors", box=SIMPLE)
    table.add_column("layer")
    for column in ("matrices", "of weights", "of outputs*", "MB before", "MB after"):
        table.add_column(column, justify="right")
    for row in summary.layers:
        output = "" if row.output_error is None else f"{row.output_error:.4f}"
        sizes = (f"{size / 1e6:.1f}" for size in (row.source_bytes, row.written_bytes))
        table.add_row(row.layer, str(row.matrices), f"{row.weight_error:.4f}", output, *sizes)
    console.print(table)
    console.print("* on the calibration text, as if a layer's inputs were uncorrelated; without --calibrate not known")
    console.print(
        f"all weights: {summary.source_bytes / 1e6:.1f} MB before, {summary.written_bytes / 1e6:.1f} MB after"
    )
    for note in summary.notes:
        console.print(note)


def _with_progress(build: Callable[[Callable[[str, int, int], None]], Any]) -> Any:
    """Do what takes minutes under a bar."""
    from rich.console import Console  # noqa: PLC0415  only who waits pays for it
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("")
        return build(lambda what, done, total: progress.update(task, description=what, completed=done, total=total))


def _to_package_lines(manifest: Any) -> Iterator[str]:
    """A line for each package, and one for all."""
    for package in manifest.packages:
        files, characters = package.files + package.held_out_files, package.characters + package.held_out_characters
        held_out = f", {package.held_out_files} held out" if package.held_out_files else ""
        what = f"{package.name} {package.version}"
        yield f"{what:32} {files:6} files {characters / 1e6:7.2f} MB  {package.licence}{held_out}"
    files = sum(package.files for package in manifest.packages)
    characters = sum(package.characters for package in manifest.packages)
    yield f"{'to train on':32} {files:6} files {characters / 1e6:7.2f} MB"


def _run_measurement(
    measure: Callable[[], Any],
    *,
    as_json: bool,
    to_lines: Callable[[Any], Iterable[str]] | None = None,
    show: Callable[[Any], None] | None = None,
) -> None:
    """Print what was measured or made; what cannot be is exit 1 with the reason."""
    with _exit_on_error():
        summary = measure()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary)))
    elif show:
        show(summary)
    else:
        for line in (to_lines or _to_lines)(summary):
            click.echo(line)


def _to_lines(summary: Any) -> Iterator[str]:
    """A dataclass of results, a line each."""
    for name, value in dataclasses.asdict(summary).items():
        yield f"{name:36} {f'{value:.3f}' if isinstance(value, float) else value}"


if __name__ == "__main__":
    main()
