"""``fimserver doctor``: what is installed, and whether the model loads and answers.

Knows:  packages, the machine, the engine's client.  Never: LSP, torch (the engine's process imports it).
"""

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from rich.console import Console
from rich.text import Text

from fimserver import __version__
from fimserver.context.languages import LANGUAGES
from fimserver.context.syntax import GRAMMAR_ERRORS, load_parser
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.errors import EngineError
from fimserver.paths import config_file
from fimserver.settings import Settings, read_config_file
from fimserver.types import FimContext, Hole, HoleKind, Sampling

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
_LEAST_FREE_BYTES = 1_500_000_000  # torch, transformers and the shipped model in one process
_PROBE = "def add(first, second):\n    return first + "


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, what was found, and how to mend it when it is not good."""

    name: str
    found: str
    remedy: str = ""


def run_checks(settings: Settings) -> bool:
    """Print every check; whether all are good."""
    console = Console(highlight=False, soft_wrap=True)
    good = True
    for check in (check_python, check_packages, check_memory, check_grammar, check_config, check_model):
        result = check(settings)
        mark = ("FAIL", "bold red") if result.remedy else ("ok  ", "green")
        console.print(Text.assemble(mark, f" {result.name:9} {result.found}"))
        if result.remedy:
            console.print(Text(f"     {'':9} {result.remedy}"))
            good = False
    return good


def check_python(_settings: Settings) -> Check:
    """Version and place of the interpreter."""
    return Check(
        "python", f"{platform.python_version()} ({sys.executable}), fimserver {__version__}, {platform.platform()}"
    )


def check_packages(_settings: Settings) -> Check:
    """Versions of what is needed."""
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    remedy = (
        f"missing: {', '.join(missing)}; install with: {sys.executable} -m pip install fimserver" if missing else ""
    )
    return Check("packages", ", ".join(found), remedy)


def check_memory(_settings: Settings) -> Check:
    """Main memory, where the system tells."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Check("memory", "the system does not tell")
    found = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB unused"
    if total < _LEAST_FREE_BYTES:
        return Check("memory", found, f"the engine needs about {_LEAST_FREE_BYTES / 1e9:.1f} GB")
    return Check("memory", found)


def check_grammar(_settings: Settings) -> Check:
    """Whether the syntax trees work."""
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
    """The person's own settings, where there are any."""
    path = config_file()
    values, problems = read_config_file(path)
    if problems:
        return Check("config", str(path), "; ".join(problems))
    return Check("config", f"{path} ({', '.join(values) or 'nothing set'})" if path.exists() else f"{path} (absent)")


def check_model(settings: Settings) -> Check:
    """Whether the model loads and answers one probe, in a process of its own as in real use."""
    engine = EngineClient(EngineOptions().under(settings))
    hole = Hole(HoleKind.REST_OF_LINE, max_lines=1, estimated_tokens=8)
    try:
        engine.start()
        info = engine.wait_until_ready(LOAD_TIMEOUT_S)
        pending = engine.complete(FimContext(_PROBE, "\n", "probe.py", "python", hole), Sampling(seed=0, min_tokens=1))
        generation = pending.future.result(LOAD_TIMEOUT_S)
    except (EngineError, TimeoutError) as error:
        return Check(
            "model",
            f"{settings.model} on {settings.device}",
            str(error) or "no answer: kill python processes of fimserver and try again",
        )
    finally:
        engine.close()
    wide = "" if info.row_cost is None else f" (one more row adds {info.row_cost:.0%} to a pass)"
    found = (
        f"{info.name}, {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}, "
        f"{info.num_threads} threads, mode {info.preferred_mode}{wide}, loaded in {info.load_ms:.0f} ms, "
        f"probe answered in {generation.timings_ms['total']:.0f} ms ({generation.mode})"
    )
    return Check("model", found)
