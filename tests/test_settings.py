"""The table of settings, its checks, and that its copies agree."""

from pathlib import Path

import pytest

import fimserver
from fimserver.errors import SettingsError
from fimserver.settings import BY_WIRE_NAME, Settings, parse_settings, read_settings, to_markdown

DOCS = Path(fimserver.__file__).parent / "docs"


def test_the_documented_table_is_this_one() -> None:
    """Write it anew with: python -m fimserver.settings."""
    assert to_markdown() in (DOCS / "settings.md").read_text(encoding="utf-8")


def test_no_settings_means_the_defaults() -> None:
    assert parse_settings({}) == Settings()


@pytest.mark.parametrize("wire_name", list(BY_WIRE_NAME))
def test_every_default_is_allowed(wire_name: str) -> None:
    assert parse_settings({wire_name: BY_WIRE_NAME[wire_name].default}) == Settings()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("maxLines", 0, ["maxLines", "0", "1 to 200"]),
        ("maxLines", True, ["maxLines", "True"]),
        ("maxLines", "8", ["maxLines", "'8'"]),
        ("maxLines", None, ["maxLines", "None"]),
        ("mode", "fast", ["mode", "'fast'", "auto | diffusion | autoregressive"]),
        ("enabled", 1, ["enabled", "true | false"]),
        ("device", "gpu", ["device", "cuda:N"]),
        ("model", "", ["model", "text"]),
        ("seed", -1, ["seed", "or null"]),
        ("max_lines", 8, ["max_lines", "not a setting", "maxLines"]),
        ("logLevel", "loud", ["logLevel", "error | warning"]),
    ],
)
def test_a_bad_value_names_key_value_and_range(key: str, value: object, words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings({key: value})
    assert all(word in str(error.value) for word in words), error.value


def test_one_bad_value_leaves_the_others() -> None:
    settings, problems = read_settings({"maxLines": 3, "mode": "fast", "seed": None, "device": "cuda:1"})
    assert (settings.max_lines, settings.mode, settings.device) == (3, "auto", "cuda:1")
    assert len(problems) == 1
