"""The layout: how many modules are where, what they are called, and what an import brings along.

Who may import whom is in the contracts of import-linter (``[tool.importlinter]`` in pyproject.toml).
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fimserver

PACKAGE = Path(fimserver.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
PACKAGES = ["torch", "transformers", "tokenizers", "numpy", "pygls", "tree_sitter", "click", "rich", "platformdirs"]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fimserver.daemon.relay", PACKAGES),
        ("fimserver.daemon.launch", PACKAGES),
        ("fimserver.engine.client", PACKAGES),
        ("fimserver.lsp.features", ["torch", "transformers", "tokenizers", "numpy", "platformdirs", "tree_sitter"]),
        ("fimserver.analysis.worker", ["torch", "transformers", "pygls", "platformdirs", "click"]),
        ("fimserver.cli.main", ["torch", "pygls", "tree_sitter", "rich", "platformdirs"]),
        ("fimserver.engine.worker", ["torch", "pygls", "tree_sitter"]),
        ("fimserver.engine.engine", ["pygls", "tree_sitter", "platformdirs", "click"]),
        ("fimserver.checkpoints.planner", ["torch", "transformers", "pygls", "tree_sitter"]),
        ("fimserver.checkpoints.hub", ["torch", "transformers", "huggingface_hub"]),
        ("fimserver.bench.infilling", ["pygls", "tree_sitter", "platformdirs", "torch"]),
        ("fimserver.training.command", ["pygls", "lsprotocol", "tree_sitter", "platformdirs", "click", "matplotlib"]),
        ("fimserver.training.corpus", ["torch", "pygls", "tree_sitter", "platformdirs", "click", "rich"]),
    ],
)
def test_what_an_import_brings_along(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_at_most_ten_modules_at_the_root() -> None:
    assert len([path for path in MODULES if path.parent == PACKAGE]) <= 10


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_at_most_sixteen_files_in_a_folder(folder: Path) -> None:
    assert len([path for path in folder.iterdir() if path.is_file()]) <= 16


def test_modules_have_names_of_their_own() -> None:
    """No module is called like one of the standard library's, and none for nothing."""
    for path in MODULES:
        assert path.stem not in {"utils", "common", "base", "manager", "helpers", "misc"}, path
        if path.name not in {"__init__.py", "__main__.py"}:
            assert path.stem not in sys.stdlib_module_names, path


def test_nothing_unpickles() -> None:
    """A pickle file can run code: weights are safetensors, everything else JSON, TOML or text."""
    for path in MODULES:
        found = imports(path) & {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
        assert not found, f"{path}: {found}"
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        for call in calls:
            if ast.unparse(call.func) in {"torch.load", "numpy.load", "np.load"}:
                allowed = {ast.unparse(keyword) for keyword in call.keywords}
                assert allowed & {"weights_only=True", "allow_pickle=False"}, f"{path}:{call.lineno}"
