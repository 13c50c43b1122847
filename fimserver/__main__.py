"""Start the ``fimserver`` command without imports that only other commands need: an editor waits for it.

lsp                          the relay, with the standard library alone
daemon run --early-worker    the daemon for an editor that waits for it; its engine's worker starts first
all others                   ``cli/main.py``
"""

import gc
import sys
from contextlib import suppress

_SETTINGS = {"--model": "model", "--device": "device", "--threads": "threads"}


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["lsp"] and not sys.stdin.isatty():
        overrides = _parse(arguments[1:])
        if overrides is not None:
            from fimserver.daemon.stdio import serve  # noqa: PLC0415

            sys.exit(serve(overrides))
    if arguments == ["daemon", "run", "--early-worker"]:
        sys.exit(_run_daemon())
    from fimserver.cli.main import main as run  # noqa: PLC0415  click takes a while to import

    run()


def _run_daemon() -> int:
    """Run the daemon as ``fimserver daemon run`` does, and start a worker before anything else."""
    from fimserver.engine.early import start_early_worker  # noqa: PLC0415

    start_early_worker()
    gc.disable()  # collecting takes a tenth of the time of these imports
    from fimserver.daemon.server import run_daemon  # noqa: PLC0415  pygls
    from fimserver.errors import FimserverError, PathError  # noqa: PLC0415
    from fimserver.paths import use_private_caches  # noqa: PLC0415
    from fimserver.text import to_printable  # noqa: PLC0415

    gc.enable()
    with suppress(PathError):  # this process compiles nothing
        use_private_caches()
    try:
        return run_daemon()
    except FimserverError as error:
        sys.stderr.write(f"fimserver: {to_printable(str(error))}\n")
        return 1


def _parse(arguments: list[str]) -> dict[str, object] | None:
    """Return the settings among the options; ``None`` if the full command line is needed, for help and for errors."""
    values: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--stdio":  # some editors' clients add this option
            continue
        if name not in _SETTINGS or not (equals or rest):
            return None
        value = value if equals else rest.pop(0)
        if name == "--threads" and not value.isdigit():
            return None
        if name == "--model":
            from fimserver.paths import to_absolute  # noqa: PLC0415

            value = to_absolute(value)
        values[_SETTINGS[name]] = int(value) if name == "--threads" else value
    return values if not values or _is_good(values) else None


def _is_good(values: dict[str, object]) -> bool:
    from fimserver.errors import SettingsError  # noqa: PLC0415
    from fimserver.settings import parse_settings  # noqa: PLC0415

    try:
        parse_settings(values)
    except SettingsError:
        return False
    return True


if __name__ == "__main__":
    main()
