"""Emacs with both of its language clients, set up as in docs/how-to/editors.md: the menu's item is put in."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import debian

import fimserver

PAGE = Path(fimserver.__file__).parent / "docs" / "how-to" / "editors.md"
PROGRAM = Path(sys.executable).parent / "fimserver"
BLOCKS = re.findall(r"```elisp\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PACKAGES = ("emacs-nox", "elpa-lsp-mode", "elpa-eglot")
LINES = """\
class Inventory:
    def __init__(self):
        self.items = []

    def add(self, item):
        self.items.ap
"""
# The clients' own names, which the templates below use.
NAMES = {"auto_root": "lsp-auto-guess-root", "contact": "(eglot--guess-contact)"}
START = {
    "lsp-mode": """
(require 'lsp-mode) (require 'lsp-completion)
(setq lsp-enable-snippet nil {auto_root} t lsp-enable-file-watchers nil lsp-session-file "{home}/session")
(find-file "{file}")
(lsp-workspace-folders-add "{home}")
(lsp)
(wait 60 (lambda ()
  (and (lsp-workspaces) (eq 'initialized (lsp--workspace-status (car (lsp-workspaces)))))))
(fset 'at-point 'lsp-completion-at-point)
""",
    "eglot": """
(require 'eglot)
(setq eglot-sync-connect 60 eglot-connect-timeout 60)
(find-file "{file}")
(apply #'eglot {contact})
(fset 'at-point 'eglot-completion-at-point)
""",
}
WAIT = """
(require 'package)
(package-initialize)
(defun wait (seconds found)
  (let ((end (+ (float-time) seconds)) result)
    (while (and (not (setq result (funcall found))) (< (float-time) end))
      (accept-process-output nil 0.1))
    (or result (error "the condition did not become true"))))
"""
COMPLETE = """
(goto-char (point-min))
(search-forward "self.items.ap")
(wait 60 (lambda ()
  (let ((found (at-point)))
    (all-completions (buffer-substring (nth 0 found) (nth 1 found)) (nth 2 found)))))
(completion-at-point)
(princ (format "LINE: %s\\n" (buffer-substring (line-beginning-position) (line-end-position))))
"""


def find_emacs() -> str:
    """Emacs with both clients, from Debian where it is not there yet."""
    packages = Path("/usr/share/emacs/site-lisp/elpa")
    there = shutil.which("emacs") and all(any(packages.glob(f"{name}-*")) for name in ("lsp-mode", "eglot"))
    if not there and (why := debian.install(*PACKAGES)):
        pytest.skip(why)
    return str(shutil.which("emacs"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FIMSERVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    subprocess.run([PROGRAM, "daemon", "stop", "--force"], capture_output=True, check=False)


@pytest.mark.editors
@pytest.mark.parametrize("client", list(START))
def test_emacs_offers_completions_in_its_menu(home: Path, client: str) -> None:
    emacs = find_emacs()
    (settings,) = (block for block in BLOCKS if client in block)
    file, script = home / "sample.py", home / "init.el"
    file.write_text(LINES)
    own = settings.replace("/path/to/.venv/bin/fimserver", str(PROGRAM))
    script.write_text(WAIT + own + START[client].format(home=home, file=file, **NAMES) + COMPLETE)
    done = subprocess.run(
        [emacs, "--batch", "-l", str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert "LINE:         self.items.append(item)" in done.stdout, done.stdout[-500:] + done.stderr[-1500:]
