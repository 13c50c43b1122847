"""The walls between the rooms: who may import whom, and which process may hold torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fimserver

PACKAGE = Path(fimserver.__file__).parent

# room or file -> what its modules may not import
FORBIDDEN = {
    "lsp": [
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "fimserver.engine.engine",
        "fimserver.engine.modeling.model",
        "fimserver.engine.prompt",
        "fimserver.engine.decoding.denoise",
        "fimserver.engine.vocabulary",
        "fimserver.engine.worker",
    ],
    "context": ["torch", "transformers", "tokenizers", "pygls", "lsprotocol", "fimserver.lsp", "fimserver.engine"],
    "training": ["pygls", "lsprotocol", "tree_sitter", "platformdirs", "fimserver.lsp", "click"],
    "engine": ["pygls", "lsprotocol", "tree_sitter", "fimserver.lsp", "fimserver.context", "click", "rich"],
    "text.py": ["torch", "pygls", "tree_sitter", "fimserver.lsp", "fimserver.context", "fimserver.engine"],
    "datatypes.py": ["torch", "pygls", "tree_sitter", "fimserver.lsp", "fimserver.context", "fimserver.engine"],
}
# the one door in a wall: what a file's functions may import, and only they
DOORS = {
    "engine/decoding/grammar.py": {
        "fimserver.context.continuation",
        "fimserver.context.languages",
        "fimserver.context.scan",
        "fimserver.context.syntax",
    }
}
STANDARD_LIBRARY_ONLY = [
    *(
        "text.py",
        "datatypes.py",
        "errors.py",
        "settings.py",
        "daemon/build.py",
        "frames.py",
        "engine/client.py",
        "engine/schedule.py",
    ),
    *(
        "lsp/__init__.py",
        "daemon/relay.py",
        "daemon/replica.py",
        "daemon/transport.py",
        "framing.py",
        "daemon/launch.py",
        "daemon/service_units.py",
    ),
]


def imports(path: Path, *, in_functions: bool = True) -> set[str]:
    found = set()
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(module) if in_functions else module.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("room", list(FORBIDDEN))
def test_walls(room: str) -> None:
    place = PACKAGE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    for file in files:
        door = DOORS.get(str(file.relative_to(PACKAGE)), set())
        behind_door = {name for name in imports(file) if name in door or name.rpartition(".")[0] in door}
        for name in imports(file) - behind_door | imports(file, in_functions=False):
            crossed = [f for f in FORBIDDEN[room] if name == f or name.startswith(f + ".")]
            assert not crossed, f"{file.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("file", STANDARD_LIBRARY_ONLY)
def test_standard_library_only(file: str) -> None:
    for name in imports(PACKAGE / file):
        top = name.split(".")[0]
        assert top == "fimserver" or top in sys.stdlib_module_names, f"{file} imports {name}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fimserver.lsp.features", ["torch", "transformers", "tokenizers", "numpy", "platformdirs"]),
        ("fimserver.cli.main", ["torch", "pygls", "tree_sitter", "rich", "platformdirs"]),
        ("fimserver.engine.worker", ["torch", "pygls", "tree_sitter"]),
        ("fimserver.engine.engine", ["pygls", "tree_sitter", "platformdirs", "click"]),
        ("fimserver.bench.infilling", ["pygls", "tree_sitter", "platformdirs", "torch"]),
        ("fimserver.training.command", ["pygls", "lsprotocol", "tree_sitter", "platformdirs", "click", "matplotlib"]),
        ("fimserver.training.corpus", ["torch", "pygls", "tree_sitter", "platformdirs", "click", "rich"]),
    ],
)
def test_what_an_import_brings_along(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_is_named_for_nothing() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert file.stem not in {"utils", "common", "base", "manager", "helpers", "misc"}


def test_nothing_unpickles() -> None:
    """A pickle file can run code: weights are safetensors, everything else JSON, TOML or text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        found = imports(path) & {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
        assert not found, f"{path}: {found}"
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        for call in calls:
            if ast.unparse(call.func) in {"torch.load", "numpy.load", "np.load"}:
                allowed = {ast.unparse(keyword) for keyword in call.keywords}
                assert allowed & {"weights_only=True", "allow_pickle=False"}, f"{path}:{call.lineno}"
