"""Judge whether a value is a secret, or a word of a program, a placeholder, a path.

    looks_secret   whether a value that a name calls a secret is one
    is_random      whether a value is random: a hash or a key, whatever its name
    find_random    the ranges of such values in a text

Limits are calibrated on installed packages (``tests/context/test_secrets.py``): of ordinary lines at most 1 in 2,000 is
affected.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_SHORTEST, _LONGEST = 6, 20_000
_LONG = 500  # characters: no name, path or sentence
_LEAST = 8  # characters, unless it is clearly no word
_PLACEHOLDER = re.compile(
    r"\$\{\{.*\}\}|\$\{[^}]*\}|\$\([^)]*\)|\$\w+|\{\{.*\}\}|\{[\w.:!-]*\}|%\(\w+\)s|%\w+%|<[^<>]{1,60}>"
    r"|\[[\w .-]{1,60}\]|#\{[^}]*\}|@[\w.]+@|__\w+__|[xX*.•#-]{4,}|%[sdvq@]"
)
_PARTLY = re.compile(
    r"\$\{[A-Za-z_][\w.:]*\}|\$\([\w -]+\)|\{\{[^}]*\}\}|%\([A-Za-z]\w*\)s|#\{[A-Za-z_@][^}]*\}|\{[a-z_][\w.]*\}"
    r"|\\\(|%[sdv]"
)
_PATH = re.compile(r"(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\]{1,2}[\w.@ -]+)+[/\\]?|[\w.-]+(?:/[\w.-]+)+\.\w{1,5}")
_URL = re.compile(r"[A-Za-z][\w+.-]{1,20}://\S*|(?:mailto|data|urn|tel|jdbc|about|blob|class|file):\S+|www\.\S+")
_URL_PARTS = re.compile(r"[/?&=.:@]")
_RULES = re.compile(r"[a-z_]+(?:[|,:;=][a-z0-9_]+)+")  # of a validator
_CODE = re.compile(
    r"[$\w]+(?:->|::)[\w$].*|[A-Za-z_$][\w$]*(?:(?:\.|::|->|\?\.)[A-Za-z_$][\w$]*)+[()\[\]]*|\.?[A-Za-z_$][\w$.]*[(\[].*"
)
_EXPRESSION = re.compile(
    r"(?:self|this|cls)\.\S*|[A-Za-z_][\w.]*[+*%/|](?:\d+|[A-Za-z_][\w.]*[_.]\w*)|(?:[A-Z][a-z]+)+\d*(?:[A-Z][a-z]+)*\d*"
    r"|[A-Z][a-z]*\d+(?:[A-Z][a-z]+)+"
)
_NUMBER = re.compile(r"[\d_.,:/ +-]+(?:px|em|ms|s|m|h|d|MB|GB|KB|k|%)?|0x[0-9a-fA-F_]+|v?\d+(?:\.\d+)+[\w.-]*")
_SPEAKS = re.compile(
    r"pass|pwd|secret|token|keys?\b|[a-z_]Key|key[_-]|your|example|change|enter|credential|auth|user|admin|login|required|invalid|optional|string",
    re.IGNORECASE,
)
_HOST = re.compile(
    r"[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|io|dev|local|internal|example|lan|de|eu|uk)|\S+@[\w-]+(?:\.[\w-]+)+"
)
_LEET = re.compile(r"[A-Za-z]\d+[A-Za-z]|(?<![\w.#-])\d[a-z]{4,}")
# Words with a digit between letters that are no secret.
_TECHNICAL = re.compile(
    r"(?i)\b(?:sha\d+\w*|utf\d+\w*|base\d+\w*|md5\w*|oauth2\w*|x509\w*|ed25519\w*|rs256|hs\d{3}|es\d{3}|pkcs\d+\w*|h26\d\w*|"
    r"i18n|l10n|k8s|s3\w*|ec2\w*|log4j|mp[34]\w*|p2p|b2b|c2c|o2o|e2e\w*|web3\w*|pbkdf2\w*|hmac\w*|aes\d\w*|"
    r"rsa\d\w*|iso8601|rfc\d+\w*|int\d+\w*|uint\d+\w*|float\d+\w*|"
    r"win32\w*|x86\w*|amd64|arm64|linux64|py3\w*|http2\w*|ipv[46]\w*|level\d\w*|v\d+\w*|test\d+\w*|foo\d*|bar\d*|abc123|[a-z]+2[a-z]+)\b"
)
_PUNCTUATED = re.compile(r"[A-Za-z0-9][!@#$%^&*+;~?|=][A-Za-z0-9]")
_SENTENCE = re.compile(
    r"[.:?!…]\s|[.:?!…]$|%[sd]|\b(?:at|least|characters|minimum|maximum|the|is|are|must|be|to|a|an|of|for|please|not|with|and|or|your)\b",
    re.IGNORECASE,
)
_WORDS_ONLY = re.compile(r"[a-z]+(?:[-_ ][a-z]+)*")
# What weak names have: words with one number, dotted words, colours, keys to press, versions.
_ORDINARY = re.compile(
    r"\d{4}_\w+|(?=\D*\d{1,4}\D*$)[a-z_.\d-]{1,15}|[a-zA-Z_]+(?:\.[a-zA-Z_]*\d*[a-z]?)+|#[0-9a-fA-F]{3,8}|(?i:ctrl|cmd|alt|shift|meta)\+.*"
    r"|[\^~<>=v ]*\d+(?:\.\d+)+[\w.-]*|(?=(?:\D*\d){0,4}\D*$)[a-z]+(?:[-_][a-z0-9]+){1,4}\d?"
)
_MIXED = re.compile(r"[A-Z].*[a-z]|[a-z].*[A-Z]")
_SIGNS = re.compile(r"[,!;]")
_APP_PASSWORD = re.compile(r"[a-z]{4}(?: [a-z]{4}){3}")
_SNAKE = re.compile(
    r"[A-Za-z]+(?:[_.-][A-Za-z]+)*[_.-]?v?\d{0,4}|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|[a-z][a-z0-9]*(?:_[a-z0-9]+)+"
)
_REGEX = re.compile(r"\\[dwsbDWS]|\[\^?[\w\\-]+-|\(\?|\.\*|\{\d+,\d*\}|\[[^\]]+\][+*]")
_MARKUP = re.compile(r"</?[a-z][a-z1-6]{0,9}(?:[ /][^>]*)?>|&\w+;")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5,}", re.IGNORECASE)
_RANDOM = re.compile(r"[A-Za-z0-9+/_~.-]{20,}={0,2}")
_SHORTEST_RANDOM = 20
_HASH_REACH = 60
_ABOVE = 2_000  # characters: a certificate
_PUBLIC_BLOCK = re.compile(r"-----BEGIN (?:[A-Z]+ )*(?:PUBLIC KEY|CERTIFICATE)[^-]*-----[^-]*$")
_HASH_BEFORE = re.compile(
    r"(?i)sha-?\d|md5|blake|crc32|hash|digest|checksum|integrity|fingerprint|\bh1:|\bcommit\b|rev(?:ision)?\b|"
    r"\bref(?:erence)?\b|public|recv-keys|keyserver|\boid\b|@$|"
    r"\buuid\b|\bguid\b|ssh-|[#@]\w{0,7}$|://\S*$"
)
_HASH_AFTER = re.compile(r"(?i)sha\d+sum|md5sum|hexdigest")
_PUBLIC = re.compile(r"_Z|AAAA[A-E]3Nza|AAAAB3Nza")  # names of C++ functions, public keys
_WORDS = re.compile(r"[A-Z]?[a-z]{3,}")
_MOST_WORDS = 0.6  # of the characters
_HEX = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_CASES = (re.compile(r"[a-z]"), re.compile(r"[A-Z]"), re.compile(r"\d"))
# Random text changes between lower case, upper case and digits at most pairs of characters, and has no words.
_LEAST_CHANGES, _LEAST_CHANGES_OF_TWO = 0.4, 0.3
_LONGEST_LOWER = 10
_SURELY_LONG, _LEAST_DIGITS = 32, 3  # shorter values are random only with so many digits
_LOWER = re.compile(r"[a-z]+")
_ALPHABET = re.compile(r"[A-Za-z0-9+/_~.-]+={0,2}")
_LONG_WORD = 24


@dataclass(frozen=True, slots=True)
class Evidence:
    """How a value belongs to the name of a secret.

    ``is_strong``: the name is a password's or a secret's; tokens and keys can be harmless words.
    ``is_direct``: the value is assigned or given to the name, and not merely in the same line.
    """

    is_strong: bool
    is_direct: bool
    is_quoted: bool
    is_phrase: bool = False  # the name is that of a passphrase
    is_password: bool = True  # the name says so: a bare pass or secret can be anything
    is_shouted: bool = False  # NAME=value of a shell: the value cannot be a name in a program


def looks_secret(value: str, evidence: Evidence) -> bool:  # noqa: C901, PLR0911, PLR0912  one line for each kind of value
    """Return whether a value that a name calls a secret is one."""
    size = len(value)
    value = value.removeprefix("{noop}")
    if not _SHORTEST <= size <= _LONGEST or _PLACEHOLDER.fullmatch(value) or "\ufffd" in value:
        return False
    if is_random(value, shortest=16):
        return True
    if size > _LONG:  # patterns for words take too long
        return evidence.is_direct and " " not in value
    if _URL.fullmatch(value):
        return any(is_random(part, shortest=16) for part in _URL_PARTS.split(value))
    if _NUMBER.fullmatch(value) or _RULES.fullmatch(value):
        return value.isdigit() and size >= _LEAST and evidence.is_strong and evidence.is_direct and evidence.is_quoted
    if _PATH.fullmatch(value) or _REGEX.search(value) or _MARKUP.search(value):
        return False
    rest = _PARTLY.sub("", value)
    if rest != value and (len(rest) < _SHORTEST or not (_LEET.search(rest) or _PUNCTUATED.search(rest))):
        return False
    if not evidence.is_quoted and (_CODE.fullmatch(value) or _EXPRESSION.fullmatch(value)):
        return False
    has_digit = any(c.isdigit() for c in rest)
    plain = _TECHNICAL.sub("", rest)
    is_leet = _LEET.search(plain) is not None
    is_punctuated = _PUNCTUATED.search(plain) is not None
    if " " in value or "\t" in value:
        return _is_phrase(value, evidence, has_digit=has_digit)
    if _HOST.fullmatch(value):
        return False
    if has_digit and any(c.isalpha() for c in rest):
        if not evidence.is_strong and _ORDINARY.fullmatch(value):
            return False
        if is_leet or (is_punctuated and evidence.is_direct):
            return size >= _LEAST or (evidence.is_direct and evidence.is_strong)
        if _SNAKE.fullmatch(value) and not (evidence.is_strong and evidence.is_direct and not _SPEAKS.search(value)):
            return _MIXED.search(value) is not None and "-" in value and evidence.is_direct
        return evidence.is_direct and size >= _LEAST
    if has_digit:
        return evidence.is_strong and evidence.is_direct and evidence.is_quoted and size >= _LEAST
    if size >= _LONG_WORD and value.isalpha() and _CONSONANTS.search(value) and not re.search(r"[a-z][A-Z]", value):
        return True
    if not evidence.is_direct or not evidence.is_strong or _SPEAKS.search(value):
        return False
    if (value.isalpha() and value.istitle()) or (not evidence.is_password and _WORDS_ONLY.fullmatch(value)):
        return False
    if is_punctuated:
        return True
    return (evidence.is_quoted or evidence.is_shouted) and size >= _LEAST and _SNAKE.fullmatch(value) is not None


def _is_phrase(value: str, evidence: Evidence, *, has_digit: bool) -> bool:
    """Return whether several words are a passphrase."""
    if _APP_PASSWORD.fullmatch(value):
        return True
    words = value.split()
    if evidence.is_phrase and evidence.is_direct:
        return 3 <= len(words) <= 12 and re.search(r"[.:?!]$|%[sd]|[{}]", value) is None  # noqa: PLR2004
    if not (evidence.is_strong and evidence.is_direct) or _SPEAKS.search(value) or _SENTENCE.search(value):
        return False
    if not (has_digit or _SIGNS.search(value)) or not 3 <= len(words) <= 8:  # noqa: PLR2004
        return False
    return all(re.fullmatch(r"[\w,'!-]{1,16}", word) for word in words)


def is_random(value: str, *, shortest: int = 32) -> bool:
    """Return whether a value of at least so many characters is random by its characters alone."""
    if len(value) < shortest or _UUID.fullmatch(value) or _PUBLIC.match(value) or _is_sequence(value):
        return False
    has_digits = _CASES[2].search(value) is not None
    if _HEX.fullmatch(value):
        return has_digits and not value.isdigit()
    if len(value) < _SURELY_LONG and sum(c.isdigit() for c in value) < _LEAST_DIGITS:
        return False
    kinds = sum(pattern.search(value) is not None for pattern in _CASES)
    separators = sum(not character.isalnum() for character in value.rstrip("="))
    if (
        not has_digits
        or not _ALPHABET.fullmatch(value)
        or separators > (len(value) // 10 if kinds == len(_CASES) else 0)
    ):
        return False
    changes = sum(_kind(a) != _kind(b) for a, b in pairwise(value)) / (len(value) - 1)
    longest = max(map(len, _LOWER.findall(value)), default=0)
    if kinds == len(_CASES):
        words = sum(map(len, _WORDS.findall(value)))
        return changes >= _LEAST_CHANGES and longest <= _LONGEST_LOWER and words <= _MOST_WORDS * len(value)
    return kinds > 1 and changes >= _LEAST_CHANGES_OF_TWO


def _kind(character: str) -> int:
    return 0 if character.islower() else 1 if character.isupper() else 2 if character.isdigit() else 3


def _is_sequence(value: str) -> bool:
    """Return whether a value counts or repeats: alphabets, test patterns."""
    steps = [ord(b) - ord(a) for a, b in pairwise(value)]
    return sum(step in {0, 1, -1} for step in steps) > 0.4 * len(steps) or len(set(value)) < 8  # noqa: PLR2004


def find_random(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of random values in a text, except hashes that the line calls so: they are no secrets."""
    for match in _RANDOM.finditer(text):
        if is_random(match[0], shortest=_SHORTEST_RANDOM):
            line_start = text.rfind("\n", 0, match.start()) + 1
            before = text[max(line_start, match.start() - _HASH_REACH) : match.start() + len("sha512-")]
            after = text[match.end() : match.end() + _HASH_REACH].partition("\n")[0]
            above = text[max(0, line_start - _ABOVE) : line_start]
            if (
                _PUBLIC_BLOCK.search(above) is None
                and _HASH_BEFORE.search(before) is None
                and _HASH_AFTER.search(after) is None
            ):
                yield match.span()
