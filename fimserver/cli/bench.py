"""Define ``fimserver eval`` and ``fimserver bench``: measurements of quality and time.

Knows:  options.  Never: how anything is measured (bench/).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fimserver.cli.options import (
    decoding_options,
    engine_options,
    exit_on_error,
    open_option,
    read_options,
    run_measurement,
)
from fimserver.cli.terminal import echo
from fimserver.settings import Settings

_MOST_USERS = 100_000
_LARGE_MODEL = "nvidia/diffusiongemma-26B-A4B-it-NVFP4"  # whose shape fimserver bench gpu measures

_lines_option = click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Take lines from the files in a folder, in any known language, instead of the standard library.",
)


@click.group(name="eval")
def evaluate() -> None:
    """Measure quality."""


@evaluate.command()
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="HumanEval-Infilling tasks: .jsonl or .jsonl.gz, or a folder of such files; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N tasks of each file.")
@click.option(
    "--execute",
    is_flag=True,
    help="Also measure pass@1. THIS RUNS GENERATED CODE in a child process whose limits only guard against accidents.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer, in tokens.")
@click.option(
    "--against",
    metavar="URL",
    help="Ask a llama.cpp server for the same items, such as http://127.0.0.1:8080, and compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
def infilling(  # noqa: PLR0913, PLR0917  the command's options
    data: tuple[Path, ...],
    limit: int | None,
    execute: bool,  # noqa: FBT001
    max_tokens: int | None,
    against: str | None,
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Fill the holes of HumanEval-Infilling.

    Reports exact match, edit similarity, calibration, time and, with --execute, pass@1 for each kind of hole.
    """
    from fimserver.bench.infilling import evaluate_files, to_lines  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(
        lambda: evaluate_files(data, settings, limit=limit, execute=execute, max_tokens=max_tokens, against=against),
        as_json=as_json,
        to_lines=to_lines,
    )


@evaluate.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="Number of holes."
)
@_lines_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
def masked(limit: int, data: Path | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Measure the decoding options of a masked diffusion model.

    Reports exact match over forward passes, the cost and the answers of fewer whole passes, and the constants that
    describe how sure the model is of a canvas by its length.
    """
    from fimserver.bench.masked.measure import evaluate_masked  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(lambda: evaluate_masked(settings, limit=limit, data=data), as_json=as_json)


@evaluate.command()
@click.option(
    "--data",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="HumanEval-Infilling tasks: .jsonl or .jsonl.gz, or a folder of such files; may be repeated. "
    "[default: ten holes in seven languages]",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N holes of each file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
def layouts(data: tuple[Path, ...], limit: int | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Compare the prompt layouts of an instruction-tuned model on the same holes.

    Reports for each layout exact match of lines and blocks, empty answers, denoising steps and time. The setting
    promptLayout chooses a layout.
    """
    from fimserver.bench.layouts.measure import evaluate_layouts  # noqa: PLC0415
    from fimserver.cli.tables import print_layouts  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(lambda: evaluate_layouts(settings, data=data, limit=limit), as_json=as_json, show=print_layouts)


@evaluate.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Number of holes."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
@click.option("--matches/--no-matches", default=True, help="Offer n-gram matches too, or use the model alone.")
@_lines_option
@click.option(
    "--against",
    metavar="URL",
    help="Ask a llama.cpp server for the same lines, such as http://127.0.0.1:8080, and compare.",
)
@open_option
def lines(  # noqa: PLR0913, PLR0917  the command's options
    limit: int,
    as_json: bool,  # noqa: FBT001
    matches: bool,  # noqa: FBT001
    data: Path | None,
    against: str | None,
    others: tuple[str, ...],
    **options: Any,
) -> None:
    """Complete lines of the standard library, or of a folder, each cut at a random column.

    Sends the requests of an editor. Reports the shares of answered, exact and parsing completions, by language, and
    the time at a new place and after a further key.
    """
    from fimserver.bench.lines import evaluate_lines  # noqa: PLC0415
    from fimserver.cli.complete import read_others  # noqa: PLC0415

    settings = read_options(options, seed=None)  # no seed, as in an editor
    run_measurement(
        lambda: evaluate_lines(
            settings, limit=limit, data=data, matches=matches, others=read_others(others), against=against
        ),
        as_json=as_json,
    )


@evaluate.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=300, show_default=True, metavar="N", help="Number of places."
)
@_lines_option
@click.option(
    "--at-the-end", is_flag=True, help="Leave out what is below each place, as in a file that is being written."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write the curve of precision over coverage to this folder.",
)
@engine_options
def automatic(
    limit: int,
    data: Path | None,
    at_the_end: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    plots: Path | None,
    **options: Any,
) -> None:
    """Complete places at which an editor asks automatically: after a character, at the end of a word, on a new line.

    Reports how many get an offer, how many offers are exactly right, how many the user sees for one right one, and what
    each rule of the filter for unwanted offers drops.
    """
    from fimserver.bench.confidence.measure import measure_automatic  # noqa: PLC0415
    from fimserver.cli.tables import print_automatic  # noqa: PLC0415

    settings = read_options(options, seed=None)  # no seed, as in an editor
    run_measurement(
        lambda: measure_automatic(settings, limit=limit, data=data, at_the_end=at_the_end, plots=plots),
        as_json=as_json,
        show=print_automatic,
    )


@evaluate.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of Python files that the model was not trained on.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=1500, show_default=True, metavar="N", help="Number of lines."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
def ranking(data: Path, limit: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Fit the weights that choose between the model and n-gram matches.

    Reports how much the fitted weights improve the choice.
    """
    from fimserver.bench.confidence.ranking_fit import fit_ranking  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(lambda: fit_ranking(data, settings, limit=limit), as_json=as_json)


@evaluate.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of Python files that the model was not trained on. [default: the held-out files of the corpus]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Number of holes of each kind.",
)
@click.option(
    "--corpus",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder of the corpus.",
)
@click.option(
    "--kinds",
    metavar="A,B",
    help="Fill only these kinds of holes: rest_of_line, expression, statement, block, identifier.",
)
@click.option("--modes", metavar="A,B", help="Use only these modes: speculative, diffusion, autoregressive.")
@click.option("--against", metavar="NAME|FOLDER", help="Compare with another model on the same holes.")
@click.option("--matches/--no-matches", default=False, help="Pass n-gram matches to the engine.")
@click.option(
    "--plots", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write plots to FOLDER."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--seed", type=int, metavar="N", help="Seed of all random draws.")
@engine_options
def holes(  # noqa: PLR0913, PLR0917  one parameter per option
    data: Path | None,
    corpus: Path | None,
    limit: int,
    kinds: str | None,
    modes: str | None,
    against: str | None,
    matches: bool,  # noqa: FBT001
    plots: Path | None,
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Fill holes of five kinds in every mode.

    Reports exact match, forward passes, calibration and time; with --against, two models on the same holes.
    """
    from fimserver.bench.quality import evaluate_holes, parse_kinds, parse_modes  # noqa: PLC0415
    from fimserver.cli.tables import print_quality  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(
        lambda: evaluate_holes(
            data,
            settings,
            limit=limit,
            modes=parse_modes(modes),
            against=against,
            matches=matches,
            plots=plots,
            kinds=parse_kinds(kinds),
            corpus=corpus,
        ),
        as_json=as_json,
        show=print_quality,
    )


@click.group()
def bench() -> None:
    """Measure time."""


_speed_option = click.option(
    "--speed",
    type=click.FloatRange(min=0.1, max=100),
    default=1.0,
    show_default=True,
    metavar="X",
    help="Divide the pauses of --human by X.",
)


@bench.command()
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Number of keystrokes. [default: 600, or 300 with --human]"
)
@click.option(
    "--human",
    is_flag=True,
    help="Type with human pauses and report what is shown before the next key. Takes 2 minutes.",
)
@_speed_option
@click.option(
    "--debounce",
    type=click.IntRange(0, 2000),
    metavar="MS",
    help="With --human: wait a fixed time after each key. [default: adaptive debounce]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
def keystroke(
    limit: int | None,
    human: bool,  # noqa: FBT001
    speed: float,
    debounce: int | None,
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Measure the time per keystroke in a file of 10,000 lines.

    Reports server time without the model, model time, and the tokens that were encoded again. With --human: how many
    completions arrive before the next key, their source, their delay, and how many begin correctly.
    """
    from fimserver.bench.latency import measure_typing, replay_typing  # noqa: PLC0415

    settings = read_options(options, seed=None)  # no seed, as in an editor
    if human:
        settings = replace(settings, debounce_ms=debounce)
        run_measurement(lambda: replay_typing(settings, limit=limit or 300, speed=speed), as_json=as_json)
    else:
        run_measurement(lambda: measure_typing(settings, limit=limit or 600), as_json=as_json)


@bench.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=102, show_default=True, metavar="N", help="Number of holes."
)
@click.option("--modes", metavar="A,B", help="Use only these decoders, for instance diffusion,autoregressive,generate.")
@click.option(
    "--plots", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write plots to FOLDER."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--seed", type=int, metavar="N", help="Seed of all random draws.")
@engine_options
def decode(limit: int, modes: str | None, plots: Path | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Compare all modes with transformers' generate on the same holes.

    Reports time, forward passes and exact match.
    """
    from fimserver.bench.decode import compare_decoders, parse_decoders  # noqa: PLC0415
    from fimserver.cli.tables import print_comparison  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(
        lambda: compare_decoders(settings, limit=limit, decoders=parse_decoders(modes), plots=plots),
        as_json=as_json,
        show=print_comparison,
    )


@bench.command()
@click.option(
    "--synthetic", default="26b", show_default=True, metavar="NAME", help="Shape of the model; its weights are random."
)
@click.option("--context", default=8192, show_default=True, type=click.IntRange(min=64), metavar="TOKENS")
@click.option("--stages", metavar="A,B", help="Run only these stages, such as checks,load,graphs,steps. [default: all]")
@click.option("--weights", default="", metavar="NAME", help="Installed instruction-tuned model for the stage layouts.")
@click.option(
    "--generate/--no-generate",
    default=None,
    help="Also run transformers' generate in bf16, which takes 52 GB. [default: if it fits]",
)
@click.option(
    "--simulate", is_flag=True, help="Run every stage on this machine at a reduced size, without measuring anything."
)
@click.option(
    "--minutes",
    default=15.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Skip the stages that have not begun after N minutes, and stop the one that runs.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write gpu.json and gpu.md to FOLDER, after each stage.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def gpu(  # noqa: PLR0913, PLR0917  one parameter per option
    synthetic: str,
    context: int,
    stages: str | None,
    weights: str,
    generate: bool | None,  # noqa: FBT001
    simulate: bool,  # noqa: FBT001
    minutes: float,
    out: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Measure a CUDA GPU with random weights in the shape of the 26B model, in about ten minutes.

    Prints a page to paste into an issue: what fimserver doctor finds, kernels, memory compared with the plan, steps
    compared with their lower bound, captures and waits, whole requests, and prompt layouts with real weights. A check
    passes only if it was measured. The page leaves out other programs' names, and all but the end of paths.
    """
    from fimserver.bench.gpu.report import to_markdown  # noqa: PLC0415
    from fimserver.bench.gpu.run import measure_gpu  # noqa: PLC0415
    from fimserver.bench.gpu.stages import STAGES  # noqa: PLC0415

    chosen = tuple(stages.split(",")) if stages else STAGES
    found = []

    def measure() -> Any:
        found.append(
            measure_gpu(
                synthetic,
                simulate=simulate,
                stages=chosen,
                context_tokens=context,
                weights=weights,
                find_checks=lambda: _find_gpu_checks(context),
                minutes=minutes,
                with_generate=generate,
                out=out,
                report=lambda stage: echo(f"{stage} ...", err=True),
            )
        )
        return found[0]

    run_measurement(measure, as_json=as_json, to_lines=to_markdown)
    sys.exit(1 if found[0].failures else 0)


@bench.command()
@click.option(
    "--limit", type=click.IntRange(min=1), default=12, show_default=True, metavar="N", help="Number of requests."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
def profile(limit: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Profile requests: the time in each part, compared with the limit of this machine."""
    from fimserver.bench.profiling import profile_requests  # noqa: PLC0415
    from fimserver.cli.tables import print_profile  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(lambda: profile_requests(settings, limit=limit), as_json=as_json, show=print_profile)


def _find_gpu_checks(context_tokens: int) -> tuple[tuple[str, str, str], ...]:
    """Return rows of what fimserver doctor finds about the GPU for the measured model, not for the user's settings."""
    from fimserver.bench.gpu.report import FAIL, NOT_MEASURED, PASS  # noqa: PLC0415
    from fimserver.cli.doctor.gpu_checks import check_gpu  # noqa: PLC0415

    settings = Settings(device="cuda", engine="local", model=_LARGE_MODEL, context_tokens=context_tokens)
    return tuple(
        (check.name, FAIL, f"{check.found}; {check.remedy}")
        if check.remedy
        else (check.name, PASS if check.is_known else NOT_MEASURED, check.found)
        for check in check_gpu(settings)
    )


def _read_users(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    """Return numbers of users. Raises ``click.BadParameter``."""
    try:
        users = [int(part) for part in text.split(",")]
    except ValueError:
        users = []
    if not users or not all(1 <= number <= _MOST_USERS for number in users):
        msg = f"{text!r} is not a list of whole numbers from 1 to {_MOST_USERS}, such as 10,100,1000"
        raise click.BadParameter(msg)
    return users


@bench.command()
@click.option(
    "--times",
    "engine",
    default="diffusiongemma-4090",
    show_default=True,
    metavar="NAME",
    help="Published or measured times of one GPU: diffusiongemma-4090, diffusiongemma-h100, qwen-0.5b-cpu.",
)
@click.option(
    "--new-place", type=click.FloatRange(min=0.1), metavar="MS", help="Your time of an answer at a new place."
)
@click.option(
    "--further-key", type=click.FloatRange(min=0.1), metavar="MS", help="Your time for an answer after a further key."
)
@click.option(
    "--slots", type=click.IntRange(1, 1024), metavar="N", help="Requests that one GPU answers at the same time."
)
@click.option(
    "--growth",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="What a further request at the same time costs: 0 nothing, 1 as much as alone.",
)
@click.option(
    "--users", default="10,100,1000,10000", show_default=True, callback=_read_users, metavar="N,N", help="Team sizes."
)
@click.option(
    "--typing",
    type=click.FloatRange(0.01, 1),
    default=0.3,
    show_default=True,
    metavar="X",
    help="Share of the users who type at the same moment, in the busiest hour.",
)
@click.option(
    "--target",
    type=click.FloatRange(min=1),
    default=500,
    show_default=True,
    metavar="MS",
    help="The longest wait from a key to an answer, for 95 of 100 answers.",
)
@click.option(
    "--price",
    type=click.FloatRange(min=0),
    default=0.7,
    show_default=True,
    metavar="USD",
    help="Price of one GPU for an hour.",
)
@click.option(
    "--routing",
    type=click.Choice(["typist", "least"]),
    default="typist",
    show_default=True,
    help="Each typist's requests go to one GPU, or to the one with the fewest requests.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of all random draws.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def capacity(  # noqa: PLR0913, PLR0917  the command's options
    engine: str,
    new_place: float | None,
    further_key: float | None,
    slots: int | None,
    growth: float | None,
    users: list[int],
    typing: float,
    target: float,
    price: float,
    routing: str,
    seed: int,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Simulate a team that shares GPUs: how many it needs.

    Takes no GPU and no model, only times of one, which `fimserver eval lines --engine vllm` measures for yours. See
    docs/explanation/capacity.md.
    """
    from fimserver.bench.capacity import Team, adapt, find_times, plan_capacity  # noqa: PLC0415
    from fimserver.cli.tables import print_capacity  # noqa: PLC0415

    with exit_on_error():
        times = adapt(
            find_times(engine), new_place_ms=new_place, further_key_ms=further_key, slots=slots, growth=growth
        )
    team = Team(typing, target, price, routing, seed)
    run_measurement(lambda: plan_capacity(engine, times, users, team), as_json=as_json, show=print_capacity)
