"""Secrets in otherwise fine files: what a model is shown has crosses in their place.

    mask        a text of the same length without them
    has_secret  whether there are any
    reveals     whether a text, put behind another, would say one

Known are tokens that say what they are by their beginning, private keys, passwords in URLs, and a literal with a digit
in it that is assigned to a name like password, secret, token or api_key. detect-secrets was tried first: its pattern
for GitHub covers the token's prefix alone, it takes 0.13 ms a line, and it brings an HTTP library into this process.

Knows:  texts.  Never: files.
"""

import re
from functools import lru_cache, partial

_FILLER = "x"
HIDDEN = "\0"
_KEY_LINE = re.compile(r"[A-Za-z0-9+/]{40,}={0,2}")  # of a private key, whose beginning is elsewhere
_WORDS = ("password", "passwd", "secret", "token", "api_key", "apikey", "api-key", "access_key", "private_key")
# What has to be in a text for its pattern to be tried, and the pattern; its last group is the secret.
_PATTERNS = (
    (("AKIA", "ASIA"), re.compile(r"\b((?:AKIA|ASIA)[0-9A-Z]{16})\b")),
    (("gh",), re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,255})")),
    (("github_pat_",), re.compile(r"\b(github_pat_[A-Za-z0-9_]{40,255})")),
    (("glpat-",), re.compile(r"\b(glpat-[A-Za-z0-9_-]{16,})")),
    (("xox",), re.compile(r"\b(xox[abeoprs]-[A-Za-z0-9-]{10,})")),
    (("sk-", "sk_", "rk_"), re.compile(r"\b((?:sk-|[sr]k_(?:live|test)_)[A-Za-z0-9_-]{16,})")),
    (("AIza",), re.compile(r"\b(AIza[0-9A-Za-z_-]{35})")),
    (("npm_",), re.compile(r"\b(npm_[A-Za-z0-9]{36})")),
    (("hf_",), re.compile(r"\b(hf_[A-Za-z0-9]{30,})")),
    (("pypi-AgE",), re.compile(r"\b(pypi-AgE[A-Za-z0-9_-]{20,})")),
    (("SG.",), re.compile(r"\b(SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,})")),
    (("eyJ",), re.compile(r"(?<![\w-])(eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,2000})")),
    (("://",), re.compile(r"://[^\s/:@'\"]{0,80}:([^\s/@'\"{}$<>]{3,200})@")),
    (
        ("-----BEGIN",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(.*?)(?:-----END [A-Z ]*PRIVATE KEY|\Z)", re.DOTALL),
    ),
    (
        _WORDS,
        re.compile(
            r"(?:password|passwd|secret|token|api[_-]?key|access_key|private_key)\w{0,40}[\"']?\]?"
            r"\s{0,9}(?::[^=\n\"']{1,60})?(?:=>|[:=]=?)\s{0,9}[rbuf]{0,2}(?:\"\"\"|'''|[\"'])"
            r"(?=[^\"'\n]{0,400}\d)([^\s\"'{}$<>]{8,400})[\"']",
            re.IGNORECASE,
        ),
    ),
)


def mask(text: str, filler: str = _FILLER) -> str:
    """The text, each secret in it replaced by as many crosses; line ends within one stay."""
    lowered: str | None = None
    for hints, pattern in _PATTERNS:
        if hints is _WORDS:
            lowered = text.lower() if lowered is None else lowered
            is_worth = any(hint in lowered for hint in hints)
        else:
            is_worth = any(hint in text for hint in hints)
        if is_worth:
            text = pattern.sub(partial(_cross_out, filler=filler), text)
    return text


@lru_cache(maxsize=48)
def hide_whole(text: str) -> str:
    """A whole document for who looks for code in it: secrets are of characters that stand in no code (``HIDDEN``)."""
    return mask(text, HIDDEN)


def mask_whole(text: str) -> str:
    """``mask`` of a whole document that is read for others, which mostly stays as it is: it is looked through once."""
    hidden = hide_whole(text)
    return text if hidden == text else hidden.replace(HIDDEN, _FILLER)


def has_secret(text: str) -> bool:
    """Whether ``mask`` would change a text."""
    return mask(text) != text


def reveals(before: str, text: str) -> bool:
    """Whether ``text`` offered behind ``before``, the cursor's line up to it, would say a secret from elsewhere.

    What ends within a literal counts as if the literal ended there.
    """
    line = before + text
    is_key = any(_KEY_LINE.fullmatch(part.strip()) for part in line.splitlines())
    return HIDDEN in text or is_key or any(has_secret(line + end) for end in ("", '"', "'"))


def _cross_out(match: re.Match[str], filler: str) -> str:
    start, end = match.span(1)
    secret = re.sub(r"[^\r\n]", filler, match[1])
    whole = match[0]
    return whole[: start - match.start()] + secret + whole[end - match.start() :]
