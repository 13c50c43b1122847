"""A program in a terminal without a window: keys go in, the text on the screen is compared."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from support import debian
from support.real_editors import SLOW_S, UnavailableError, wait_until


def find_tmux() -> None:
    """Have tmux. Raises ``UnavailableError``."""
    if shutil.which("tmux") is None and (message := debian.install("tmux")):
        raise UnavailableError(message)


class Tmux:
    """One program; ``close`` ends it."""

    def __init__(
        self,
        socket: Path,
        *command: object,
        env: Mapping[str, str],
        size: tuple[int, int] = (100, 24),
        cwd: Path | None = None,
    ) -> None:
        """``env`` over what there is; ``size`` in columns and lines; ``cwd`` if not the test's."""
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        variables = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **env}
        assigned = [f"{name}={value}" for name, value in variables.items()]
        width, height = size
        where = [] if cwd is None else ["-c", cwd]
        self.call("new-session", "-d", *where, "-x", width, "-y", height, "env", *assigned, *command)
        self.call("set-option", "-g", "escape-time", 0)

    def call(self, *arguments: object) -> str:
        """Return the output of a tmux command."""
        command = [*self._tmux, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW_S, check=False)
        assert not done.returncode, done.stderr
        return done.stdout

    def send(self, *keys: str) -> None:
        """Press keys, by tmux's names: Escape, Tab, M-Right, C-n."""
        self.call("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a text literally."""
        self.call("send-keys", "-l", "--", text)

    def screen(self, *, colors: bool = False) -> str:
        """Return the screen; with ``colors`` as escape sequences."""
        return self.call("capture-pane", "-p", *(["-e"] if colors else []))

    def watch(self, file: Path) -> None:
        """Write all that the program sends to the terminal into a file too."""
        file.touch()
        self.call("pipe-pane", f"cat >> {file}")

    def wait_for(self, text: str, timeout: float = SLOW_S) -> str:
        """Wait until ``text`` is on the screen; return the screen."""
        try:
            return str(wait_until(lambda: s if text in (s := self.screen()) else "", text, timeout))
        except AssertionError:
            message = f"not on the screen within {timeout:.0f} s: {text!r}\n{self.screen()}"
            raise AssertionError(message) from None

    def wait_without(self, text: str, timeout: float = SLOW_S) -> str:
        """Wait until ``text`` is no longer on the screen; return the screen."""
        return str(wait_until(lambda: s if text not in (s := self.screen()) else "", f"no {text!r}", timeout))

    def close(self) -> None:
        """End it."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)
