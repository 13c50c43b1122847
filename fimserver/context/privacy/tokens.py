"""Recognise secrets by their form alone: tokens of services, private keys, passwords in addresses and commands.

    find_tokens   the ranges of such secrets in a text

Tokens are long runs of letters, digits and a few signs, so only these are compared with their formats. All other
patterns are tried only if one of their hints is in the text, because most texts have none.

Source: the public lists of token formats of gitleaks, trufflehog and GitHub's secret scanning (facts: prefix, alphabet,
length). Lengths are lower limits here, since services change them.
"""

import re
from collections.abc import Iterator

_RUN = re.compile(r"[A-Za-z0-9_\-.~+/=$:%]{20,}")
_LONG_RUN = 34  # characters: a token of letters alone is at least as long
_DIGIT = re.compile(r"\d")
_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
# Prefix and what follows it. A prefix of letters has to begin a word.
_PREFIXED = """
A3- [A-Z0-9]{6}-[A-Z0-9-]{20,}|ops_eyJ [A-Za-z0-9+/=_-]{100,}|aio_ [A-Za-z0-9]{28}|p8e- [A-Za-z0-9_-]{32}
AGE-SECRET-KEY- (?:PQ-)?1[0-9A-Z]{40,}|LTAI [A-Za-z0-9]{12,20}|AKCp [A-Za-z0-9]{60,}|cmVmd [A-Za-z0-9]{59}
ATATT3 [A-Za-z0-9_=-]{60,}|ATCTT3 [A-Za-z0-9_=-]{60,}|ATBB [A-Za-z0-9_=-]{24,}|AKIA [0-9A-Z]{16}|ASIA [0-9A-Z]{16}
ABIA [0-9A-Z]{16}|ACCA [0-9A-Z]{16}|FwoGZXIvYXdz [A-Za-z0-9/+=]{80,}|IQoJb3JpZ2lu [A-Za-z0-9/+=]{80,}
ABSK [A-Za-z0-9+/]{60,}={0,2}|amzn.mws. UUID
xkeysib- [0-9a-f]{64}-[A-Za-z0-9]{16}|xsmtpsib- [0-9a-f]{64}-[A-Za-z0-9]{16}
access_token$production$ [0-9a-z]{16}\\$[0-9a-f]{32}|bkua_ [0-9a-f]{40}|CCIPAT_ [A-Za-z0-9]{20,24}_[0-9a-f]{40}
CCIPRJ_ [A-Za-z0-9]{20,24}_[0-9a-f]{40}|4b1d [A-Za-z0-9]{38}|CLOJARS_ [A-Za-z0-9]{60}|v1.0- [0-9a-f]{24}-[0-9a-f]{100,}
CFPAT- [A-Za-z0-9_-]{43}|cio [A-Za-z0-9]{32}|dapi [0-9a-f]{32}(?:-\\d)?|dnkey- [a-z0-9=_-]{26}-[a-z0-9=_-]{52}
dop_v1_ [0-9a-f]{32,}|doo_v1_ [0-9a-f]{32,}|dor_v1_ [0-9a-f]{32,}|dckr_pat_ [A-Za-z0-9_-]{20,}
dckr_oat_ [A-Za-z0-9_-]{20,}|dp.pt. [A-Za-z0-9]{40,}|dp.ct. [A-Za-z0-9]{40,}|dp.sa. [A-Za-z0-9]{40,}
dp.st. [a-z0-9_.-]{0,36}[A-Za-z0-9]{40,}|dp.scim. [A-Za-z0-9]{40,}|dp.audit. [A-Za-z0-9]{40,}|sl. [A-Za-z0-9=_-]{100,}
duffel_test_ [A-Za-z0-9_=-]{43}|duffel_live_ [A-Za-z0-9_=-]{43}|dt0c01. [A-Z0-9]{24}\\.[A-Z0-9]{64}|EZAK [A-Za-z0-9]{54}
EZTK [A-Za-z0-9]{54}|EAAM [A-Za-z0-9]{90,}|EAAC [A-Za-z0-9]{90,}|EAAA [A-Za-z0-9_-]{50,}|figd_ [A-Za-z0-9_-]{36,}
figo_ [A-Za-z0-9_-]{36,}|figor_ [A-Za-z0-9_-]{36,}|FLWSECK [A-Za-z_]{0,6}-[0-9a-h]{12,}-X|fo1_ [A-Za-z0-9_-]{43}
fm1a_ [A-Za-z0-9+/=]{80,}|fm1r_ [A-Za-z0-9+/=]{80,}|fm2_ [A-Za-z0-9+/=]{80,}|fio-u- [A-Za-z0-9_=-]{64}
ghp_ [A-Za-z0-9]{30,255}|gho_ [A-Za-z0-9]{30,255}|ghu_ [A-Za-z0-9]{30,255}|ghs_ [A-Za-z0-9]{30,255}
ghr_ [A-Za-z0-9]{30,255}|github_pat_ [A-Za-z0-9_]{40,255}|glpat- [A-Za-z0-9_.-]{16,}|glptt- [0-9a-f]{40}
GR1348941 [A-Za-z0-9_-]{20,}|glrt- [A-Za-z0-9_.-]{20,}|glcbt- [A-Za-z0-9_-]{20,}|gldt- [A-Za-z0-9_-]{20,}
glffct- [A-Za-z0-9_-]{20,}|glft- [A-Za-z0-9_-]{20,}|glimt- [A-Za-z0-9_-]{20,}|glagent- [A-Za-z0-9_-]{40,}
gloas- [A-Za-z0-9_-]{40,}|glsoat- [A-Za-z0-9_-]{20,}|live_ [A-Za-z0-9_=-]{40}|AIza [0-9A-Za-z_-]{35}
GOCSPX- [A-Za-z0-9_-]{24,}|ya29. [A-Za-z0-9_-]{20,}|1//0 [A-Za-z0-9_-]{60,}|GOOG1E [A-Z0-9]{55}
eyJrIjoi [A-Za-z0-9]{60,}={0,3}
glc_ [A-Za-z0-9+/]{32,}={0,3}|glsa_ [A-Za-z0-9]{32}_[0-9A-Fa-f]{8}|gsk_ [A-Za-z0-9]{40,}|hvs. [A-Za-z0-9_-]{24,}
hvb. [A-Za-z0-9_-]{60,}|HRKU- [A-Za-z0-9_-]{30,}|hf_ [A-Za-z0-9]{30,}|api_org_ [A-Za-z0-9]{30,}
pat-na1- UUID|pat-eu1- UUID
ico- [A-Za-z0-9]{32}|s-s4t2ud- [0-9a-f]{64}|s-s4t2af- [0-9a-f]{64}|lsv2_pt_ [0-9a-f]{32}_[0-9a-f]{10}
lsv2_sk_ [0-9a-f]{32}_[0-9a-f]{10}|api- UUID|sdk- UUID|lin_api_ [A-Za-z0-9]{32,}|lin_oauth_ [0-9a-f]{32,}
key- [0-9a-f]{32}
sk. [A-Za-z0-9_-]{50,}\\.[A-Za-z0-9_-]{20,}|pk. eyJ[A-Za-z0-9_-]{40,}\\.[A-Za-z0-9_-]{20,}|Mid-server- [A-Za-z0-9_-]{24}
nfp_ [A-Za-z0-9_]{30,}|NRAK- [A-Z0-9]{27}|NRII- [A-Za-z0-9-]{32}|NRJS- [0-9a-f]{19}|ntn_ [0-9]{11}[A-Za-z0-9]{35}
secret_ [A-Za-z0-9]{43}|npm_ [A-Za-z0-9]{36}|oy2 [a-z0-9]{43}|API- [A-Z0-9]{24,30}|sk- [A-Za-z0-9_-]{16,}
sk_live_ [A-Za-z0-9_-]{16,}|sk_test_ [A-Za-z0-9_-]{16,}|sk_prod_ [A-Za-z0-9_-]{16,}|rk_live_ [A-Za-z0-9_-]{16,}
rk_test_ [A-Za-z0-9_-]{16,}|rk_prod_ [A-Za-z0-9_-]{16,}|whsec_ [A-Za-z0-9+/=]{24,}|sha256~ [A-Za-z0-9_-]{43}
pplx- [A-Za-z0-9]{40,}|access-sandbox- UUID|access-development- UUID|access-production- UUID
pscale_tkn_ [A-Za-z0-9_=.-]{30,}|pscale_oauth_ [A-Za-z0-9_=.-]{30,}|pscale_pw_ [A-Za-z0-9_=.-]{30,}
PMAK- [0-9a-f]{24}-[0-9a-f]{34}|pnu_ [A-Za-z0-9]{36}|pnb_ [A-Za-z0-9]{36}|pul- [0-9a-f]{40}|pypi-AgE [A-Za-z0-9_-]{20,}
rdme_ [a-z0-9]{60,}|r8_ [A-Za-z0-9]{36,}|re_ [A-Za-z0-9]{8}_[A-Za-z0-9]{24}|rubygems_ [0-9a-f]{48}
tk-us- [A-Za-z0-9_-]{48}
SG. [A-Za-z0-9_-]{16,}\\.[A-Za-z0-9_-]{16,}|sntryu_ [0-9a-f]{64}|sntrys_ [A-Za-z0-9+/=_]{40,}|sm_aat_ [A-Za-z0-9]{16}
sm_pat_ [A-Za-z0-9]{16}|sm_sat_ [A-Za-z0-9]{16}|shippo_live_ [0-9a-fA-F]{40}|shippo_test_ [0-9a-fA-F]{40}
shpat_ [0-9a-fA-F]{32}|shpca_ [0-9a-fA-F]{32}|shppa_ [0-9a-fA-F]{32}|shpss_ [0-9a-fA-F]{32}|xapp- [0-9A-Za-z-]{20,}
xoxe. xox[bp]-[0-9A-Za-z-]{40,}|squ_ [0-9a-f]{40}|sqp_ [0-9a-f]{40}|sqa_ [0-9a-f]{40}|sgp_ [0-9A-Za-z_]{40,}
sq0atp- [A-Za-z0-9_-]{22,}|sq0csp- [A-Za-z0-9_-]{40,}|sbp_ [0-9a-f]{40}|sb_secret_ [A-Za-z0-9_-]{20,}
tskey-api- [A-Za-z0-9-]{20,}|tskey-auth- [A-Za-z0-9-]{20,}|tskey-client- [A-Za-z0-9-]{20,}|tskey-scim- [A-Za-z0-9-]{20,}
tskey-webhook- [A-Za-z0-9-]{20,}|SK [0-9a-f]{32}|AC [0-9a-f]{32}|tfp_ [A-Za-z0-9_.=-]{50,}
vercel_blob_rw_ [A-Za-z0-9]{16}_[A-Za-z0-9]{30}|xai- [A-Za-z0-9]{70,}|AQVN [A-Za-z0-9_-]{35,38}|YC [A-Za-z0-9_-]{38}
t1. [A-Za-z0-9_-]{20,}={0,2}\\.[A-Za-z0-9_-]{60,}|b3BlbnNzaC1rZXktdjE [A-Za-z0-9+/=]{20,}
"""


def _prefixed() -> dict[str, list[str]]:
    """Return the patterns that begin with a fixed text, by that text."""
    entries = re.split(r"\n|\|(?=\S+ )", _PREFIXED.strip())
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        prefix, _, rest = entry.partition(" ")
        patterns.setdefault(prefix, []).append(re.escape(prefix) + rest.replace("UUID", _UUID))
    return patterns


_Patterns = tuple[tuple[tuple[str, ...], "re.Pattern[str]"], ...]
# The last group of a pattern is the secret. These are tried on runs,
_IN_RUNS: _Patterns = (
    *(
        ((prefix,), re.compile(rf"(?<![A-Za-z0-9_])((?:{'|'.join(patterns)}))(?![A-Za-z0-9])"))
        for prefix, patterns in _prefixed().items()
    ),
    (("xox",), re.compile(r"\b(xox[abeoprs]-[A-Za-z0-9-]{10,})")),
    (("eyJ",), re.compile(r"(?<![\w-])(eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,2000})")),
    ((".acc",), re.compile(r"\b((?:sc|ext|scauth|authress)_[a-z0-9]{5,30}\.[a-z0-9]{4,6}\.acc[_-][\w.+/=-]{30,200})")),
    (("pat",), re.compile(r"(?<!\w)(pat[A-Za-z0-9]{14}\.[0-9a-f]{64})\b")),
    (("pat.", "sat."), re.compile(r"\b([ps]at\.[A-Za-z0-9_-]{22}\.[0-9A-Za-z]{24}\.[0-9A-Za-z]{20})\b")),
    (("Q~",), re.compile(r"(?<![\w~.])([A-Za-z0-9_~.]{3}\dQ~[A-Za-z0-9_~.-]{31,34})")),
    (
        ("+ASt", "ACDb", "AzFu", "AZDO", "+ACR"),
        re.compile(r"([A-Za-z0-9+/]{40,76}(?:\+ASt|ACDb|AZDO|AzFu|\+ACR)[\w+/=-]{4,10})"),
    ),
    ((".atlasv1.",), re.compile(r"\b([A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,70})")),
    (("_mmk",), re.compile(r"\b([A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk)\b")),
    (("NRAL",), re.compile(r"\b([0-9a-f]{36}NRAL)\b")),
    (("-us",), re.compile(r"\b([0-9a-f]{32}-us\d{1,2})\b")),
    ((":A",), re.compile(r"(?<![A-Za-z0-9_:])(?:bot)?(\d{6,16}:A[A-Za-z0-9_-]{34})\b")),
    (
        ("M", "N", "O"),
        re.compile(r"(?<![\w.-])([MNO][A-Za-z0-9]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38})(?![\w.-])"),
    ),
    ((":",), re.compile(r"(?<![\w/])([012]/\d{10,20}(?:/\d{10,20})?:[0-9a-f]{32})\b")),
    (("s.",), re.compile(r"(?<![\w.])(s\.(?=\w{0,23}\d)(?=\w{0,23}[A-Z])[A-Za-z0-9]{24})(?![\w.])")),
)
# and these on whole texts.
_IN_TEXTS: _Patterns = (
    (("_gitlab_session",), re.compile(r"_gitlab_session=([0-9a-z]{32})")),
    (("sig=",), re.compile(r"(?:sig|SharedAccessSignature)=([A-Za-z0-9%/+]{40,}(?:%3D|=)?)")),
    (("://",), re.compile(r"://[^\s/:@'\"]{0,80}:([^\s/@'\"{}$<>]{3,200})@")),
    (("://",), re.compile(r"://([0-9a-f]{32})(?::[0-9a-f]{32})?@")),
    (("MII",), re.compile(r"(?<![A-Za-z0-9+/])(MII[BCEJ][A-Za-z0-9+/=]{56,}(?:\r?\n[ \t]*[A-Za-z0-9+/=]{40,})*)")),
    (
        ("-----BEGIN",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(.*?)(?:-----END [A-Z ]*PRIVATE KEY|\Z)", re.DOTALL),
    ),
    (("AccountKey=", "SharedAccessKey="), re.compile(r"(?:AccountKey|SharedAccessKey)=([A-Za-z0-9+/]{16,}={0,2})")),
    (("earer ", "BEARER "), re.compile(r"\b(?i:bearer) +(?=[^\s\"']{0,400}\d)([A-Za-z0-9._~+/-]{12,}={0,2})")),
    (
        ("uthorization", "AUTHORIZATION"),
        re.compile(r"(?i:authorization)\W{1,20}(?i:basic) +([A-Za-z0-9+/]{8,400}={0,2})"),
    ),
    (
        ("uthorization", "AUTHORIZATION"),
        re.compile(r"(?i:authorization)\W{1,20}(?i:token|apikey|key) +(?=\S{0,80}\d)([A-Za-z0-9._~+/-]{12,400}={0,2})"),
    ),
    (("hooks.slack.com/",), re.compile(r"hooks\.slack\.com/(?:services|workflows|triggers)/([A-Za-z0-9+/]{20,200})")),
    (("/webhooks/",), re.compile(r"discord(?:app)?\.com/api/webhooks/(\d{5,30}/[\w-]{20,200})")),
    (("webhook.office.com",), re.compile(r"webhook\.office\.com/(\w{1,20}/[\w@/-]{30,300})")),
    (("hooks.zapier.com",), re.compile(r"hooks\.zapier\.com/hooks/catch/(\d{4,12}/\w{5,20})")),
    (("nemonic", "seed"), re.compile(r"(?i:mnemonic|seed)\w{0,20}\W{1,20}((?:[a-z]{3,8} ){11,23}[a-z]{3,8})\b")),
    # Commands: a user's name and a password, or a password as an option of one letter.
    (
        ("curl", "wget", "http"),
        re.compile(r"\bcurl\b.{0,300}?\s(?:-u|--user)[ =]?[\"']?[\w.@\\-]{1,80}:([^\s\"'$]{4,200})"),
    ),
    (("mysql",), re.compile(r"\bmysql\w*\b.{0,200}?\s-p[\"']?(?![\d\s$]{1,9}(?:\s|$))([^\s\"'$]{6,200})")),
    (("sshpass",), re.compile(r"\bsshpass\b.{0,80}?-p[ ]?[\"']?([^\s\"'$]{4,200})")),
    (
        ("login", "mongo", "sqlcmd", "redis-cli", "ldap", "bcp "),
        re.compile(
            r"\b(?:(?:docker|podman|az|oc) login|mongo\w*|sqlcmd|bcp|redis-cli|ldap\w+)\b.{0,200}?\s-[pPaw] ?[\"']?"
            r"(?![\d.:]+(?:/\w+)?(?:[\s\"']|$))"
            r"(?=[^\s\"'$]{0,200}[\d!#%&*+;?^~])([^\s\"'$]{6,200})"
        ),
    ),
    (
        ("smb", "rpcclient"),
        re.compile(r"\b(?:smbclient|rpcclient|smbmap)\b.{0,120}?-U ?[\"']?[\w.\\/-]{1,80}%([^\s\"'$]{4,200})"),
    ),
    (("net use",), re.compile(r"\bnet use\b.{0,120}?/user:\S{1,80} ([^\s\"'$]{6,200})")),
    (("pass:",), re.compile(r"\s-pass(?:in|out)? pass:([^\s\"'$]{4,200})")),
    (("sudo -S",), re.compile(r"echo [\"']?([^\s\"'$]{6,200})[\"']? ?\| ?sudo -S")),
    (("chpasswd",), re.compile(r"echo [\"']?[\w.-]{1,60}:([^\s\"'$]{6,200})[\"']? ?\| ?chpasswd")),
    (("htpasswd",), re.compile(r"\bhtpasswd -\w*b\w* \S{1,200} \S{1,80} [\"']?([^\s\"'$]{6,200})")),
    (("snmp",), re.compile(r"\bsnmp\w+\b.{0,120}?-c ?[\"']?([^\s\"'$]{6,200})")),
    (("mosquitto",), re.compile(r"\bmosquitto_\w+\b.{0,120}?-P ?[\"']?([^\s\"'$]{6,200})")),
    (("/rp ",), re.compile(r"\s/rp [\"']?([^\s\"'%]{6,200})")),
    (("lftp",), re.compile(r"\blftp -u [\w.-]{1,60},([^\s\"'$]{6,200})")),
    (("community",), re.compile(r"(?m)^\s*r[ow]community6? ([^\s\"'$]{6,200})")),
    (("asic ",), re.compile(r"(?i:authorization): ?Basic [\w.@-]{1,80} ([^\s\"'{$]{6,200})$", re.MULTILINE)),
    (("password ",), re.compile(r"(?:insecure-password|\bpassword [0-7]) ([^\s\"'$]{6,200})")),
    # Addresses without a scheme.
    (("@tcp(", "@unix("), re.compile(r"[\"'`][\w.-]{1,60}:([^\s\"'`$@]{4,200})@(?:tcp|unix)\(")),
    (("thin:",), re.compile(r"jdbc:oracle:thin:\w{1,60}/([^\s\"'$@]{4,200})@")),
    (
        (":",),
        re.compile(
            r"(?m)^(?:[\w-]+(?:\.[\w-]+)+|localhost|\w*\d+|\*):(?:\d{4,5}|\*):[\w*-]{1,60}:[\w*-]{1,60}:([^\s:/]{6,200})$"
        ),
    ),
    (("[?&;]key=", "key=", "key%3D"), re.compile(r"[?&]key=(?=[\w-]{0,200}\d)([\w-]{20,200})")),
)


def find_tokens(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of secrets in a text, in no order; they may overlap."""
    for run in _RUN.finditer(text):
        found = run[0]
        if _DIGIT.search(found) is None and len(found) < _LONG_RUN:
            continue
        for hints, pattern in _IN_RUNS:
            if any(hint in found for hint in hints):
                for match in pattern.finditer(text, run.start(), run.end()):
                    yield match.span(1)
    for hints, pattern in _IN_TEXTS:
        if any(hint in text for hint in hints):
            for match in pattern.finditer(text):
                yield match.span(1)
