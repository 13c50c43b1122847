"""The private members of pygls that our protocol uses: each has to be looked at again when pygls is upgraded."""

import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

from pygls.protocol import LanguageServerProtocol
from pygls.protocol.json_rpc import JsonRPCProtocol

from fimserver.lsp import protocol
from fimserver.lsp.protocol import FimProtocol

PRIVATE = {
    "_execute_handler",
    "_handle_cancel_notification",
    "_request_futures",
    "_send_data",
    "_send_response",
    "_server",
    "_shutdown",
}


def test_the_pinned_version_is_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    pins = [name for name in project["project"]["dependencies"] if name.startswith("pygls==")]
    assert pins == [f"pygls=={importlib.metadata.version('pygls')}"]


def test_no_other_private_member_is_used() -> None:
    source = inspect.getsource(protocol)
    used = set(re.findall(r"(?:self|super\(\))\.(_[a-z]\w*)", source))
    own = {name for name in vars(FimProtocol) if name.startswith("_")} | {
        "_initialized",
        "_initialize_id",
        "_client_versions",
    }
    overridden = {name for name in own if hasattr(LanguageServerProtocol, name)} - {"__init__", "__module__", "__doc__"}
    assert {name for name in used - own | overridden if not name.startswith("__")} == PRIVATE


def test_they_exist() -> None:
    made = inspect.getsource(JsonRPCProtocol)
    for name in PRIVATE:
        assert hasattr(LanguageServerProtocol, name) or f"self.{name}" in made, name
