"""Register one handler for each LSP method and command, and create the server of a connection.

    create_server -> FimLanguageServer with every feature and command registered

Knows:  pygls' registration, names of methods and commands.  Never: how a request is answered.
"""

import json
from typing import Any

from lsprotocol import types as lsp

from fimserver.analysis.client import AnalysisClient
from fimserver.engine.client import EngineClient
from fimserver.lsp.completer import FIRST_LINE
from fimserver.lsp.configuration import RESTART_COMMAND, Source
from fimserver.lsp.convert import ACCEPT_COMMAND
from fimserver.lsp.server import FimLanguageServer

EXPLAIN_COMMAND = "fimserver.explain"
TRUST_NOTIFICATION = "fimserver/didChangeWorkspaceTrust"
OWN_NOTIFICATION = "fimserver/ownSettings"
SNOOZE_COMMAND = "fimserver.snooze"
_TRIGGERS = [".", "(", "[", "{", "=", ",", " ", ":", "<", '"', "'", "/", "@"]


def create_server(
    overrides: dict[str, Any] | None = None,
    engine: EngineClient | None = None,
    analysis: AnalysisClient | None = None,
) -> FimLanguageServer:
    """Create the server of one connection; ``overrides`` are settings of the command line, which win over the editor's.

    ``engine`` and ``analysis`` are shared with other connections; without them the server starts its own.
    """
    server = FimLanguageServer(overrides, engine, analysis)
    _register_features(server)
    _register_commands(server)
    return server


def to_sentence(answer: dict[str, Any]) -> str:
    """Return the answer of ``fimserver.explain`` as one sentence."""
    engine, last = answer["engine"], answer["last"]
    if last is None:
        return f"fimserver: no request yet; the engine is {engine['state']} ({engine['detail']})"
    if last.get("source") == FIRST_LINE:
        return "fimserver: the last request was answered with a completion's first line; the next request gets the rest"
    if last["outcome"] == "offered":
        return "fimserver: the last request was answered with a completion"
    return f"fimserver: nothing was offered, because {last['detail']} ({last['reason']})"


def _register_features(server: FimLanguageServer) -> None:
    """Register the handlers of LSP's methods; pygls derives the capabilities from them."""

    @server.feature(lsp.INITIALIZE)
    def initialize(params: lsp.InitializeParams) -> None:
        server.initialize(params)
        if server.wants_menu(params.capabilities):
            _register_menu(server)

    @server.feature(lsp.INITIALIZED)
    def initialized(_params: lsp.InitializedParams) -> None:
        server.begin()

    @server.feature(lsp.SHUTDOWN)
    def shutdown(_params: None) -> None:
        server.leave("the server was shut down")

    @server.feature(lsp.WORKSPACE_DID_CHANGE_CONFIGURATION)
    def did_change_configuration(params: lsp.DidChangeConfigurationParams) -> None:
        configuration = server.configuration
        if isinstance(params.settings, dict) and params.settings:
            server.apply_settings(configuration.configure(params.settings, Source.CHANGE))
        elif server.asks_for_settings:
            server.apply_settings(configuration.set_layer(Source.CHANGE, {}))
        if server.asks_for_settings:
            server.keep(server.pull_settings())

    # Without the options object pygls does not advertise the capability.
    @server.feature(lsp.TEXT_DOCUMENT_INLINE_COMPLETION, lsp.InlineCompletionOptions())
    async def inline_completion(_params: lsp.InlineCompletionParams) -> lsp.InlineCompletionList:
        return await server.on_inline_completion()

    _register_copilots(server)
    _register_own(server)


def _read_object(text: Any) -> dict[str, Any]:
    """Return the JSON object in a text; an empty one for anything else."""
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _find_uri(params: Any) -> str | None:
    """Return the document that untyped parameters name."""
    uri = getattr(getattr(params, "textDocument", None), "uri", None)
    return uri if isinstance(uri, str) else None


def _find_completion(params: Any) -> str | None:
    """Return the id of the completion in untyped parameters: an argument of the item's command."""
    arguments = getattr(getattr(getattr(params, "item", None), "command", None), "arguments", None)
    found = arguments[0] if isinstance(arguments, list | tuple) and arguments else None
    return found if isinstance(found, str) else None


def _register_own(server: FimLanguageServer) -> None:
    """Register fimserver's own requests, for editors that prefer them to commands: docs/reference/protocol.md."""

    @server.feature("fimserver/explain")
    def explain(params: Any) -> dict[str, Any]:
        return server.explain(_find_uri(params))

    @server.feature("fimserver/snooze")
    def snooze(params: Any) -> dict[str, Any]:
        server.session.snooze(getattr(params, "minutes", None))
        return {"minutes": server.session.snoozed_minutes()}

    @server.feature("fimserver/status")
    def status(params: Any) -> dict[str, Any]:
        language_id = getattr(params, "languageId", None)
        return server.status(language_id if isinstance(language_id, str) else None)

    @server.feature(OWN_NOTIFICATION)
    def did_vouch_for_settings(params: Any) -> None:
        server.session.counters["ownSettings"] += 1
        server.configuration.set_own(_read_object(getattr(params, "settings", None)))

    @server.feature(TRUST_NOTIFICATION)
    def did_change_trust(params: Any) -> None:
        server.session.counters["didChangeWorkspaceTrust"] += 1
        trusted = getattr(params, "trusted", None)
        if isinstance(trusted, bool):
            server.apply_settings(server.configuration.set_trust(trusted=trusted))

    @server.feature(lsp.WORKSPACE_DID_CHANGE_WORKSPACE_FOLDERS)
    def did_change_folders(_params: lsp.DidChangeWorkspaceFoldersParams) -> None:
        server.apply_settings(server.configuration.reread())  # a model was agreed to in some folders only


def _register_copilots(server: FimLanguageServer) -> None:
    """Register notifications that clients of Copilot's server send, under Copilot's names."""

    @server.feature("textDocument/didShowCompletion")
    def did_show(params: Any) -> None:
        server.session.counters["didShowCompletion"] += 1
        if (completion := _find_completion(params)) is not None:
            server.usage.acceptance.on_reported_shown(completion)

    @server.feature("textDocument/didPartiallyAcceptCompletion")
    def did_accept_partially(params: Any) -> None:
        server.session.counters["didPartiallyAcceptCompletion"] += 1
        if (completion := _find_completion(params)) is not None:
            length = getattr(params, "acceptedLength", None)
            server.usage.acceptance.on_reported_accepted(completion, length if isinstance(length, int) else None)

    @server.feature("textDocument/didFocus")
    def did_focus(params: Any) -> None:
        server.session.counters["didFocus"] += 1
        server.engine.focus(id(server.session), _find_uri(params))
        server.link.wake()


def _register_menu(server: FimLanguageServer) -> None:
    """Register menu completion for editors without inline completion.

    pygls reads the capabilities after ``initialize`` is handled, so this may happen during it.
    """

    @server.feature(lsp.TEXT_DOCUMENT_COMPLETION, lsp.CompletionOptions(trigger_characters=_TRIGGERS))
    async def completion(_params: lsp.CompletionParams) -> lsp.CompletionList:
        return await server.on_completion()


def _register_commands(server: FimLanguageServer) -> None:
    @server.command(ACCEPT_COMMAND)
    def accept(*arguments: Any) -> None:
        server.session.counters["accepted"] += 1
        if arguments and isinstance(arguments[0], str):
            server.usage.acceptance.on_reported_accepted(arguments[0])

    @server.command(EXPLAIN_COMMAND)
    def explain(*arguments: Any) -> dict[str, Any]:
        answer = server.explain(arguments[0] if arguments else None)
        server.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Info, to_sentence(answer)))
        return answer

    @server.command(SNOOZE_COMMAND)
    def snooze(*arguments: Any) -> None:
        server.session.snooze(arguments[0] if arguments else None)

    @server.command(RESTART_COMMAND)
    def restart(*_arguments: Any) -> None:
        server.ask_about_refused()
        server.link.restart()
