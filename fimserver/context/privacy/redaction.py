"""Replace secrets in files by ``x`` before a model sees them.

    mask        return a text of the same length without secrets
    mask_part   the same for a part, by the text around it
    has_secret  return whether a text holds a secret
    reveals     return whether a text, appended to another, would show a secret

A secret is known by its form (``tokens.py``), by its name (``named.py``), or by being random (``values.py``).
detect-secrets was tried: its pattern for GitHub covers the token's prefix alone, it takes 0.13 ms a line, and it brings
an HTTP library into this process.

Knows:  texts.  Never: files.
"""

import re

from fimserver.context.privacy.named import find_named
from fimserver.context.privacy.tokens import find_tokens
from fimserver.context.privacy.values import find_random

_FILLER = "x"
_SECRET_REACH = 8_000  # characters outside a part where a secret may begin or end
_KEY_REACH = 200_000  # the same for a private key
_KEY_BEGINS, _KEY_ENDS = "-----BEGIN ", "-----END "
_CHARACTER = re.compile(r"[^\r\n]")
_KEY_LINE = re.compile(r"[A-Za-z0-9+/]{40,}={0,2}")  # of a private key that begins elsewhere
_LEAST_DIGITS = 3


def mask(text: str) -> str:
    """Replace every character of each secret in a text; keep line ends."""
    text = _cross_out(text, [*find_tokens(text), *find_random(text)])
    return _cross_out(text, [*find_named(text)])


def _cross_out(text: str, ranges: list[tuple[int, int]]) -> str:
    parts, done = [], 0
    for start, end in sorted(ranges):
        if end > done:
            start = max(start, done)  # noqa: PLW2901  they may overlap
            parts += [text[done:start], _CHARACTER.sub(_FILLER, text[start:end])]
            done = end
    return "".join([*parts, text[done:]]) if parts else text


def mask_part(text: str, start: int, end: int) -> str:
    """Return ``[start, end)`` of a text with its secrets masked, as the text around it shows them."""
    first = _above_keys(text, max(0, start - _SECRET_REACH))
    return mask(text[first : end + _SECRET_REACH])[start - first : end - first]


def _above_keys(text: str, start: int) -> int:
    """Return where masking has to begin: the cut may be in the middle of a key, or of a token at the cursor."""
    begin = text.rfind(_KEY_BEGINS, max(0, start - _KEY_REACH), start)
    return begin if begin >= 0 and text.find(_KEY_ENDS, begin, start) < 0 else start


def has_secret(text: str) -> bool:
    """Return whether ``mask`` would change a text."""
    return mask(text) != text


def _is_key_line(line: str) -> bool:
    """Return whether a line may be one of a private key: not a ruler, a path or a long name."""
    if _KEY_LINE.fullmatch(line) is None or line.count("/") > len(line) // 8:
        return False
    cases = any(map(str.islower, line)), any(map(str.isupper, line)), sum(map(str.isdigit, line)) >= _LEAST_DIGITS
    return all(cases)


def reveals(before: str, text: str) -> bool:
    """Return whether offering ``text`` after ``before``, the start of the cursor's line, would show a secret.

    A text that ends within a literal counts as if the literal ended there.
    """
    line = before + text
    is_key = any(_is_key_line(part.strip()) for part in line.splitlines())
    return is_key or any(has_secret(line + end) for end in ("", '"', "'"))
