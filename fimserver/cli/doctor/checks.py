"""Check the installation and the model (``fimserver doctor``).

Knows:  packages, the machine, the engine's client.  Never: LSP, torch (the engine's process imports it).
"""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from rich.text import Text

from fimserver import __version__
from fimserver.cli.doctor.check import Check
from fimserver.cli.doctor.gpu_checks import check_gpu, find_slow_weights
from fimserver.cli.terminal import make_console, plain
from fimserver.context.languages.table import LANGUAGES
from fimserver.context.syntax import GRAMMAR_ERRORS, load_parser
from fimserver.daemon.launch import read_status
from fimserver.datatypes import FimContext, Generation, Hole, HoleKind, ModelInfo, Sampling
from fimserver.engine.client import EngineClient
from fimserver.engine.remote.consent import options_here
from fimserver.errors import EngineError, FimserverError, install_command
from fimserver.framing import VERSION, read_body, to_frame
from fimserver.paths import (
    HOME_VARIABLE,
    OUTSIDE,
    cache_folder,
    config_file,
    data_folder,
    runtime_folder,
    state_folder,
)
from fimserver.settings import Settings, read_config_file, to_wire_name, to_wire_value
from fimserver.text import to_printable

LOAD_TIMEOUT_S = 300.0
_PACKAGES = (
    "pygls",
    "lsprotocol",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "tree-sitter",
    "tree-sitter-python",
)
_VARIABLES = ("FIMSERVER_", "HF_", "CUDA_", "OMP_", "MKL_", "XDG_", "XPC_", "TORCH")  # beginnings of names
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|AUTH|PROXY|ENDPOINT")  # in a name: its value is not shown
_ANSWER_S = 30.0  # for the first answer of a server, a daemon's start included
_LEAST_FREE_BYTES = 1_500_000_000  # torch, transformers and the shipped model in one process
_PROBE = "def add(first, second):\n    return first + "


def run_checks(settings: Settings) -> bool:
    """Print every check; return whether all are good."""
    console = make_console(soft_wrap=True)
    good = True
    for result in _list_results(settings):
        mark = ("FAIL", "bold red") if result.remedy else ("ok  ", "green")
        console.print(Text.assemble(mark, plain(f" {result.name:11} {result.found}")))
        if result.remedy:
            console.print(Text(plain(f"     {'':11} {result.remedy}")))
            good = False
    return good


def _list_results(settings: Settings) -> Iterator[Check]:
    """Yield the result of each check when it is there: the last ones take seconds."""
    before = (check_python, check_program, check_environment, check_packages, check_memory, check_grammar)
    yield from (check(settings) for check in (*before, check_config, check_settings, check_folders))
    yield from check_gpu(settings)
    yield from (check(settings) for check in (check_daemon, check_server, check_model))


def check_python(_settings: Settings) -> Check:
    """Return the version and path of the interpreter."""
    return Check(
        "python", f"{platform.python_version()} ({sys.executable}), fimserver {__version__}, {platform.platform()}"
    )


def check_program(_settings: Settings) -> Check:
    """Return which program an editor starts that searches PATH."""
    own = Path(sys.executable).parent / Path(sys.argv[0]).name
    own = own if own.stem == "fimserver" else own.with_name("fimserver")
    found = shutil.which("fimserver")
    if found is None:
        how = f"editors have to be given {own}: fimserver.serverPath in VS Code, cmd in Neovim"
        return Check("program", f"not on PATH; {how}")
    if Path(found).resolve() == own.resolve():
        return Check("program", f"{found}, which editors find on PATH")
    return Check("program", f"{own}; editors that search PATH start another one, {found}")


def check_environment(_settings: Settings) -> Check:
    """Return the variables that change what the server does; an editor passes on its own."""
    ours = str(cache_folder())  # set by this command, for libraries
    values = {name: value for name, value in sorted(os.environ.items()) if not value.startswith(ours)}
    chosen = [name for name in values if name.startswith(_VARIABLES) or name.upper() in _PROXIES]
    shown = [f"{name} (set)" if _SECRET.search(name.upper()) else f"{name}={values[name]}" for name in chosen]
    return Check("environment", ", ".join(shown) or "no variable that changes anything")


def check_packages(_settings: Settings) -> Check:
    """Return the versions of the packages that fimserver needs."""
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    remedy = f"missing: {', '.join(missing)}; run: {install_command(*missing)}" if missing else ""
    return Check("packages", ", ".join(found), remedy)


def check_memory(_settings: Settings) -> Check:
    """Return the size of the main memory, if the system reports it."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Check("memory", "not reported by the system")
    found = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB unused"
    if total < _LEAST_FREE_BYTES:
        return Check("memory", found, f"the engine needs about {_LEAST_FREE_BYTES / 1e9:.1f} GB")
    return Check("memory", found)


def check_grammar(_settings: Settings) -> Check:
    """Return whether the tree-sitter grammars work."""
    found, missing = [], []
    for language in LANGUAGES:
        package = language.grammar[0].replace("_", "-") if language.grammar else ""
        try:
            load_parser(language).parse(b"")
            found.append(language.id)
        except GRAMMAR_ERRORS as error:
            missing.append(f"{package} ({type(error).__name__})")
    names = " ".join(sorted({name.split()[0] for name in missing}))
    remedy = f"{sys.executable} -m pip install --force-reinstall tree-sitter {names}" if missing else ""
    broken = f"; broken: {', '.join(missing)}" if missing else ""
    return Check("grammars", f"{len(found)} languages{broken}", remedy)


def check_config(_settings: Settings) -> Check:
    """Check the user's config.toml, if there is one."""
    path = config_file()
    values, problems = read_config_file(path)
    if problems:
        return Check("config", str(path), "; ".join(problems))
    return Check("config", f"{path} ({', '.join(values) or 'nothing set'})" if path.exists() else f"{path} (absent)")


def check_settings(settings: Settings) -> Check:
    """Return the settings in force that are not the defaults: those of config.toml and of the command line."""
    usual = Settings(seed=settings.seed, candidates=settings.candidates)
    changed = [
        f"{to_wire_name(field.name)} = {json.dumps(to_wire_value(value))}"
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != getattr(usual, field.name)
    ]
    return Check("settings", ", ".join(changed) or "all are defaults (an editor may send others)")


def check_folders(_settings: Settings) -> Check:
    """Write to each folder that the server writes to."""
    folders = {"runtime": runtime_folder(), "state": state_folder(), "data": data_folder(), "cache": cache_folder()}
    for name, folder in folders.items():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"fimserver")
        except OSError as error:
            remedy = f"make this folder of {name} files writable, or set {HOME_VARIABLE} to a folder of yours"
            return Check("folders", f"{folder} cannot be written: {error.strerror}", remedy)
    return Check("folders", f"{', '.join(map(str, folders.values()))}: all can be written")


def check_server(_settings: Settings) -> Check:
    """Start the server as an editor does, and let it answer ``initialize``."""
    hello = {"jsonrpc": VERSION, "id": 1, "method": "initialize", "params": {"processId": None, "capabilities": {}}}
    command = [sys.executable, "-P", "-m", "fimserver", "lsp"]
    begin = time.monotonic()
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(  # noqa: S603  this program itself
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, cwd=OUTSIDE
        ) as server,
    ):
        limit = threading.Timer(_ANSWER_S, server.kill)
        limit.start()
        answer = None
        with suppress(BrokenPipeError):
            server.stdin.write(to_frame(json.dumps(hello).encode()))  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            answer = read_body(server.stdout)  # type: ignore[arg-type]
        ms = (time.monotonic() - begin) * 1e3
        limit.cancel()
        server.kill()
        server.wait()
        complaints.seek(0)
        printed = complaints.read().decode(errors="replace").strip().splitlines()
    if answer is None or b"inlineCompletionProvider" not in answer:
        why = to_printable(printed[-1]) if printed else f"it printed nothing in {ms / 1e3:.0f} s"
        return Check(
            "server", f"does not answer: {why}", "run: fimserver daemon restart; fimserver daemon logs says more"
        )
    return Check("server", f"started and answered initialize in {ms:.0f} ms")


def check_daemon(_settings: Settings) -> Check:
    """Return whether a daemon is running and can be reached."""
    try:
        status = read_status()
    except FimserverError as error:
        return Check("daemon", "cannot be reached", str(error))
    if status is None:
        return Check("daemon", "not running; the first editor starts it")
    worker = status["worker"]
    count = status["connections"]
    editors = "1 editor" if count == 1 else f"{count} editors"
    found = f"pid {status['pid']} serves {editors}; its worker is {worker['state']}"
    if worker["state"] == "failed":
        return Check("daemon", found, f"{worker['detail']}; then run: fimserver daemon restart")
    return Check("daemon", found)


def check_model(settings: Settings) -> Check:
    """Load the model in a process of its own, as in real use, and complete one probe."""
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    try:
        engine = EngineClient(options_here(settings))
    except FimserverError as error:
        return Check("model", settings.engine, str(error))
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        pending = engine.complete(FimContext(_PROBE, "\n", "probe.py", "python", hole), Sampling(seed=0, min_tokens=1))
        generation = pending.future.result(LOAD_TIMEOUT_S)
        info, why = engine.info or info, engine.notice or engine.detail
    except (EngineError, TimeoutError) as error:
        return Check(
            "model",
            f"{settings.model} on {settings.device}",
            str(error) or "the model did not answer; end fimserver's python processes and try again",
        )
    finally:
        engine.close()
    if generation.engine != "local":
        return _describe_other(info, generation)
    if settings.engine != "local":
        return Check("model", f"{settings.engine}; {info.name} answered in its place", why)
    wide = "" if info.row_cost is None else f" (one more row adds {info.row_cost:.0%} to a forward pass)"
    found = (
        f"{info.name}, {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}, "
        f"{info.num_threads} threads, mode {info.preferred_mode}{wide}, loaded in {info.load_ms:.0f} ms, "
        f"probe answered in {generation.timings_ms['total']:.0f} ms ({generation.mode})"
        f"{'; 4-bit weights with ' + info.kernels if info.kernels else ''}{'; ' + info.graphs if info.graphs else ''}"
    )
    if (fault := find_slow_weights(info)) is not None:
        return Check("model", f"{found}; this is slow: {fault.found}", fault.remedy)
    return Check("model", found)


def _describe_other(info: ModelInfo, generation: Generation) -> Check:
    """Return what answered in place of fimserver's own engine, and how much was sent."""
    names = [f.name for f in dataclasses.fields(info.capabilities) if getattr(info.capabilities, f.name)]
    sent = f"; {generation.sent_bytes} bytes were sent there" if generation.server else ""
    found = (
        f"{info.name} {f'at {info.server}' if info.server else 'in this process'} ({info.engine}), "
        f"{', '.join(names).replace('_', ' ')}, prompts of {info.max_prompt_tokens} tokens, "
        f"probe answered in {generation.timings_ms['total']:.0f} ms{sent}"
    )
    return Check("model", found)
