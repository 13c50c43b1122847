"""Define ``fimserver model`` and its commands, and ``fimserver quantize``.

Knows:  options, results of the store and the quantizer.  Never: the hub, tensors.
"""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from fimserver.checkpoints.gguf import GGUF_SUFFIX
from fimserver.cli.options import exit_on_error, run_measurement, with_progress
from fimserver.cli.terminal import echo, make_console
from fimserver.errors import FimserverError
from fimserver.text import to_printable

_NOT_PERMISSIVE = "not a permissive licence: read it before you use the model"
_LIST_WIDTH = 120


@click.group()
def model() -> None:
    """Add published models by name and GGUF files, list and remove them. Only this and `setup` download models."""


@model.command(name="add")
@click.argument("name", metavar="OWNER/NAME[@REVISION]|FILE.gguf")
@click.option("--yes", is_flag=True, help="Download without asking.")
@click.option("--name", "own_name", metavar="NAME", help="Name of a GGUF file's model; the file's name by default.")
def add(name: str, yes: bool, own_name: str | None) -> None:  # noqa: FBT001
    """Download a published model to the Hugging Face cache, or add a GGUF file from your disk.

    Shows its license and size first. An interrupted download continues where it stopped. A GGUF file stays where it
    is; nothing is downloaded for it.
    """
    file = Path(name).expanduser()
    if file.suffix.lower() == GGUF_SUFFIX or file.is_file():
        _add_file(file, own_name)
        return
    if own_name is not None:
        msg = "--name is for a GGUF file; a published model keeps its name"
        raise click.UsageError(msg)
    add_published(name, yes=yes)


def add_published(name: str, *, yes: bool = True) -> None:
    """Download a published model after showing its licence and size. Exits with 1 if that fails."""
    from fimserver.checkpoints.hub import add_model, find_offer, parse_name  # noqa: PLC0415
    from fimserver.checkpoints.installed import to_gigabytes  # noqa: PLC0415
    from fimserver.checkpoints.known import is_permissive  # noqa: PLC0415

    try:
        parse_name(name)
    except FimserverError as error:
        raise click.UsageError(str(error)) from error
    with exit_on_error():
        offer = find_offer(name)
        warning = "" if is_permissive(offer.licence) else f"\n{'':8} {_NOT_PERMISSIVE}"
        gated = f" (gated: accept the license on {offer.page})" if offer.is_gated else ""
        for label, value in (
            ("model", f"{offer.name} at {offer.commit[:12]}, changed {offer.changed}"),
            ("license", f"{offer.licence}{gated}{warning}"),
            (
                "size",
                f"{to_gigabytes(offer.num_bytes)}, {to_gigabytes(offer.missing_bytes)} to download",
            ),
            ("to", f"{offer.folder}, {to_gigabytes(offer.free_bytes)} free"),
        ):
            echo(f"{label:8} {value}", err=True)
        if offer.missing_bytes and not yes:
            if not sys.stdin.isatty():
                msg = "cannot ask for confirmation without a terminal; add --yes to download"
                raise click.UsageError(msg)
            click.confirm("Download it?", abort=True, err=True)
        added = with_progress(
            lambda report: add_model(offer, check_config=_check_config, check_weights=_check_weights, report=report)
        )
        echo(f"added {added.name}, {added.folder}")
        echo(f'Set fimserver.model to "{added.name}", or use: --model {added.name}', err=True)


def _add_file(file: Path, name: str | None) -> None:
    from fimserver.checkpoints.gguf import read_gguf  # noqa: PLC0415
    from fimserver.checkpoints.gguf_model import add_gguf, choose_name  # noqa: PLC0415
    from fimserver.checkpoints.installed import to_gigabytes  # noqa: PLC0415

    with exit_on_error():
        header = read_gguf(file)
        for label, value in (
            ("model", f"{header.architecture}, {header.num_parameters / 1e6:,.0f} million parameters"),
            ("license", to_printable(header.licence) or "not named in the file"),
            ("size", to_gigabytes(header.num_bytes)),
            ("file", to_printable(str(file.resolve()))),
        ):
            echo(f"{label:8} {value}", err=True)
        added = add_gguf(file, name if name is not None else choose_name(file), _check_folder)
        echo(f"added {added.name}, {added.folder}")
        echo(f'Set fimserver.model to "{added.name}", or use: --model {added.name}', err=True)


def _check_folder(folder: Path) -> None:
    from fimserver.checkpoints.metadata import check_metadata  # noqa: PLC0415

    _check_config(folder)
    check_metadata(folder, folder.name)
    _check_weights(folder)


# Both import transformers and with it huggingface_hub, which may only be imported after its telemetry is turned off.


def _check_config(folder: Path) -> None:
    from fimserver.engine.loading.weights import read_config  # noqa: PLC0415

    read_config(folder)


def _check_weights(folder: Path) -> None:
    from fimserver.engine.loading.weights import check_weights  # noqa: PLC0415

    check_weights(folder)


@model.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_all(as_json: bool) -> None:  # noqa: FBT001
    """List models: shipped, added, and known ones that are not downloaded.

    Memory is an estimate with 8192 tokens of context, weights as published; fimserver doctor plans in detail.
    """
    from fimserver.checkpoints.catalog import list_needs  # noqa: PLC0415
    from fimserver.checkpoints.installed import list_models, to_gigabytes  # noqa: PLC0415

    with exit_on_error():
        listed = list_models()
        needs = {need.name: need for need in list_needs()}
    if as_json:
        rows = []
        for one in listed:
            need = needs.get(one.name)
            estimates = {"gpu_bytes": need and need.gpu_bytes, "cpu_bytes": need and need.cpu_bytes}
            rows.append({**dataclasses.asdict(one), **estimates})
        echo(json.dumps({"models": rows}))
        return
    for one in listed:
        gone = "its files are missing; add it again" if one.state == "added" and one.num_bytes is None else None
        place = gone or one.folder or "not downloaded"
        echo(f"{one.name:42} {one.state:8} {to_gigabytes(one.num_bytes):>12}  {place}")
        if need := needs.get(one.name):
            memory = f"{to_gigabytes(need.gpu_bytes)} of memory on a GPU, {to_gigabytes(need.cpu_bytes)} on a CPU"
            text = f"{one.licence}; {memory}. {one.use}"
            echo(textwrap.fill(text, _LIST_WIDTH, initial_indent="    ", subsequent_indent="    "))
    echo("Download one with: fimserver model add OWNER/NAME")


@model.command(name="remove")
@click.argument("name", metavar="OWNER/NAME|NAME")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def remove(name: str, yes: bool) -> None:  # noqa: FBT001
    """Remove an added model, and delete its files from the Hugging Face cache. A GGUF file of yours is kept."""
    from fimserver.checkpoints.installed import find_removal, to_gigabytes  # noqa: PLC0415

    with exit_on_error():
        removal = find_removal(name)
        what = f"{to_gigabytes(removal.num_bytes)} in {removal.folder}, which other programs may share"
        if removal.num_bytes and removal.is_shared and not yes:
            if not sys.stdin.isatty():
                msg = f"{what}: cannot ask for confirmation without a terminal; add --yes to delete"
                raise click.UsageError(msg)
            click.confirm(f"Delete {what}?", abort=True, err=True)
        removal.execute()
        echo(f"removed {name}, {to_gigabytes(removal.num_bytes)}")


@click.command(name="quantize")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Quantize attention, dense MLPs and self-conditioning too, not only the experts.",
)
@click.option(
    "--format",
    "dialect",
    type=click.Choice(["modelopt", "compressed-tensors"]),
    help="Tensor names of the written file. [default: SRC's if it has NVFP4, else modelopt]",
)
@click.option(
    "--search/--no-search", "searched", default=True, help="Choose scales of least squared error, or the nearest."
)
@click.option(
    "--calibrate",
    "calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A text that shows which weights matter; needs the memory of the whole model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize_model(source: str, target: Path, dialect: str | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Write the model SRC (a name or a folder) to the new folder DST with 4-bit weights (NVFP4).

    SRC may have NVFP4 experts already: with --all, the rest is quantized too, and the experts are copied as they are.
    An interrupted run continues when you repeat the command.
    """
    from fimserver.engine.kernels.nvfp4 import Dialect  # noqa: PLC0415
    from fimserver.engine.quantize.plan import QuantizerOptions  # noqa: PLC0415
    from fimserver.engine.quantize.quantizer import quantize_folder  # noqa: PLC0415

    chosen = QuantizerOptions(dialect=Dialect(dialect) if dialect else None, **options)
    run_measurement(
        lambda: with_progress(lambda report: quantize_folder(source, target, chosen, report=report)),
        as_json=as_json,
        show=_print_quantized,
    )


def _print_quantized(summary: Any) -> None:
    """Print a table row for each layer, then sizes and the layers that stayed in floating point."""
    from rich.box import SIMPLE  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = make_console(width=100)
    table = Table(title=f"{summary.model} in 4 bits, relative errors", box=SIMPLE)
    table.add_column("layer")
    for column in ("matrices", "of weights", "of outputs*", "MB before", "MB after"):
        table.add_column(column, justify="right")
    for row in summary.layers:
        output = "" if row.output_error is None else f"{row.output_error:.4f}"
        sizes = (f"{size / 1e6:.1f}" for size in (row.source_bytes, row.written_bytes))
        table.add_row(row.layer, str(row.matrices), f"{row.weight_error:.4f}", output, *sizes)
    console.print(table)
    console.print("* on the calibration text, assuming uncorrelated inputs of a layer; only known with --calibrate")
    console.print(
        f"all weights: {summary.source_bytes / 1e6:.1f} MB before, {summary.written_bytes / 1e6:.1f} MB after"
    )
    for note in summary.notes:
        console.print(note)
