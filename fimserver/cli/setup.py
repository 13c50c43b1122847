"""Choose a model or a server for this machine, and set it up (``fimserver setup``).

    list_choices   what this machine can run
    recommend      the best of them for everyday use
    change_config  the text of config.toml with other values, and nothing else changed
    run_setup      the command: table, question, download, config.toml, probe

Knows:   plans, the table of GPUs, measured results, config.toml.  Never: torch, tensors.
"""

import dataclasses
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE
from rich.table import Table

from fimserver.checkpoints.gpus import Gpu, find_gpu
from fimserver.checkpoints.installed import find_added, to_gigabytes
from fimserver.checkpoints.known import is_permissive, read_known
from fimserver.checkpoints.memory import Checkpoint, find_checkpoint
from fimserver.checkpoints.metadata import Canvas, read_metadata
from fimserver.checkpoints.planner import plan_on_cpu, plan_on_gpu
from fimserver.checkpoints.request_times import FITS_GHOST_TEXT, estimate_times
from fimserver.cli.doctor.checks import check_model
from fimserver.cli.machine import FoundServer, Machine, look_at_machine, simulate_gpu
from fimserver.cli.terminal import echo, make_console, plain
from fimserver.errors import FimserverError, SettingsError
from fimserver.paths import config_file, data_folder, write_private
from fimserver.settings import parse_settings

_CONTEXT_TOKENS = 2048  # of the plans: what the rest of a line usually needs
_MOST_ON_A_PROCESSOR = 600_000_000  # parameters; more take several seconds for a line on a usual one
_COMFORTABLE = 0.95  # of a GPU's usable memory; the screen and other programs need some
_SHIPPED = "tiny"
# The share of exact lines, and ms at a new place: ``fimserver eval lines --limit 60 --no-matches`` on two cores.
_MEASURED: Mapping[str, tuple[float, float]] = {_SHIPPED: (0.27, 175.0), "Qwen/Qwen2.5-Coder-0.5B": (0.57, 1010.0)}
_EDITORS = """\
VS Code: install the extension from editors/vscode; it finds this server on PATH
Neovim:  add editors/neovim as a plugin, then require('fimserver').setup()
others:  start `fimserver lsp` over stdio; see docs/how-to/editors.md"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One row of the table: a model in fimserver's own engine, or a server that runs already.

    ``ms`` is for the rest of a line at a new place: measured on two cores if ``is_measured``, else the least that the
    GPU allows (checkpoints/request_times.py). ``problem`` says why it is not recommended.
    """

    engine: str = "local"
    model: str
    where: str
    licence: str = ""
    download_bytes: int = 0
    memory_bytes: int = 0
    ms: float | None = None
    is_measured: bool = False
    exact: float | None = None
    languages: str = "many"
    problem: str = ""
    url: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Return what config.toml has to say."""
        if self.url:
            return {"engine": self.engine, "remote": {"url": self.url, "model": self.model}}
        return {"engine": "local", "model": self.model}


def list_choices(machine: Machine) -> list[Choice]:
    """Return what this machine can run: servers, then models from large to small. Raises ``WeightsError``."""
    servers = [_of_server(server) for server in machine.servers]
    names = [fact["name"] for _, facts in read_known() for fact in facts if _is_for_completion(fact)]
    models = [choice for name in names if (choice := _of_model(name, machine)) is not None]
    models.sort(key=lambda choice: -choice.memory_bytes)
    exact, ms = _MEASURED[_SHIPPED]
    memory = plan_on_cpu(find_checkpoint(_SHIPPED), 0, 512).total_bytes
    shipped = Choice(
        model=_SHIPPED,
        where="CPU",
        licence="Apache-2.0",
        memory_bytes=memory,
        ms=ms,
        is_measured=True,
        exact=exact,
        languages="Python",
    )
    return [*servers, *models, shipped]


def recommend(choices: Iterable[Choice]) -> Choice:
    """Return the first choice without a problem; the shipped model never has one."""
    return next(choice for choice in choices if not choice.problem)


def find_choice(choices: list[Choice], engine: str | None, model: str | None) -> Choice:
    """Return the first choice with an engine, a model or both. Raises ``FimserverError`` that lists them."""
    for choice in choices:
        if engine in {None, choice.engine} and model in {None, choice.model}:
            return choice
    listed = ", ".join(f"{choice.model} ({choice.engine})" for choice in choices)
    msg = f"this machine has no such choice; it has: {listed}"
    raise FimserverError(msg)


def _is_for_completion(fact: Mapping[str, Any]) -> bool:
    """Return whether a known checkpoint can be downloaded and is meant for completing code."""
    return bool(fact["file_bytes"]) and "/" in fact["name"] and "-Instruct" not in fact["name"]


def _of_server(server: FoundServer) -> Choice:
    problem = "" if server.family else "not a known code model"
    return Choice(engine=server.engine, model=server.model, where=server.url, problem=problem, url=server.url)


def _of_model(name: str, machine: Machine) -> Choice | None:
    """Return a model on the GPU, else on the processor; ``None`` where it has no place."""
    checkpoint = find_checkpoint(name)
    context = min(_CONTEXT_TOKENS, checkpoint.shape.longest_context_tokens)
    pairs = ((folder, fact) for folder, facts in read_known() for fact in facts)
    folder, licence = next((folder, str(fact["licence"])) for folder, fact in pairs if fact["name"] == name)
    download = 0 if find_added(name) is not None else checkpoint.file_bytes or 0
    problem = "" if is_permissive(licence) else "read its licence first"
    if read_metadata(folder).canvas is Canvas.MASK:
        problem = "answers not measured"
    if download > machine.free_disk_bytes:
        problem = "too little disk space"
    row = Choice(model=name, where="", licence=licence, download_bytes=download, exact=_MEASURED.get(name, (None,))[0])
    if machine.gpu is not None and machine.gpu.has_bf16:
        gpu = machine.gpu.listed or Gpu(machine.gpu.name, machine.gpu.memory_bytes / 2**30, 0, 0, "")
        with_bandwidth = dataclasses.replace(gpu, bandwidth_gb_per_s=gpu.bandwidth_gb_per_s or 1)
        plan = plan_on_gpu(checkpoint, with_bandwidth, context)
        if plan.fits:
            times = estimate_times(checkpoint, gpu) if gpu.bandwidth_gb_per_s else None
            if times is not None and times.verdict != FITS_GHOST_TEXT:
                problem = problem or "slow on this GPU"
            if plan.total_bytes > _COMFORTABLE * gpu.usable_bytes:
                problem = problem or "leaves no memory"
            ms = None if times is None else times.line_cold_ms
            return dataclasses.replace(row, where=gpu.name, memory_bytes=plan.total_bytes, ms=ms, problem=problem)
    if not checkpoint.shape.is_dense or machine.memory_bytes is None:
        return None
    here = plan_on_cpu(checkpoint, machine.memory_bytes, context)
    if not here.fits:
        return None
    measured = _MEASURED.get(name)
    return dataclasses.replace(
        row,
        where="CPU",
        memory_bytes=here.total_bytes,
        ms=measured[1] if measured else None,
        is_measured=measured is not None,
        problem=problem or _problem_on_processor(checkpoint, is_measured=measured is not None),
    )


def _problem_on_processor(checkpoint: Checkpoint, *, is_measured: bool) -> str:
    if sum(part.num_parameters for part in checkpoint.parts) > _MOST_ON_A_PROCESSOR:
        return "slow on a processor"
    return "" if is_measured else "not measured"


def change_config(path: Path, values: Mapping[str, Any]) -> str:
    """Return the text of a config.toml with these values, all else as it is.

    Raises ``SettingsError`` with the lines to write where the file is too unusual to be changed.
    """
    lines = [f"{name} = {_to_toml(value)}" for name, value in values.items()]
    try:
        text = path.read_text(encoding="utf-8-sig")
        before = tomllib.loads(text)
    except FileNotFoundError:
        text, before = "", {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = type(error).__name__
        msg = f"{path} cannot be read as TOML ({why}); correct it, or write into it: {'; '.join(lines)}"
        raise SettingsError(msg) from error
    kept = text
    for name in values:
        kept = re.sub(rf"^{name}[ \t]*=.*\n?", "", kept, flags=re.MULTILINE)
    changed = "\n".join([*lines, kept])
    try:
        is_good = tomllib.loads(changed) == {**before, **values}
    except tomllib.TOMLDecodeError:
        is_good = False
    if not is_good:
        msg = f"{path} is too unusual to be changed; write into it: {'; '.join(lines)}"
        raise SettingsError(msg)
    return changed


def _to_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_to_toml(own)}" for name, own in value.items()) + " }"
    return json.dumps(str(value), ensure_ascii=False)  # a basic string of TOML escapes what JSON escapes


def run_setup(  # noqa: PLR0913  the command's options
    download: Callable[[str], None],
    *,
    engine: str | None,
    model: str | None,
    gpu: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """Set this machine up; return whether the probe was answered. Raises ``FimserverError``, ``UsageError``."""
    with make_console(stderr=True).status("looking at this machine"):
        machine = look_at_machine(data_folder())
    if gpu is not None:
        machine = dataclasses.replace(machine, gpu=simulate_gpu(find_gpu(gpu)))
    choices = list_choices(machine)
    best = recommend(choices)
    chosen = best if engine is model is None else find_choice(choices, engine, model)
    if as_json:
        rows = [dataclasses.asdict(choice) for choice in choices]
        echo(
            json.dumps({"machine": dataclasses.asdict(machine), "choices": rows, "chosen": dataclasses.asdict(chosen)})
        )
    else:
        _print(machine, choices, chosen)
    if gpu is not None and not dry_run:
        msg = "--gpu plans for another machine; add --dry-run"
        raise click.UsageError(msg)
    path = config_file()
    text = change_config(path, chosen.settings)
    for step in _steps_of(chosen, path):
        echo(step, err=True)
    if dry_run:
        return True
    if not yes:
        if not sys.stdin.isatty():
            msg = "cannot ask without a terminal; add --yes, or --dry-run to change nothing"
            raise click.UsageError(msg)
        click.confirm("Do it?", default=True, abort=True, err=True)
    if chosen.download_bytes:
        download(chosen.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, text)
    result = check_model(parse_settings(tomllib.loads(text)))
    echo(f"{'FAIL' if result.remedy else 'ok'}: {result.found}", err=True)
    if result.remedy:
        echo(f"{result.remedy}", err=True)
        return False
    echo(_EDITORS, err=True)
    return True


def _steps_of(chosen: Choice, path: Path) -> list[str]:
    """Return what is about to be done, a line for each step."""
    steps = [f"download {to_gigabytes(chosen.download_bytes)} ({chosen.licence})"] if chosen.download_bytes else []
    lines = "; ".join(f"{name} = {_to_toml(value)}" for name, value in chosen.settings.items())
    steps += [f"write into {path}: {lines}", "answer one probe of fimserver's own"]
    return [f"{number}. {step}" for number, step in enumerate(steps, start=1)]


def _print(machine: Machine, choices: list[Choice], chosen: Choice) -> None:
    gpu = "no GPU with a driver"
    if machine.gpu is not None:
        listed = "" if machine.gpu.listed else ", not in the table of GPUs: its speed is not known"
        listed = listed if machine.gpu.has_bf16 else ", not used: it computes no bf16"
        gpu = f"{machine.gpu.name}, {machine.gpu.memory_bytes / 2**30:.0f} GiB{listed}"
    memory = "memory not reported" if machine.memory_bytes is None else f"{machine.memory_bytes / 1e9:.0f} GB of memory"
    console = make_console(soft_wrap=True)
    console.print(
        plain(f"{gpu}; {machine.cores} cores, {memory}, {to_gigabytes(machine.free_disk_bytes)} of disk free")
    )
    table = Table(box=SIMPLE, pad_edge=False)
    numbers = ("download", "memory", "ms a line", "exact")
    for title in ("", "model", "engine", "runs on", "licence", *numbers, "languages", "but"):
        table.add_column(title, justify="right" if title in numbers else "left", no_wrap=True)
    for choice in choices:
        table.add_row(
            "->" if choice is chosen else "",
            plain(choice.model),
            choice.engine,
            plain(choice.where),
            choice.licence,
            to_gigabytes(choice.download_bytes) if choice.download_bytes else "",
            to_gigabytes(choice.memory_bytes) if choice.memory_bytes else "",
            "" if choice.ms is None else f"{'' if choice.is_measured else 'at least '}{choice.ms:.0f}",
            "" if choice.exact is None else f"{choice.exact:.0%}",
            choice.languages,
            choice.problem,
        )
    make_console(width=max(180, console.width)).print(table)
    console.print("exact: lines of Python completed exactly; times without a GPU were measured on two cores")
