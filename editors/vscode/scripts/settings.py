# ruff: noqa: INP001  a script next to TypeScript, not a package
"""Write the settings of package.json from the server's own table.

    python scripts/settings.py            write them
    python scripts/settings.py --check    exit with code 1 if they differ

Needs a Python with fimserver installed. This file defines only the extension's own settings and which come first.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimserver.settings import BY_WIRE_NAME, ENGINE_SETTINGS, REMOTE_BY_WIRE_NAME, Remote, to_wire_value

if TYPE_CHECKING:
    from dataclasses import Field

MANIFEST = Path(__file__).parent.parent / "package.json"
OWN: dict[str, dict[str, Any]] = {
    "serverPath": {
        "type": "string",
        "default": "",
        "scope": "machine-overridable",
        "markdownDescription": "Full path of the server's program; may begin with `~` or `${workspaceFolder}`. "
        "If empty, the program is searched for "
        "in the workspace's `.venv` and `venv`, on PATH, and in the extension's own folder. Ignored in a "
        "workspace that you do not trust.",
    },
    "torchIndex": {
        "type": "string",
        "default": "",
        "scope": "machine",
        "markdownDescription": "Package index from which *Install the Server* takes torch and what torch needs, such "
        "as a mirror in your company. If empty, PyTorch's own index is used. All other packages come from the index "
        "that pip or uv is set to.",
    },
    "trace.server": {
        "type": "string",
        "default": "off",
        "enum": ["off", "messages", "verbose"],
        "scope": "window",
        "markdownDescription": "Logs the messages between editor and server. `verbose` includes your code. "
        "The log's level must also be *Trace*.",
    },
}

FIRST = ("enabled", "languages", "model", "engine", "wordStart", "maxLines")  # settings that many users change


def _type_of(setting: "Field[Any]") -> dict[str, Any]:
    """Return the JSON schema of a setting's values."""
    m = setting.metadata
    if m["choices"]:
        return {"type": "string", "enum": list(m["choices"])}
    if isinstance(setting.default, Remote):
        parts = {name: {**_type_of(part), **_described(part)} for name, part in REMOTE_BY_WIRE_NAME.items()}
        return {"type": "object", "properties": parts, "additionalProperties": False}
    if m["pattern"]:
        pattern, words = m["pattern"].pattern, m["written"] or "auto, cpu, cuda, cuda:N or mps"
        return {"type": "string", "pattern": f"^(?:{pattern})$", "patternErrorMessage": words}
    if m["low"] is not None:
        number = "number" if "float" in str(setting.type) else "integer"
        high = min(m["high"], 2**53 - 1)  # the largest integer that JavaScript represents exactly
        kind = [number, "null"] if "None" in str(setting.type) else number
        return {"type": kind, "minimum": m["low"], "maximum": high}
    if isinstance(setting.default, tuple):
        return {"type": "object", "additionalProperties": {"type": "boolean"}}
    return {"type": "boolean" if setting.type is bool else "string"}


def _described(setting: "Field[Any]") -> dict[str, Any]:
    return {"default": setting.default, "markdownDescription": setting.metadata["doc"].replace("*", "\\*")}


def to_properties() -> dict[str, dict[str, Any]]:
    """Return ``contributes.configuration.properties``: those that many users change, then the others as advanced."""
    schemas = OWN | {
        name: {
            **_type_of(setting),
            "default": to_wire_value(setting.default) if setting.default != () else {},
            "scope": "machine-overridable" if name in ENGINE_SETTINGS else "window",
            "markdownDescription": setting.metadata["doc"].replace("*", "\\*"),
        }
        for name, setting in BY_WIRE_NAME.items()
    }
    names = [*FIRST, *(name for name in schemas if name not in FIRST)]
    return {
        f"fimserver.{name}": {
            **schemas[name],
            **({} if name in FIRST else {"tags": ["advanced"]}),
            "order": order,
        }
        for order, name in enumerate(names)
    }


def to_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return package.json with the server's settings."""
    contributes = manifest["contributes"]
    configuration = {**contributes["configuration"], "properties": to_properties()}
    restricted = [f"fimserver.{name}" for name in ("serverPath", *ENGINE_SETTINGS)]
    untrusted = {**manifest["capabilities"]["untrustedWorkspaces"], "restrictedConfigurations": restricted}
    return {
        **manifest,
        "capabilities": {**manifest["capabilities"], "untrustedWorkspaces": untrusted},
        "contributes": {**contributes, "configuration": configuration},
    }


def main() -> int:
    """Write package.json, or check whether it would change."""
    parser = argparse.ArgumentParser(description="Write the settings of package.json from the server's own table.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if they differ")
    text = MANIFEST.read_text(encoding="utf-8")
    wanted = json.dumps(to_manifest(json.loads(text)), indent=2, ensure_ascii=False) + "\n"
    if parser.parse_args().check:
        if text != wanted:
            sys.stderr.write("package.json differs from the server's settings; run scripts/settings.py\n")
        return int(text != wanted)
    MANIFEST.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
