"""Recognise secrets by their names: values that are assigned to, or given together with, a password, token or key.

    find_named   the ranges of such values in a text

A name is a word like password, secret, token or api_key in an identifier, as long as the identifier does not say that
it means something else (``token_type``, ``PASSWORD_RESET_TIMEOUT``). Its values are the literals that follow in the
line, with a call, an operator or a default between them, and unquoted values as in shells, YAML, XML and options. If
the line ends before a value, it is looked for in the next ones. ``values.py`` decides which values are secrets.

Knows:  texts.  Never: files.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fimserver.context.languages.table import words
from fimserver.context.privacy.values import Evidence, looks_secret

_STEMS = (
    *("pass", "pwd", "pw", "secret", "token", "credential", "key", "auth", "dsn", "webhook", "psk", "salt"),
    *("kennwort", "contrase\u00f1a", "contrasena", "senha", "wachtwoord", "parola"),
)
# What has to stand before ``key`` and may stand before ``pass`` without a sign between them.
_KEYS = tuple(
    words(
        "api access account private auth signing sign encryption encrypt decryption validation secret master license "
        "licence subscription client session jwt hmac ssh shared service admin deploy consumer app security aws "
        "logged_in nonce"
    )
)
_OWNERS = tuple(
    words("db smtp user root my admin ftp redis store key require wifi ssh sql web mail storage trust text")
)
# Words after the name that make it another thing.
_OTHERS = words(
    "name names id ids url urls uri uris path paths file files filename dir directory folder limit limits timeout "
    "count counts type types length len size sizes ttl version versions expiry expires expiration expire expired "
    "prefix suffix field fields label hint placeholder policy policies regex pattern patterns header headers "
    "param params format error errors message messages msg text title column input form view page reset generator "
    "validator validators validation hasher hashers manager provider service class algorithm algorithms encoding "
    "lifetime bucket strength status state index offset position pos budget usage number num max min required "
    "enabled disabled changed change check prompt question response request template help description desc doc "
    "docs endpoint host server issuer audience scope scopes kind mode method methods location source sources "
    "stream list map set iterator buffer parser reader writer getter setter rule rules confirmation confirm "
    "mismatch invalid missing ref reference references arn store storage handler middleware backend event events "
    "callback function func chars characters alphabet symbols charset env var variable variables users user "
    "through thru port fail failed percent rate color colour primary"
    " tag tags event colors colours bg fg border level santa lexer classes rows width height end begin start"
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Public keys; tokens of design, of pages and of lexers. Passes of renderers and compilers.
_OF_OTHERS = re.compile(
    r"(?i)public|(?:colou?r|page|next|prev\w*|design|syntax|css|style|lexer|stop|eos|bos|pad|cancel\w*)[_-]?$"
)
_PASSES = re.compile(r"(?i)(?:render|boarding|shader|compile[rd]?|opt|test|first|second|multi)[_-]?$")
# get_password("a service") gives a name, no secret
_GETTER = re.compile(
    r"(?i)(?:^|[._])(?:get|fetch|find|load|read|check|verify|validate|has|is|reset|change|forgot|hash)_?$"
)
_WHOLE = ("password", "passphrase")  # also at the end of a longer word
# What may follow a stem in its word.
_CONTINUED = {
    "pass": ("words", "word", "wort", "wd", "phrases", "phrase", "codes", "code", "e"),
    "secret": ("s", "key", "token"),
    "auth": ("key", "token"),
}
_STRONG = (
    "pass",
    "pwd",
    "pw",
    "secret",
    "psk",
    "kennwort",
    "contrase\u00f1a",
    "contrasena",
    "senha",
    "wachtwoord",
    "parola",
)
_MOST_BEFORE = 400  # characters of a line before a name: more are data
_REACH = 6_000  # characters of a line after a name
_NEXT_LINES = 3
_MOST_LITERALS = 4
_MOST_NAMES = 60
_MAY_HOLD = re.compile(r"[\"'`\d>]|[!#%&*+;^~-]\w")
_GAP = 200  # characters in which a literal has to begin
_OPENING = re.compile(r"\"\"\"|\'\'\'|r(#{1,3})\"|R\"\(|\\?[\"'`]|%w\[|~[sS]\(")
_CLOSINGS = {'R"(': ')"', "%w[": "]", "~s(": ")", "~S(": ")"}
_BRACKETS = re.compile(r"\[[^\[\]]*\]|\{[^{}]*\}")
_DEFAULTS = {"default", "value", "defaultvalue", "default_value", "fallback", "password", "secret", "token", "key"}
_KEYWORD = re.compile(r"(\w+)\s*[=:]\s*$")
_CONNECTOR = re.compile(r"[^;]{0,90}")
_NO_CONNECTOR = re.compile(
    r"\)\s*\.\s*(?!or|get|unwrap|default|to\w*\b(?<!Class)|fetch|ok|expect|into)\w+\(|\b(?:and|import|return|print|raise|log\w*|assert)\b|&&|[{}]\s*\w+\s*[({]"
)
_DIRECT = re.compile(
    r"[\w\]\)}\"'`?!]*\s*(?:[Aa][Ss]\s+\w+\s*|TYPE\s+\w+\s+VALUE\s*)?(?::[^=\n\"'`]{1,60})?\s*(?:=>|->|<-|:=|\?=|\?\?=|\|\|=|===?|!==?|\|\||\?\?|\?:|//|[=:,(]|\bto\b|\bor\b|$)?[\s@$&]*"
    r"(?:\w{1,20}\s*[=:]\s*)?"
    r"(?:[\w.:<>\[\]&*!]{0,60}[\[({]{1,2}\s*)?(?:[rRbBuUfFLN@#]{0,3})?"
)
_OPEN_END = re.compile(r"(?:[=:(\[{,\\`+|>]|->|<-|:=|=>|>-|\|-|\"\"|\"\"\"|''|\|\|.*|\bor)\s*$")
_BLOCK = re.compile(r":\s*[|>][-+]?$|(?:\"\"\"|''')$")
_BEGINS_VALUE = re.compile(
    r"\s*(?:\|\||\?\?|\?:|[+|?:]|or\b|-?[\"']?(?:value|default|default_value)[\"']?\s*[:=]|<string>|[rbuLN@]{0,2}[\"'`])"
)
_VALUE_LINE = re.compile(r"\s*[\"']?(?:value|default)[\"']?\s*[:=]\s*(?P<value>[^\s\"'][^\r\n]*)")
_PLAIN_LINE = re.compile(r"\s*(?P<value>\S[^\r\n]*)")
_STOP = r"\s\"'`,;&()\[\]{}<>|"
_EQUALS = re.compile(rf"[\"']?=(?P<value>[^{_STOP}]+(?:[(\[{{][^\s]*)?)")
_EXPANSION = re.compile(r":?[-=?+]?(?P<value>[^\s\"'`{}]{4,400})\}")
_COLON = re.compile(r"[\"']?\s{0,3}:\s+(?P<value>[^\s\"'`{\[|>&*!][^\r\n]*)")
_HEADER = re.compile(r":\s*(?P<value>[^\s\"'`,{}<>()\[\]$]{6,400})(?=[\"'`])")
_DEFAULT = re.compile(r"[\"']?\s?[:=]\s?[\"']?\$\{\w+:?[-=?+]?(?P<value>[^\s\"'`{}]{4,400})\}")
_REMARK = re.compile(r"\s*(?:#|//|--|;|\*|/\*|<!--|%)\s")
_REMARK_AFTER = re.compile(r"[ \t]#")
_FLOW = re.compile(r"[\"']?\s{0,3}:\s+(?P<value>[^\s\"'`{}\[\],]{6,400})\s*(?=[,}])")
_SPACED = re.compile(r"[ \t]+(?:\?|:)?=[ \t]+(?P<value>[^\s\"'`{(\[][^\r\n]*)")
_AFTER_SPACE = re.compile(r"[ \t]+(?:is[ \t]+|of[ \t]+|=[ \t]*)?(?P<value>[^\s\"'`(){}\[\],;=<>]{6,400})(?=[ \t]|$)")
_BYTES = re.compile(r"[^={\r\n]{0,40}=?\s*\{\s*(?P<value>0x[0-9a-fA-F]{2}(?:\s*,\s*0x[0-9a-fA-F]{2}){7,})")
_ELEMENT = re.compile(r"[^<>\r\n]{0,80}>(?:</key>\s*<string>)?\s*+(?P<value>[^<>\s][^<>\r\n]{5,3999})</")
_STRING_ELEMENT = re.compile(r"\s*<string>(?P<value>[^<>\r\n]+)</string>")
_OPTION = re.compile(r"(?:=|[ \t]{1,4})(?P<value>[^\s\"'`<>{}()$][^\s\"'`<>{}()]{5,400})")
_IS_CONFIG = re.compile(
    r"[ \t]*(?:[-#*/;]+[ \t]*)*(?:(?i:export|set|ENV|ARG|declare|RUN|-e|--env)[ \t]+)*[\"']?[@$]?[\w./:-]*$"
)


# Functions and statements for credentials whose name is no secret's: what is in the text, and where arguments begin.
_CALLS = tuple(
    (hint, re.compile(pattern))
    for hint, pattern in (
        ("redential", r"\b(?:new |with|set|add|Network|Basic\w*|Http\w*)[cC]redentials?\(|\bCredentials?(?:::new)?\("),
        ("Credential(", r"\b(?:Network|ClientSecret|Basic\w*)Credential\("),
        ("asic", r"\b\w*(?:basic_?auth|BasicAuth|HttpCredentials)\w*\b[( ]"),
        ("ogin(", r"(?:\.|->)login\("),
        ("Auth(", r"\b\w+Auth\("),
        ("onnect", r"\b(?:getConnection|mysqli_connect|mysql_real_connect|pg_connect)\("),
        ("connect", r"\b(?:DBI->|MySQLdb\.|pymysql\.|psycopg2?\.)connect\("),
        ("wt.", r"\bjwt\.(?:sign|encode|decode|verify)\((?:\s*\{[^{}\r\n]*\}\s*,)?"),
        ("JWT.", r"\bJWT\.(?:sign|encode|decode|verify)\((?:\s*\{[^{}\r\n]*\}\s*,)?"),
        ("mac", r"\b(?:hmac\.new|createHmac|hash_hmac)\("),
        ("Fernet(", r"\bFernet\("),
        ("ookieParser(", r"\bcookieParser\("),
        ("KeySpec(", r"\bSecretKeySpec\("),
        ("WiFi.begin", r"\bWiFi\.begin\("),
        ("crypt(", r"\bcrypt\("),
        ("bind", r"\bsimple_bind\w*\("),
        ("pw_set(", r"\busername_pw_set\("),
        ("AES.new(", r"\bAES\.new\("),
        ("openssl_", r"\bopenssl_(?:en|de)crypt\("),
        ("USERPWD", r"\bCURLOPT_USERPWD\b"),
        ("ogin(", r"\bftp_login\("),
        ("FTP(", r"\bFTP\("),
        ("PasswordAuthentication(", r"\bPasswordAuthentication\("),
        ("signWith(", r"\bsignWith\("),
        ("CreateAsync(", r"\bCreateAsync\("),
        ("CookieStore(", r"\bNewCookieStore\("),
        ("SymmetricKey(", r"\bSymmetric(?:Security)?Key\("),
        ("SecurityKey(", r"\bSecurityKey\("),
        ("pgp_sym", r"\bpgp_sym_(?:en|de)crypt\("),
        ("createUser", r"\bcreateUser\b"),
        ("PSK", r"\bPSK\b"),
        ("PDO(", r"\bPDO\("),
        ("ConvertTo-SecureString", r"\bConvertTo-SecureString\b"),
        ("IDENTIFIED BY", r"\bIDENTIFIED BY\b"),
        ("setValue(", r"\bsetValue\((?=[^\r\n]{0,200}(?:[Kk]ey|[Aa]uth|[Tt]oken))"),
    )
)
# Or other arguments than a secret; Rust converts arguments by a call.
_ARGUMENTS_END = re.compile(r"(?<!\.into\()\)\s*[;,.\]}]|\{\s*\w+\s*:|\boptions\s*=")
_ALGORITHM = re.compile(
    r"(?i)(?:aes|des|rsa|sha|hs|rs|es|md|hmac|pbkdf|blowfish|3des)[-_]?\d[\w-]*|(?:des|aes)3?[a-z0-9]*"
)
_FILE = re.compile(r"[\w./-]+\.[a-z]\w{1,7}|[\w-]+://\S+")
_CHARACTERS = re.compile(r"\"((?:\\.|[^\"\\\r\n])*)\"\.toCharArray\(")
_GIVEN = Evidence(is_strong=True, is_direct=True, is_quoted=True)


@dataclass(frozen=True, slots=True)
class _Name:
    """A name of a secret: its identifier's range, and whether it is one whose values are never words of a program."""

    start: int
    end: int
    is_strong: bool
    is_phrase: bool = False
    is_password: bool = True


def find_named(text: str) -> Iterator[tuple[int, int]]:
    """Yield, in order, the ranges of values that are secrets by their name; they may overlap."""
    yield from sorted({*_find_given(text), *_find_assigned(text)})


def _find_given(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of secrets that are given to a function, or a statement, for credentials."""
    for hint, pattern in _CALLS:
        if hint not in text:
            continue
        for match in pattern.finditer(text):
            end = min(_line_end(text, match.end()), match.end() + _REACH)
            stop = _ARGUMENTS_END.search(text, match.end(), end)
            for _, begin, close in _literals_after(text, match.end(), stop.end() if stop else end):
                value = text[begin:close]
                is_other = value.isalpha() or _ALGORITHM.fullmatch(value) or _FILE.fullmatch(value)
                if not is_other and looks_secret(value.rpartition(":")[2] or value, _GIVEN):
                    yield begin, close
    if "toCharArray" in text:
        for match in _CHARACTERS.finditer(text):
            if looks_secret(match[1], _GIVEN):
                yield match.span(1)


def _find_assigned(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of secrets that are assigned to a name, or stand with it."""
    done = num_names = line_start = 0
    line_end = -1
    may_hold = False
    for at, stem in _find_stems(text):
        if at < done:
            continue
        if at > line_end:
            line_start = max(text.rfind("\n", 0, at), text.rfind("\r", max(0, at - _REACH), at)) + 1
            line_end, num_names = _line_end(text, at), 0
            may_hold = _may_hold_value(text, at, line_end)
        num_names += 1
        if num_names > _MOST_NAMES:  # of one line: it is data, and is crossed out from here on
            done = line_end
            yield at, line_end
        elif may_hold or text[at : at + len("passphrase")].lower() == "passphrase":
            near = max(line_start, at - _MOST_BEFORE)
            name = _name_at(text, at, stem, near, line_end)
            for start, end in _values_after(text, name, near, min(line_end, name.end + _REACH)) if name else ():
                if start >= done:
                    done = end
                    yield start, end


def _may_hold_value(text: str, at: int, line_end: int) -> bool:
    """Return whether there can be a value after a name: in its line, or in the next."""
    if _MAY_HOLD.search(text, at, min(line_end, at + _REACH)) or _OPEN_END.search(
        text, max(at, line_end - 40), line_end
    ):
        return True
    return _BEGINS_VALUE.match(text[line_end : line_end + 60].lstrip("\r\n")) is not None


def _find_stems(text: str) -> list[tuple[int, str]]:
    lowered = text.lower()
    if len(lowered) != len(text):  # some letters have two characters in lower case
        lowered = "".join(c if len(c.lower()) > 1 else c.lower() for c in text)
    found = []
    for stem in _STEMS:
        at = lowered.find(stem)
        while at >= 0:
            found.append((at, stem))
            at = lowered.find(stem, at + len(stem))
    return sorted(found)


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    end = len(text) if end < 0 else end
    carriage_return = text.find("\r", at, end)
    return end if carriage_return < 0 else carriage_return


def _name_at(text: str, at: int, stem: str, line_start: int, line_end: int) -> _Name | None:
    """Return the name that a stem is part of; ``None`` if the identifier means something else."""
    start = at
    while start > line_start and (text[start - 1].isalnum() or text[start - 1] in "_-."):
        start -= 1
    end = at + len(stem)
    while end < line_end and (
        text[end].isalnum() or text[end] == "_" or (text[end] == "-" and text[end + 1 : end + 2].isalpha())
    ):
        end += 1
    whole = text[at : at + len("passphrase")].lower()
    before = text[start:at]
    is_password = not (stem in {"pass", "pw", "secret"} and not whole.startswith(("passw", "passp", "passc")))
    if not is_password and _PASSES.search(before):
        return None
    if _OF_OTHERS.search(before) or "arn:" in text[max(line_start, start - 90) : start]:
        return None
    begins_word = not before or not before[-1].isalpha() or (text[at].isupper() and before[-1].islower())
    if stem == "key":
        begins_word = text[max(line_start, at - 14) : at].lower().rstrip("_-. :").endswith(_KEYS)
    elif not begins_word:
        begins_word = whole.startswith(_WHOLE) or before.lower().endswith(_OWNERS)
    if not begins_word or not _is_word(stem, text[at + len(stem) : end], shouts=text[at + len(stem) - 1].isupper()):
        return None
    is_asked = _GETTER.search(before) is not None
    is_bare = text[start:end].lower() in {"pass", "pw"}  # of a compiler, a renderer, a test
    return _Name(start, end, stem in _STRONG and not (is_asked or is_bare), whole == "passphrase", is_password)


def _is_word(stem: str, after: str, *, shouts: bool) -> bool:
    """Return whether a stem, with the rest of its identifier after it, is the name of a secret."""
    rest = after.lower() if shouts and after[:1].isupper() else after
    if rest[:1].islower():
        more = next((more for more in _CONTINUED.get(stem, ("s",)) if rest.startswith(more)), None)
        if more is None or rest[len(more) : len(more) + 1].islower():
            return False
        after = after[len(more) :]
    others = [word.lower() in _OTHERS for word in _WORD.findall(after)]
    is_address = stem == "webhook" and after.lower().strip("_-") in {"url", "uri", "address", "endpoint", "path"}
    return not others or is_address or not (others[0] or others[-1])


def _values_after(text: str, name: _Name, line_start: int, line_end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a name's secret values, in its line or the next ones."""
    at = name.end
    line_before = text[line_start : name.start]
    quote = text[at : at + 1]
    escaped = text.startswith('\\"', at)
    is_inside = quote in {'"', "'", "`"} and line_before.count(quote) % 2 == 1
    if is_inside or escaped:
        at += 2 if escaped else 1
    found = False
    is_argument = line_before.rstrip("-\"'`").endswith("(")  # the first one of a call: the next is its value
    for span in _literals(text, at, line_end, name, is_listed=is_inside and not is_argument):
        found = True
        yield span
    if found:
        return
    if (value := _unquoted(text, name, line_before, line_end)) is not None:
        yield value
        return
    yield from _below(text, name, at, line_end)


def _literals_after(text: str, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield where literals begin in ``[at, end)`` of a text, and the ranges of their values."""
    for _ in range(_MOST_LITERALS):
        opening = _OPENING.search(text, at, min(end, at + _GAP))
        if opening is None:
            return
        mark = opening[0]
        closing = _CLOSINGS.get(mark) or (f'"{opening[1]}' if opening[1] else mark)
        close = _closing_of(text, opening.end(), end, closing)
        if close < 0:
            return
        yield opening.start(), opening.end(), close
        at = close + len(closing)


def _closing_of(text: str, begin: int, end: int, closing: str) -> int:
    """Return where a literal ends, -1 if it does not: not at an escaped quote, nor at a doubled one (SQL)."""
    close = text.find(closing, begin, end)
    while close >= 0:
        slashes = close - len(text[begin:close].rstrip("\\")) - begin
        follows = text[close + 2 : close + 3]
        is_doubled = closing == "'" and close > begin and text.startswith("''", close) and follows.isalnum()
        if closing[0] == "\\" or (slashes % 2 == 0 and not is_doubled):
            return close
        close = text.find(closing, close + (2 if is_doubled else 1), end)
    return -1


def _literals(text: str, at: int, end: int, name: _Name, *, is_listed: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the literals after a name that are secrets.

    ``is_listed``: the name is in a literal, so the next one after a comma is its value, or merely in the same list.
    """
    last = at
    has_values = False
    for number, (start, begin, close) in enumerate(_literals_after(text, at, end)):
        connector = text[last:start]
        has_values = has_values or "VALUES" in connector.upper()
        if not _CONNECTOR.fullmatch(_BRACKETS.sub("", connector)) or _NO_CONNECTOR.search(connector):
            return
        last = close + 1
        is_direct = has_values or (number == 0 and _DIRECT.fullmatch(connector) is not None)
        is_direct = is_direct and (bool(connector.strip()) or text[start] != "`")
        given = _KEYWORD.search(connector)
        is_direct = is_direct and not (given and any(word.lower() in _OTHERS for word in _WORD.findall(given[1])[-1:]))
        is_strong = name.is_strong and not (is_listed and given is None and "," in connector)
        if number and given and given[1].lower() not in _DEFAULTS:
            continue  # another argument
        evidence = Evidence(is_strong, is_direct, True, name.is_phrase, name.is_password)  # noqa: FBT003
        if looks_secret(text[begin:close], evidence):
            yield begin, close


# Where a name stands in its line decides how a value without quotes may follow it:
#     expansion  ${NAME:-value}          config   nothing before it but what settings and shells have there
#     flow       {a: 1, b: 2} of YAML    query    after ? & ; and such
#     markup     after a <               shouts   the name is in upper case
_ASSIGNING = frozenset({"config", "shouts", "query", "option", "literal"})
# How a value follows, where, and where that is a direct assignment. The first value that is a secret counts.
_FORMS: tuple[tuple["re.Pattern[str]", frozenset[str], frozenset[str]], ...] = (
    (_EXPANSION, frozenset({"expansion"}), frozenset({"expansion"})),
    (_EQUALS, _ASSIGNING | {"space"}, _ASSIGNING),
    (_HEADER, frozenset({"literal"}), frozenset({"literal"})),
    (_COLON, frozenset({"config", "literal", "remark"}), frozenset({"config", "literal"})),
    (_DEFAULT, frozenset({"config"}), frozenset({"config"})),
    (_FLOW, frozenset({"flow"}), frozenset({"flow"})),
    (_SPACED, frozenset({"config"}), frozenset({"config"})),
    (_OPTION, frozenset({"option"}), frozenset({"option"})),
    (_ELEMENT, frozenset({"markup"}), frozenset({"markup"})),
    (_BYTES, frozenset({"anywhere"}), frozenset({"anywhere"})),
    (_AFTER_SPACE, frozenset({"anywhere"}), frozenset()),
)


def _places_of(text: str, name: _Name, before: str) -> set[str]:
    facts = (
        ("anywhere", True),
        ("expansion", before.endswith(("${", "$("))),
        ("config", _IS_CONFIG.fullmatch(before) is not None),
        ("shouts", text[name.start : name.end].isupper()),
        ("query", before[-1:] in {"?", "&", ";", ",", ":", "/", "{", "="}),
        ("option", before.endswith("-") or text[name.start] == "-"),
        ("space", before.endswith(" ")),
        ("literal", any(before.count(quote) % 2 for quote in "\"'`")),
        ("remark", _REMARK.match(before) is not None),
        ("flow", before.rstrip().endswith(("{", ","))),
        ("markup", "<" in before[-90:]),
    )
    return {place for place, holds in facts if holds}


def _unquoted(text: str, name: _Name, before: str, end: int) -> tuple[int, int] | None:
    """Return the range of a secret value without quotes right after a name, or ``None``."""
    here = _places_of(text, name, before)
    for pattern, places, direct in _FORMS:
        match = pattern.match(text, name.end, end) if here & places else None
        if match is not None:
            value = _REMARK_AFTER.split(match["value"], maxsplit=1)[0].rstrip()
            is_direct = bool(here & direct) and not (pattern is _COLON and "remark" in here)
            is_quoted = pattern in {_ELEMENT, _HEADER} or name.is_phrase
            shouts = pattern is _EQUALS and "shouts" in here
            evidence = Evidence(name.is_strong, is_direct, is_quoted, name.is_phrase, name.is_password, shouts)
            if looks_secret(value, evidence):
                return match.start("value"), match.start("value") + len(value)
    return None


def _below(text: str, name: _Name, at: int, line_end: int) -> Iterator[tuple[int, int]]:
    """Yield the secret values of a name in the lines below it, if its own line ends before them."""
    rest = text[at:line_end].rstrip()
    if len(rest) > _GAP:  # a line that says much more than the name
        return
    is_open, is_block = _OPEN_END.search(rest) is not None, _BLOCK.search(rest) is not None
    weak = _Name(name.start, name.end, is_strong=False)
    begin = line_end
    for _ in range(_NEXT_LINES):
        begin += 2 if text.startswith("\r\n", begin) else 1
        end = _line_end(text, begin) if begin < len(text) else begin
        line = text[begin:end].rstrip()
        if is_block and line:
            yield from _judge(
                _PLAIN_LINE.match(line.removesuffix('"""').removesuffix("'''")), begin, name, is_quoted=True
            )
            return
        fits = _BEGINS_VALUE.match(line) is not None
        if begin >= len(text) or not (fits or is_open):
            return
        if fits:
            found = [*_literals(text, begin, end, weak if rest.endswith(",") else name)]
            yield from found or _judge(_STRING_ELEMENT.match(line), begin, name, is_quoted=True)
            if found or not line.endswith((",", "+", "(")):
                yield from () if found else _judge(_VALUE_LINE.match(line), begin, name, is_quoted=False)
                return
        begin = end


def _judge(found: "re.Match[str] | None", begin: int, name: _Name, *, is_quoted: bool) -> Iterator[tuple[int, int]]:
    """Yield the range of a match's value, in a line that begins at ``begin``, if it is a secret."""
    evidence = Evidence(name.is_strong, is_direct=True, is_quoted=is_quoted, is_phrase=name.is_phrase)
    if found is not None and looks_secret(found["value"].rstrip(), evidence):
        yield begin + found.start("value"), begin + found.start("value") + len(found["value"].rstrip())
