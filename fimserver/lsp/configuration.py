"""Put together the settings of one connection, and ask for consent where a repository might have made them.

    Source          config.toml, then the editor's three ways to send settings, then the command line: the last one wins
    Configuration   the layers, the settings they make, the editor's word on workspace trust
    ConsentPrompt   asks the user about a model that only an editor's settings name, and about a server that gets code

An editor merges the user's settings with those of a repository, and the server cannot tell them apart unless the editor
names the user's own (``set_own``). So the others may name only models that the user installed or agreed to
(``checkpoints/consent.py``), and a workspace that the editor does not trust decides nothing about the engine.

Knows:  settings, consent, options of the engine.  Never: documents, LSP types except messages to the user.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from fimserver.checkpoints.consent import ANYWHERE, Agreements, find_known, is_elsewhere, is_installed, may_exist
from fimserver.checkpoints.consent import FILE_NAME as AGREEMENTS_NAME
from fimserver.engine.client import EngineOptions
from fimserver.engine.remote.address import Address, parse_address
from fimserver.engine.remote.consent import FILE_NAME as SERVERS_NAME
from fimserver.engine.remote.consent import ServerAgreements, choose_options
from fimserver.errors import SettingsError
from fimserver.paths import config_file, state_folder
from fimserver.settings import BY_WIRE_NAME, ENGINE_SETTINGS, Settings, read_settings
from fimserver.text import to_printable

TRUST_OPTION = "workspaceTrusted"  # key of initializationOptions
RESTART_COMMAND = "fimserver.restart"
_LONGEST_NAME = 300  # characters of a model in a question
_NOT_AN_OBJECT = 'the fimserver section of the settings is not an object; write for instance {"maxLines": 8}'


class Source(StrEnum):
    """Where settings come from; a later source wins."""

    CONFIG_FILE = "config.toml"
    INITIALIZATION = "initializationOptions"
    WORKSPACE = "workspace/configuration"
    CHANGE = "workspace/didChangeConfiguration"
    COMMAND_LINE = "command line"


_EDITORS = (Source.INITIALIZATION, Source.WORKSPACE, Source.CHANGE)  # a repository may have made these


class Configuration:
    """The layers of settings of one connection, and the settings that follow from them.

    ``find_model`` returns what to load for a model's name in an editor's settings, or ``None`` without consent;
    ``on_change`` is called when the settings change. Methods that take settings return one sentence for each value that
    is wrong.
    """

    def __init__(
        self,
        find_model: Callable[[str], str | None] = lambda _model: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = Settings()
        self.is_trusted = True  # the workspace, as the editor says
        self.refused_model: str | None = None  # the name that would be used if the user had agreed to it
        self.own_models: set[str] = set()  # named where a repository cannot: config.toml, the command line
        self.is_own_engine = True  # so is the engine, and where it is
        self._own: dict[str, Any] = {}  # values of WORKSPACE that are the user's own, as the editor says
        self._next_own: dict[str, Any] = {}  # those of the next answer
        self._layers: dict[Source, dict[str, Any]] = {}
        self._find_model = find_model
        self.on_change = on_change

    def initialize(self, options: object) -> list[str]:
        """Take ``initializationOptions``, bare or under ``fimserver``."""
        section = options.get("fimserver", options) if isinstance(options, dict) else {}
        trust = [part[TRUST_OPTION] for part in (options, section) if isinstance(part, dict) and TRUST_OPTION in part]
        self.is_trusted = all(value is True for value in trust)
        if not isinstance(section, dict):
            return [_NOT_AN_OBJECT]
        return self.set_layer(Source.INITIALIZATION, {key: section[key] for key in section if key != TRUST_OPTION})

    def configure(self, values: dict[str, Any], source: Source) -> list[str]:
        """Replace an editor's settings, bare or under ``fimserver``.

        A setting that is missing or null is left to the other sources. An object with sections of other tools alone
        changes nothing.
        """
        section = values.get("fimserver", values)
        if section is None:
            section = {}
        if not isinstance(section, dict):
            return [_NOT_AN_OBJECT]
        if section is values and source is Source.CHANGE and not BY_WIRE_NAME.keys() & values.keys():
            return []
        return self.set_layer(source, {name: value for name, value in section.items() if value is not None})

    def set_layer(self, source: Source, values: dict[str, Any]) -> list[str]:
        """Replace the values of one source."""
        self._layers[source] = values
        if source is Source.WORKSPACE:
            self._own = self._next_own
        return self.reread()

    def set_own(self, values: dict[str, Any]) -> None:
        """Take the editor's word on which values of its next settings are the user's own, not those of a repository.

        A setting counts as the user's only while it has that value: an answer that comes before its vouching is asked
        about, and never taken for the user's.
        """
        self._next_own = values

    def set_trust(self, *, trusted: bool) -> list[str]:
        """Take the editor's word on workspace trust, which decides which settings count."""
        self.is_trusted = trusted
        return self.reread()

    def reread(self) -> list[str]:
        """Put the settings together again: trust or consent may have changed."""
        settings, problems = Settings(), []
        self.refused_model = None
        named = (self._layers.get(source, {}).get("model") for source in Source if self._is_own(source, "model"))
        self.own_models = {Settings().model, *(model for model in named if isinstance(model, str))}
        self.is_own_engine = all(
            self._is_own(source, name) or name not in self._layers.get(source, {})
            for source in _EDITORS
            for name in ("engine", "remote")
        )
        for source in Source:
            values = self._layers.get(source, {})
            if "model" in values:
                self.refused_model = None  # a later source decides
            if source in _EDITORS:
                values = self._allowed(values, source)
            settings, more = read_settings(values, settings)
            problems += more
        if settings != self.settings:
            self.settings = settings
            self.on_change()
        return problems

    def _is_own(self, source: Source, name: str) -> bool:
        """Return whether a setting of a source is the user's own: a repository cannot have made it."""
        if source not in _EDITORS:
            return True
        values = self._layers.get(source, {})
        is_vouched = source is Source.WORKSPACE and name in self._own and name in values
        return is_vouched and values[name] == self._own[name]

    def _allowed(self, values: dict[str, Any], source: Source) -> dict[str, Any]:
        """Return an editor's settings without those that a repository must not decide."""
        if not self.is_trusted:
            return {name: value for name, value in values.items() if name not in ENGINE_SETTINGS}
        model = values.get("model")
        if not isinstance(model, str) or not model or self._is_own(source, "model"):
            return values  # a wrong value is reported when it is read
        if (folder := self._find_model(model)) is not None:
            return {**values, "model": folder}
        self.refused_model = model
        return {name: value for name, value in values.items() if name != "model"}


class ConsentPrompt:
    """The questions whether a model may be loaded that only an editor's settings name, and whether code may be sent.

    ``show_choices`` shows a message with buttons and returns the title that was clicked; ``workspaces`` returns the
    URIs of the open folders.
    """

    def __init__(
        self,
        workspaces: Callable[[], list[str]],
        show_choices: Callable[[str, list[str]], Awaitable[str | None]],
        warn: Callable[[str], None],
    ) -> None:
        self._agreements = Agreements(state_folder() / AGREEMENTS_NAME)
        self._servers = ServerAgreements(state_folder() / SERVERS_NAME)
        self._workspaces, self._show_choices, self.warn = workspaces, show_choices, warn
        self._asked_about: set[str] = set()

    def find_model(self, model: str) -> str | None:
        """Return what to load for a name in an editor's settings; ``None`` if the user did not agree to it."""
        if (known := find_known(model)) is not None:
            return known
        return None if is_elsewhere(model) else self._agreements.find_folder(model, self._workspaces())

    def may_use(self, folder: str) -> bool:
        """Return whether a window may be served by a model that another one has chosen."""
        return is_installed(folder) or self.digest_of(folder) is not None

    def digest_of(self, folder: str) -> str | None:
        """Return the contents of a model folder that the user agreed to for the open workspaces, or ``None``."""
        return self._agreements.find_digest(folder, self._workspaces())

    def choose_options(self, options: EngineOptions, *, is_own: bool) -> tuple[EngineOptions, Address | None]:
        """Return the options that the user agreed to, and the server to which nothing may be sent yet."""
        try:
            return choose_options(options, self._servers, self._workspaces(), is_own=is_own)
        except SettingsError as error:
            self.warn(f"fimserver: {error}")
            return replace(options, engine="local"), None

    def may_send(self, options: EngineOptions) -> bool:
        """Return whether code of the open workspaces may be sent where an engine with these options sends it."""
        if not options.agreed:
            return True
        return self._servers.is_agreed(parse_address(options.agreed), options.remote.api_key, self._workspaces())

    def may_ask_server(self, address: Address) -> bool:
        """Return whether to ask about a server; each is asked about once, until ``revoke``."""
        if address.origin in self._asked_about:
            return False
        self._asked_about.add(address.origin)
        if self._servers.is_refused(address, self._workspaces()):
            self.warn(
                f"fimserver.engine is a server at {address.origin}, which you declined here; to allow it, run: "
                f"fimserver engine allow {address.origin}"
            )
            return False
        return True

    async def ask_server(self, options: EngineOptions, address: Address, is_still_wanted: Callable[[], bool]) -> bool:
        """Ask whether code may be sent to a server, and store the answer; return whether it may have changed."""
        here, everywhere, never = "Send it from this workspace", "Send it from everywhere", "Do not send it"
        elsewhere = "this machine, with a key" if address.is_loopback else "another machine"
        key = f" The key that {options.remote.api_key} holds is sent along." if options.remote.api_key else ""
        open_text = "" if address.is_encrypted or address.is_loopback else " It is not encrypted on its way."
        text = (
            f"Send code to {_shorten(address.origin)}? The settings name the engine {options.engine} there: the code "
            f"around the cursor would be sent to {elsewhere}.{key}{open_text} Until you agree, fimserver's own engine "
            "answers."
        )
        return await self._ask(
            text,
            (here, everywhere, never),
            is_still_wanted,
            agree=lambda where: self._servers.agree(address, options.remote.api_key, where),
            refuse=lambda where: self._servers.refuse(address, where),
            file=state_folder() / SERVERS_NAME,
        )

    def revoke(self, folder: str) -> None:
        """Forget the agreements to a folder whose contents have changed, and ask about it again."""
        with suppress(OSError):
            self._agreements.revoke(folder)
        self._asked_about.clear()

    def may_ask(self, model: str) -> bool:
        """Return whether to ask about a model that is not in use; warn where it cannot be loaded at all.

        Each model is asked about once, until ``revoke``.
        """
        if model in self._asked_about:
            return False
        self._asked_about.add(model)
        if not self.can_be_asked(model):
            return False
        if self._agreements.is_refused(model, self._workspaces()):
            self.warn(
                f"fimserver.model is {_shorten(model)}, which you declined here; remove the setting, or run the "
                f"command {RESTART_COMMAND} to be asked again"
            )
            return False
        return True

    @staticmethod
    def why_refused(model: str | None) -> str | None:
        """Return why a model is not in use: ``not_allowed``, or ``not_found`` for a name that no model has."""
        if model is None:
            return None
        return "not_allowed" if may_exist(model) and not is_elsewhere(model) else "not_found"

    def can_be_asked(self, model: str) -> bool:
        """Return whether a name can be that of a model on this machine; warn if not."""
        if is_elsewhere(model):
            needs_none = f"fimserver.model in {config_file()} needs no consent"
            self.warn(f"fimserver.model is a folder of another machine, which editors may not name; {needs_none}")
            return False
        if not may_exist(model):
            self.warn(
                f"the model {_shorten(model)} does not exist: fimserver.model has to be a full path or the name of an "
                f"added model; add it with: fimserver model add {_shorten(model)}"
            )
            return False
        return True

    async def ask(self, model: str, is_still_wanted: Callable[[], bool]) -> bool:
        """Ask the user, and store the answer; return whether it may have changed the settings."""
        here, everywhere, never = "Load it in this workspace", "Load it everywhere", "Do not load it"
        text = (
            f"Load the model {_shorten(model)}? The settings name it, and fimserver does not know it. A repository can "
            "bring such a setting with it, so it is loaded only if you agree. "
            f"(fimserver.model in {config_file()} needs no consent.)"
        )
        return await self._ask(
            text,
            (here, everywhere, never),
            is_still_wanted,
            agree=lambda where: self._agreements.agree(model, where),
            refuse=lambda where: self._agreements.refuse(model, where),
            file=state_folder() / AGREEMENTS_NAME,
        )

    async def _ask(  # noqa: PLR0913  the parts of a question
        self,
        text: str,
        titles: tuple[str, str, str],
        is_still_wanted: Callable[[], bool],
        *,
        agree: Callable[[list[str]], None],
        refuse: Callable[[list[str]], None],
        file: Path,
    ) -> bool:
        """Ask with the titles for this workspace, for all, and for none; store the answer in ``file``."""
        here, everywhere, never = titles
        answer: str | None = None
        with suppress(Exception):  # an editor that cannot ask cannot give consent
            answer = await self._show_choices(text, [*((here,) if self._workspaces() else ()), everywhere, never])
        if answer is None or not is_still_wanted():
            return False
        try:
            if answer == never:
                refuse(self._workspaces())
            elif answer in {here, everywhere}:
                where = [ANYWHERE] if answer == everywhere else self._workspaces()
                await asyncio.to_thread(agree, where)  # it may read a folder
        except (OSError, RuntimeError) as error:
            self.warn(f"{file} cannot be written ({error}); fix its folder")
            return False
        return True


def _shorten(name: str) -> str:
    """Return a name from outside as one line of printable text."""
    shown = to_printable(name)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}..."
