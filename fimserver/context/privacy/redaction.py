"""Replace secrets in files by ``x`` before a model sees them.

    mask        return a text of the same length without secrets
    mask_part   the same for a part, by the text around it
    has_secret  return whether a text holds a secret
    reveals     return whether a text, appended to another, would show a secret

Secrets are tokens with a known prefix, private keys, passwords in URLs and headers, addresses of webhooks, and values
assigned to a name like password, secret, token or api_key: a quoted literal with a digit (for password, passwd, pwd and
passphrase also one without, and several words with one), and, as in settings files and shells (``NAME=value``,
``name: value`` to the line's end), an unquoted value with a digit. So are values of options (``--password VALUE``) and
of connection strings, and what follows a user's name in ``auth=(...)``. Placeholders (``${NAME}``, ``{name}``) are not
secrets.
detect-secrets was tried first: its pattern for GitHub covers the token's prefix alone, it takes 0.13 ms a line, and it
brings an HTTP library into this process.

Knows:  texts.  Never: files.
"""

import re
from collections.abc import Iterator

_FILLER = "x"
_SECRET_REACH = 8_000  # characters outside a part where a secret may begin or end
_KEY_REACH = 200_000  # the same for a private key
_KEY_BEGINS, _KEY_ENDS = "-----BEGIN ", "-----END "
_CHARACTER = re.compile(r"[^\r\n]")
_LINE_END = re.compile(r"[\r\n]|\Z")
_MOST_BEFORE = 200  # characters of a line before a name with an unquoted value
_KEY_LINE = re.compile(r"[A-Za-z0-9+/]{40,}={0,2}")  # of a private key that begins elsewhere
_PASSWORDS = ("password", "passwd", "passphrase", "pwd")
_NAMES = (
    *_PASSWORDS,
    *("secret", "token", "credential"),
    *(f"{of}{joint}key" for of in ("api", "access", "account", "private", "auth") for joint in ("_", "-", "")),
)
# One of the strings has to be in a text for its pattern to be tried; the pattern's last group is the secret.
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
    (("ya29.",), re.compile(r"\b(ya29\.[A-Za-z0-9_-]{20,})")),
    (("dop_v1_", "doo_v1_", "dor_v1_"), re.compile(r"\b(do[opr]_v1_[0-9a-f]{32,})")),
    (("hvs.",), re.compile(r"\b(hvs\.[A-Za-z0-9_-]{24,})")),
    (("dckr_pat_",), re.compile(r"\b(dckr_pat_[A-Za-z0-9_-]{20,})")),
    (("shp",), re.compile(r"\b(shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32})")),
    (("AGE-SECRET-KEY-",), re.compile(r"\b(AGE-SECRET-KEY-1[0-9A-Z]{40,})")),
    (("AccountKey=", "SharedAccessKey="), re.compile(r"(?:AccountKey|SharedAccessKey)=([A-Za-z0-9+/]{16,}={0,2})")),
    (
        ("earer ", "BEARER "),
        re.compile(r"\b(?i:bearer) +(?=[^\s\"']{0,400}\d)([A-Za-z0-9._~+/-]{12,}={0,2})"),
    ),
    (("hooks.slack.com/",), re.compile(r"hooks\.slack\.com/(?:services|workflows|triggers)/([A-Za-z0-9/]{20,200})")),
    (("/webhooks/",), re.compile(r"discord(?:app)?\.com/api/webhooks/(\d{5,30}/[\w-]{20,200})")),
    (("webhook.office.com",), re.compile(r"webhook\.office\.com/(\w{1,20}/[\w@/-]{30,300})")),
    (
        ("--",),
        re.compile(
            r"(?<![\w-])--(?:[\w-]{0,30}-)?(?i:pass(?:word|wd|phrase)?|pwd|token|secret|api-?key)(?:=|[ \t]{1,9})[\"']?"
            r"(?=[^\s\"']{0,400}\d)(?![\d.]{1,20}(?:\s|$))([^\s\"'`$<>{}()]{8,400})"
        ),
    ),
    (
        ("assword", "wd", "ASSWORD", "WD"),  # in a connection string
        re.compile(r"(?<=[;\"'])\s{0,3}(?i:(?:user ?)?password|pwd)\s{0,3}=\s{0,3}([^;\"'\s{}$<>]{6,200})(?=[;\"'])"),
    ),
    (
        ("uth",),  # a user's name and a password
        re.compile(
            r"(?i:auth)\w{0,20}\s{0,3}(?:=\s{0,3})?\(\s{0,9}[\"'][^\"'\n]{1,80}[\"']\s{0,9},\s{0,9}"
            r"[\"'](?=[^\"'\n]{0,200}\d)([^\s\"'`<>{}$]{6,200})[\"']"
        ),
    ),
    (
        ("pass", "PASS", "Pass"),  # as a name of its own
        re.compile(
            r"(?<![A-Za-z])(?i:pass)[\"']?\]?\s{0,9}(?:=>|[:=]=?)\s{0,9}[rbuf]{0,2}[\"'`](?=[^\"'`\n]{0,400}\d)"
            r"(?![^\"'`\n]{0,400}(?:\$[({]|\{[^}\"'`\n]{0,80}\}|%\())(?!\$\w{1,80}[\"'`])([^\s\"'`<>]{8,400})[\"'`]"
        ),
    ),
    (
        ("uthorization", "AUTHORIZATION"),
        re.compile(r"(?i:authorization)\W{1,20}(?i:basic) +([A-Za-z0-9+/]{8,400}={0,2})"),
    ),
)
# Assignment of a value, from the end of the name on.
_ASSIGNED = r"[\"']?\]?\s{0,9}(?::[^=\n\"']{1,60})?(?:=>|[:=]=?)\s{0,9}[rbuf]{0,2}(?:\"\"\"|'''|[\"'`])"
_FILLED_IN = r"(?![^\"'`\n]{0,400}(?:\$[({]|\{[^}\"'`\n]{0,80}\}|%\())(?!/|\$\w{1,80}[\"'`])"
_QUOTED = r"([^\s\"'`<>]{8,400})[\"'`]"
# describes itself: not a secret
_SPEAKS = r"(?![^\"'`\n]{0,400}(?i:pass|pwd|secret|token|key|your|example|change|enter))"
_LITERAL = re.compile(rf"\w{{0,40}}{_ASSIGNED}(?=[^\"'`\n]{{0,400}}\d){_FILLED_IN}{_QUOTED}", re.IGNORECASE)
_PASSWORD = re.compile(f"{_ASSIGNED}{_SPEAKS}{_FILLED_IN}{_QUOTED}", re.IGNORECASE)
_PASSPHRASE = re.compile(  # several words and a digit
    rf"\w{{0,40}}{_ASSIGNED}{_SPEAKS}{_FILLED_IN}(?=[^\"'`\n]{{0,400}}\d)([^\"'`\n<>]{{12,400}})[\"'`]", re.IGNORECASE
)
# Unquoted values, matched from the start of the line: in shells and Dockerfiles; in YAML, where a word with a digit
# after it is code; in INI files, where they have to be long with letters of both cases.
_NOT_ONE = (
    r"(?![\d_.]+[ \t]*$|\S*(?:://|\*)|[/~]|\.{1,2}/|self\.|\w*[._]\w*\+"  # numbers, addresses, paths, sums
    r"|[\w.]{1,80}\.[A-Za-z_]\w{0,80}[ \t]*$"  # attributes
    r"|(?:[A-Z][a-z]+)+\d*(?:[A-Z][a-z]+)*[ \t]*$"  # types
    r"|[a-z]+(?:-[a-z]+)*-v?\d[\d.]*[ \t]*$"  # versioned names
    r")"
)
_UNQUOTED = rf"(?=[^\s#]{{0,400}}\d){_NOT_ONE}([^\s\"'`,;()\[\]{{}}<>$]{{8,400}})[ \t]*(?:#.*)?$"
# Ends of names that are not secrets: counts, locations and lifetimes of tokens.
_OF_ANOTHER = re.compile(
    r"[\w.-]{0,30}?(?:name|ur[il]|path|file|dir|limit|timeout|count|type|length|size|ttl|version|expir\w{0,6}|prefix)s?\b"
    r"|s\b|iz",
    re.IGNORECASE,
)
_LINES = tuple(
    re.compile(rf"[ \t]*{begin}{_UNQUOTED}")
    for begin in (
        r"(?:(?i:export|set|ENV|ARG|-e|--env)[ \t]+)?[\w.-]{1,120}=",
        r"(?:- )?[\w.-]{1,120}:[ \t]+(?![A-Za-z_]{1,80}\d?[ \t]*$)",
        r"[\w.-]{1,120}[ \t]+=[ \t]+(?=\S{16})(?=\S{0,400}[A-Z])(?=\S{0,400}[a-z])(?!\w{1,80}[ \t]*$)",
    )
)


def mask(text: str) -> str:
    """Replace every character of each secret in a text; keep line ends."""
    for hints, pattern in _PATTERNS:
        if any(hint in text for hint in hints):
            text = pattern.sub(_cross_out, text)
    parts, done = [], 0
    for start, end in _find_assigned(text):
        parts += [text[done:start], _CHARACTER.sub(_FILLER, text[start:end])]
        done = end
    return "".join([*parts, text[done:]])


def _find_assigned(text: str) -> Iterator[tuple[int, int]]:
    """Yield, in order, the ranges of values that are secrets by their name."""
    lowered = text.lower()
    if len(lowered) != len(text):  # some letters have two characters in lower case
        lowered = "".join(c if len(c.lower()) > 1 else c.lower() for c in text)
    names = sorted({(at, name) for name in _NAMES for at in _find_all(lowered, name)})
    done = line_end = 0
    for at, name in names:
        if at < done:
            continue
        match = _LITERAL.match(text, at + len(name))
        if match is None and name in _PASSWORDS:
            match = _PASSWORD.match(text, at + len(name)) or _PASSPHRASE.match(text, at + len(name))
        if match is None and at >= line_end and not _OF_ANOTHER.match(text, at + len(name)):
            near = max(0, at - _MOST_BEFORE)
            begin = max(text.rfind("\n", near, at), text.rfind("\r", near, at)) + 1
            ending = _LINE_END.search(text, at)
            line_end = ending.start() if ending else len(text)
            if begin or not near:
                match = next(filter(None, (pattern.match(text, begin, line_end) for pattern in _LINES)), None)
            if match is not None and at >= match.start(1):
                match = None  # the name is inside the value
        if match is not None:
            done = match.end()
            yield match.span(1)


def _find_all(text: str, word: str) -> Iterator[int]:
    at = text.find(word)
    while at >= 0:
        yield at
        at = text.find(word, at + 1)


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


def reveals(before: str, text: str) -> bool:
    """Return whether offering ``text`` after ``before``, the start of the cursor's line, would show a secret.

    A text that ends within a literal counts as if the literal ended there.
    """
    line = before + text
    is_key = any(_KEY_LINE.fullmatch(part.strip()) for part in line.splitlines())
    return is_key or any(has_secret(line + end) for end in ("", '"', "'"))


def _cross_out(match: re.Match[str]) -> str:
    start, end = match.start(1) - match.start(), match.end(1) - match.start()
    return match[0][:start] + _CHARACTER.sub(_FILLER, match[1]) + match[0][end:]
