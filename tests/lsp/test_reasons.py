"""Each reason for offering nothing has a headline in VS Code, and each headline a reason."""

import re
from pathlib import Path

import fimserver
from fimserver.context.unwanted import RULES
from fimserver.datatypes import HoleKind

PACKAGE = Path(fimserver.__file__).parent
EXPLAIN = PACKAGE.parent / "editors" / "vscode" / "src" / "explain.ts"


def test_each_reason_has_a_headline_in_vscode() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    reasons = set(re.findall(r'NoCompletion\(\s*"([a-z_]+)"', source)) | set(RULES)
    reasons |= {f"in_{kind.value}" for kind in (HoleKind.COMMENT, HoleKind.DOCSTRING, HoleKind.STRING)}
    table = EXPLAIN.read_text(encoding="utf-8").split("HEADLINES", 1)[1].split("};", 1)[0]
    assert set(re.findall(r"^  (\w+):", table, re.MULTILINE)) == reasons
