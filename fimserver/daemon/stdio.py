"""Serve one editor over stdio: through the daemon if possible, else in this process.

    serve        -> the exit code; the relay if a daemon can be reached or started
    run_stdio    -> the exit code; without a daemon, shared with no other editor

Imports only the standard library until a daemon is known to be missing: the relay has to start at once.

Knows:  the relay, the language server.  Never: options of the command line.
"""

import sys
from typing import Any


def serve(overrides: dict[str, object], *, has_daemon: bool = True) -> int:
    """Serve an editor over stdio; return the exit code. ``overrides`` are settings of the command line."""
    from fimserver.errors import FimserverError  # noqa: PLC0415

    if has_daemon:
        from fimserver.daemon.relay import main as relay  # noqa: PLC0415

        try:
            return relay(overrides)
        except (FimserverError, OSError) as error:  # nothing has been read from the editor yet
            sys.stderr.write(f"fimserver: {error}\nfimserver: this editor is served without a daemon\n")
    return run_stdio(overrides)


def run_stdio(overrides: dict[str, Any] | None = None) -> int:
    """Serve one editor over stdio until it leaves; return 0 after an orderly ``shutdown``, else 1."""
    from fimserver.engine.early import start_early_worker  # noqa: PLC0415  subprocess

    start_early_worker()
    from fimserver.daemon.logs import configure_logs, silence_dependencies  # noqa: PLC0415  structlog
    from fimserver.lsp.features import create_server  # noqa: PLC0415  pygls

    configure_logs(as_json=False)
    silence_dependencies()
    server = create_server(overrides)
    try:
        server.start_io()
    finally:
        server.leave("the server ended")
    return 0 if server.protocol.is_shut_down else 1
