"""Measure or open a real editor: ``python -m tests.editors neovim latency``; without arguments, see what there is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import neovim, vscode

EDITORS = {"neovim": neovim, "vscode": vscode}

if __name__ == "__main__":
    name, *rest = [*sys.argv[1:], ""]
    if name in EDITORS:
        EDITORS[name].main([argument for argument in rest if argument])
    else:
        print(neovim.__doc__, vscode.__doc__, sep="\n")
