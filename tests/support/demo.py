"""The moving picture of README.md: a real VS Code with the extension and the shipped model, typed in and recorded.

    python tests/support/demo.py FILE.gif [THEME]    THEME is light, dark or contrast

Needs Pillow, and what ``support/vscode.py`` needs. What is shown is what the model offers, at the default settings.
"""

import io
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import vscode
from support.real_editors import SAMPLE, fimserver_home, wait_until

SIZE = (820, 460)  # pixels of the window
COLORS = 64
MOST_BYTES = 1_000_000
KEY_MS, SEEN_MS, TAKEN_MS, END_MS = 110, 1500, 900, 2500
PLAIN = {  # a window with nothing in it but the code and the status
    "workbench.activityBar.location": "hidden",
    "workbench.sideBar.location": "right",
    "workbench.layoutControl.enabled": False,
    "window.commandCenter": False,
    "breadcrumbs.enabled": False,
    "editor.fontSize": 15,
    "editor.lineHeight": 22,
    "editor.overviewRulerBorder": False,
    "editor.scrollbar.vertical": "hidden",
    "editor.scrollbar.horizontal": "hidden",
    "editor.cursorBlinking": "solid",
    "editor.occurrencesHighlight": "off",
    "editor.stickyScroll.enabled": False,
    "fimserver.minConfidence": None,
}
TYPED = [  # a line of the sample, and what is typed of it
    ("        self.quantity = quantity", "self.quantity = q"),
    ("        self.items.ap", "self.items.ap"),
    ("        return total", "return t"),
]


def record(file: Path, theme: str) -> None:
    """Write the picture; raises ``AssertionError`` if it is too large or nothing is offered."""
    from PIL import Image

    frames: list[tuple[Any, int]] = []
    text = SAMPLE
    for line, typed in TYPED:
        text = text.replace(f"{line}\n", f"{line[: line.index(typed)]}\n")
    with fimserver_home() as env, tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "inventory"
        folder.mkdir()
        (folder / "inventory.py").write_text(text, encoding="utf-8")
        settings = {**PLAIN, "workbench.colorTheme": vscode.THEMES[theme]}
        found = vscode.find_vscode()
        package = vscode.package(Path(place))
        with closing(vscode.Workbench(found, package, folder, env=env, settings=settings)) as workbench:
            window = workbench.window(*SIZE)
            window.wait_for_status("Ready", timeout=120)
            window.open(folder / "inventory.py")
            window.command("View: Toggle Primary Side Bar Visibility")
            picture = Path(place) / "frame.png"

            def take(ms: int) -> None:
                window.screenshot(picture)
                frames.append((Image.open(io.BytesIO(picture.read_bytes())).convert("RGB"), ms))

            for line, typed in TYPED:
                number = SAMPLE.split("\n").index(line) + 1
                window.go(number)
                for key in typed[:-1]:
                    window.type(key)
                    if key == typed[-2]:
                        time.sleep(0.5)
                        window.press("Escape")  # an early answer would be shown for a moment
                    take(KEY_MS)
                window.type(typed[-1])
                wait_until(window.ghost, f"an answer to {typed}", 10)
                take(SEEN_MS)
                window.take_ghost()
                window.press("Escape")
                take(TAKEN_MS)
            frames[-1] = (frames[-1][0], END_MS)
    palette = frames[len(frames) // 2][0].quantize(COLORS)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame, _ in frames]
    first.save(file, save_all=True, append_images=others, duration=[ms for _, ms in frames], loop=0, optimize=True)
    assert file.stat().st_size <= MOST_BYTES, file.stat().st_size


if __name__ == "__main__":
    record(Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "dark")
