"""``fimserver eval`` and ``fimserver bench``: quality and time, measured.

Knows:  options.  Never: how anything is measured (bench/).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fimserver.cli.options import decoding_options, engine_options, open_option, read_options, run_measurement


@click.group(name="eval")
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
@decoding_options
@engine_options
def infilling(
    data: tuple[Path, ...],
    limit: int | None,
    execute: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Fill the holes of HumanEval-Infilling: exact match, edit similarity, calibration, pass@1, time; by kind."""
    from fimserver.bench.infilling import evaluate_files, to_lines  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(
        lambda: evaluate_files(data, settings, limit=limit, execute=execute), as_json=as_json, to_lines=to_lines
    )


@evaluate.command()
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Holes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
@click.option("--matches/--no-matches", default=True, help="Offer what followed the same text elsewhere, or never.")
@open_option
def lines(limit: int, as_json: bool, matches: bool, others: tuple[str, ...], **options: Any) -> None:  # noqa: FBT001
    """Complete cut code lines of the standard library, as an editor would ask: answered, exact, sound, time."""
    from fimserver.bench.lines import evaluate_lines  # noqa: PLC0415
    from fimserver.cli.complete import read_others  # noqa: PLC0415

    settings = read_options(options, seed=None)  # as in an editor
    run_measurement(
        lambda: evaluate_lines(settings, limit=limit, matches=matches, others=read_others(others)), as_json=as_json
    )


@evaluate.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of Python files that the model was not trained on.",
)
@click.option("--limit", type=click.IntRange(min=1), default=1500, show_default=True, metavar="N", help="Lines drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
def ranking(data: Path, limit: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Fit the weights that choose between the model and guesses, and say what they are worth."""
    from fimserver.bench.ranking_fit import fit_ranking  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(lambda: fit_ranking(data, settings, limit=limit), as_json=as_json)


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
@click.option("--matches/--no-matches", default=False, help="Give the engine what followed the same text elsewhere.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--seed", type=int, metavar="N", help="Seed of all that is drawn.")
@engine_options
def holes(  # noqa: PLR0913, PLR0917  one parameter an option
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
    """Fill holes of five kinds in every mode: exact match, passes, calibration, time; two models on the same holes."""
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
    """Type in a file of 10,000 lines: server time without the model, model time, tokens encoded again.

    With --human: how many completions come before the next key, from where, how soon, and how many begin right.
    """
    from fimserver.bench.latency import (
        measure_typing,
        replay_typing,
    )

    settings = read_options(options, seed=None)  # as in an editor
    if human:
        settings = replace(settings, debounce_ms=debounce)
        run_measurement(lambda: replay_typing(settings, limit=limit or 300, speed=speed), as_json=as_json)
    else:
        run_measurement(lambda: measure_typing(settings, limit=limit or 600), as_json=as_json)


@bench.command()
@click.option("--limit", type=click.IntRange(min=1), default=102, show_default=True, metavar="N", help="Holes.")
@click.option("--modes", metavar="A,B", help="Only these decoders, for instance diffusion,autoregressive,generate.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Write pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--seed", type=int, metavar="N", help="Seed of all that is drawn.")
@engine_options
def decode(limit: int, modes: str | None, plots: Path | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Fill holes in every mode, with transformers' generate and token by token: time, passes, exact match."""
    from fimserver.bench.decode import compare_ways, parse_decoders  # noqa: PLC0415
    from fimserver.cli.tables import print_comparison  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(
        lambda: compare_ways(settings, limit=limit, decoders=parse_decoders(modes), plots=plots),
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
    from fimserver.bench.gpu import STAGES, measure_gpu, to_markdown  # noqa: PLC0415

    chosen = tuple(stages.split(",")) if stages else STAGES
    found = []

    def measure() -> Any:
        found.append(
            measure_gpu(
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

    run_measurement(measure, as_json=as_json, to_lines=to_markdown)
    sys.exit(1 if found[0].failures else 0)


@bench.command()
@click.option("--limit", type=click.IntRange(min=1), default=12, show_default=True, metavar="N", help="Requests.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@decoding_options
@engine_options
def profile(limit: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Say where one request's time goes, and how far that is from what this machine could do."""
    from fimserver.bench.profiling import profile_requests  # noqa: PLC0415
    from fimserver.cli.tables import print_profile  # noqa: PLC0415

    settings = read_options(options)
    run_measurement(lambda: profile_requests(settings, limit=limit), as_json=as_json, show=print_profile)
