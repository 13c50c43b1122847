"""Files that are never read, and text that a model never sees."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import MARK, FakeServer

from fimserver.context.languages.table import words
from fimserver.context.privacy.ignored import IgnoreRules, path_of_file
from fimserver.context.privacy.names import is_private
from fimserver.context.privacy.redaction import has_secret, mask, reveals
from fimserver.context.query import OtherDocument
from fimserver.context.window import Budget, build_context
from fimserver.datatypes import Hole, HoleKind, Match, NoCompletion, Snapshot, Snippet
from fimserver.lsp.configuration import Source
from fimserver.lsp.documents import Document
from fimserver.lsp.session import Session
from fimserver.pipeline import Memory, find_hole_at
from fimserver.text import LineIndex

HOLE = Hole(HoleKind.REST_OF_LINE, 1, 1)
# put together here, so that secret scanners do not report this file
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_" + "11ABCDEFG0" * 6,
    "glpat-" + "x1Yz" * 5,
    "xoxb-" + "123456789012-abcdefABCDEF",
    "sk-proj-" + "aB3dE6" * 8,
    "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "npm_" + "a1B2c3" * 6,
    "hf_" + "aB3dE6" * 6,
    "pypi-AgE" + "IcHlwaS5vcmcCJ" * 3,
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN",
    "ya29." + "a0AfB_byC3" * 4,
    "dop_v1_" + "0a1b2c3d" * 8,
    "hvs." + "CAESIJ1k2l" * 4,
    "dckr_pat_" + "aB3dE6-_" * 4,
    "shpat_" + "0a1b2c3d" * 4,
    "AGE-SECRET-KEY-1" + "QPZRY9X8GF2TVDW0" * 3,
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda s: s[:6])
@pytest.mark.parametrize("line", ["x = '{}'", "curl -H 'Authorization: Bearer {}' https://a.b", "{}", "KEY={} # mine"])
def test_tokens_are_crossed_out(secret: str, line: str) -> None:
    text = f"import os\n{line.format(secret)}\nprint(1)\n"
    masked = mask(text)
    assert secret[8:] not in masked
    assert len(masked) == len(text)
    assert masked.startswith("import os\n")
    assert masked.endswith("\nprint(1)\n")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("password = 'hunter2hunter2'", "hunter2hunter2"),
        ('"api_key": "0123456789abcdef",', "0123456789abcdef"),
        ("DB_PASSWORD: str = 'p4ssw0rd!'", "p4ssw0rd!"),
        ("config['secret_token'] = \"s3cr3ts3cr3t\"", "s3cr3ts3cr3t"),
        ("const apiKey = 'k3y-0123456789'", "k3y-0123456789"),
        ("if token == 'abc123def456':", "abc123def456"),
        ("url = 'postgres://me:pa55word@host/db'", "pa55word"),
        ("DefaultEndpointsProtocol=https;AccountKey=Zm9vYmFyYmF6cXV4MTIz==;", "Zm9vYmFyYmF6cXV4MTIz=="),
        ("headers = {'Authorization': 'Bearer abc123def456ghi'}", "abc123def456ghi"),
        ("Authorization: Basic dXNlcjpwYXNzMTIz", "dXNlcjpwYXNzMTIz"),
        ('{"authorization": "Basic dXNlcjpwYXNzd29yZA=="}', "dXNlcjpwYXNzd29yZA=="),
        ("const password = `hunter2hunter2`", "hunter2hunter2"),
        ('password = "pa$$w0rd{123"', "pa$$w0rd{123"),
        ("passphrase = 'correcthorsebattery'", "correcthorsebattery"),
        ("DB_PWD = 'hunter2hunter2'", "hunter2hunter2"),
        ("auth_key: 'k3y-0123456789'", "k3y-0123456789"),
        ("password: hunter2abc99", "hunter2abc99"),
        ("  - db-password: hunter2abc99  # mine", "hunter2abc99"),
        ("db.password=abc12345xyz\nother=1", "abc12345xyz"),
        ("export GITHUB_TOKEN=abc12345xyz", "abc12345xyz"),
        ("ENV API_KEY=abc12345xyz", "abc12345xyz"),
        (
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        ),
        ("const transport = {user: 'bot', pass: 'Xk29fjQ0aa77'}", "Xk29fjQ0aa77"),
        ("DATABASE_PASS = 'Xk29fjQ0aa77'", "Xk29fjQ0aa77"),
        ("docker login --username bot --password Xk29fjQ0aa77", "Xk29fjQ0aa77"),
        ("deploy --api-key=Xk29fjQ0aa77 --dry-run", "Xk29fjQ0aa77"),
        ('add connectionString="Server=db;User Id=sa;Password=Xk29fjQ0aa77;"', "Xk29fjQ0aa77"),
        ("var c = 'Host=db;Pwd=Xk29fjQ0aa77';", "Xk29fjQ0aa77"),
        ("requests.get(url, auth=('admin', 'Xk29fjQ0aa77'))", "Xk29fjQ0aa77"),
        ('HTTPBasicAuth("admin", "Xk29fjQ0aa77")', "Xk29fjQ0aa77"),
        ("PASSWORD_OF_IT = 'correct horse battery staple 9'", "battery staple"),
        ("URL = 'https://hooks.slack.com/services/T01ABCDEF/B02GHIJKL/aBcDeFgHiJkLmNoPqRsTuVwX'", "aBcDeFgHiJkL"),
        ("https://discord.com/api/webhooks/123456789012345678/aBcDeFgHiJkLmNoPqRsTuVwXyZ01", "aBcDeFgHiJkL"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQ\nEA1234\n-----END RSA PRIVATE KEY-----", "MIIEpAIBAAKCAQ"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk", "b3BlbnNzaC1rZXk"),
    ],
)
def test_literals_are_crossed_out(text: str, secret: str) -> None:
    masked = mask(text)
    assert secret not in masked
    assert [len(line) for line in masked.split("\n")] == [len(line) for line in text.split("\n")]
    assert mask(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "password = os.environ['DB_PASSWORD_2']",
        "bypass = 'compass-needle-2'",
        "passes: 'first-and-second-2'",
        "pass: '${DB_PASSWORD_2}'",
        "docker login --username bot --password $PASSWORD_2",
        "docker login --password-stdin 12345678",
        "run --max-tokens 1234567890",
        "requests.get(url, auth=('admin', get_password(2)))",
        "authenticate('user-name', 'page-title')",
        "'password = ' + quote(value2)",
        "password_hint = 'Enter your password here, 8 letters or more'",
        "see https://hooks.slack.com/services/ and https://discord.com/api/webhooks/",
        "token = tokenizer.next_token(2)",
        "password: str = field(default='')",
        "key = 'refresh_token'",
        "{'token': 'access_token'}",
        "url = 'https://example.com:8080/path@2'",
        "password = '${DB_PASSWORD_1}'",
        "password = f'{prefix2}-password'",
        "password = '$DB_PASSWORD_1'",
        "password = '<your-password-2>'",
        "form = {'password': 'userPassword', 'type_password': 'enterPassword'}",
        "password: changeMePlease",
        "export TOKEN=$(make_token2 --new)",
        "    token=config.token_v2\n",
        "    token: Token2\n",
        "token = settings.ACCESS_TOKEN_V2\n",
        "secret = next(iter(secrets2))\n",
        "author = 'somebody12'",
        "    privateKey: Uint8Array\n",
        "private_key: Ed25519PrivateKey\n",
        "    max_tokens=config.max_tokens*2\n",
        "num_tokens=batch_size*seq_len2\n",
        "    token=self._tokens+1\n",
        "MAX_TOKENS=1000000000\n",
        "PASSWORD_RESET_TIMEOUT=86400000\n",
        "tokenizer: bert-base-uncased-v2\n",
        "max_tokens: 128000000\n",
        "secretName: tls-cert-v1\n",
        "private_key_path: ~/.ssh/id_ed25519\n",
        "TOKEN_URL=https://example.com/oauth2/token\n",
        "# Basic DataFrameTransformer\n",
        "/** Basic HttpServerRequest */\n",
        "# a bearer of good news",
        "def mask(secret: str, length: int = 12) -> str:",
        "sk = skip_1234567890123456",
    ],
)
def test_code_is_left(text: str) -> None:
    assert mask(text) == text
    assert not has_secret(text)


PRIVATE = words(
    ".env .env.local .env-prod .env_prod .env~ .envrc prod.env .netrc _netrc .npmrc .pypirc .pgpass .htpasswd .my.cnf "
    ".git-credentials credentials credentials.json secrets.yaml app-secret.properties .aws/credentials .aws/config "
    ".kube/config .docker/config.json .cargo/credentials.toml service-account.json my_service_account-1.json "
    "client_secret_1.json terraform.tfstate terraform.tfstate.backup id_rsa id_ecdsa_sk id_rsa.bak id_ed25519-old "
    "terraform.tfvars prod.auto.tfvars.json kubeconfig kubeconfig-prod.yaml .config/gh/hosts.yml "
    ".azure/accessTokens.json .dev.vars .bash_history .python_history .psql_history wp-config.php auth.json "
    "server.key.bak a.pem.old "
    "secrets/x.txt config/secrets/db.yml .secrets/token ConsoleHost_history.txt .ssh/a%0Ab "
    ".ssh/id_work .ssh/config .gnupg/trustdb a.pem a.key a.jks a.keystore a.keytab a.ppk a.p12 a.kdbx a.ovpn"
)
PUBLIC = words(
    "env.py environment.ts secrets.py credentials.rs secret_santa.py token.go config.json kube/config.py keys.py "
    "src/secrets/index.ts app/Secrets/SecretsController.cs internal/secrets/vault.go .azure/pipelines/ci.yml "
    "kubeconfig.go "
    "pkg/kubeconfig/kubeconfig_test.go locales/en/auth.json i18n/key.json locales/de/secrets.json id_rsa.go .env.d.ts "
    ".env.example wp-config-sample.php id_ed25519.pub example.tfvars include/shadow .environment "
    "id_rsa_reader.py docker/config.json ssh/client.c account.json .gitignore .editorconfig tfstate.go README.md"
)


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_files_of_secrets_are_private(name: str) -> None:
    assert is_private(f"file:///home/me/project/{name}")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_files_of_code_are_not(name: str) -> None:
    assert not is_private(f"file:///home/me/project/{name}")


@given(st.text(max_size=200))
def test_lengths_and_lines_stay(text: str) -> None:
    masked = mask(text)
    assert len(masked) == len(text)
    assert [i for i, c in enumerate(masked) if c in "\r\n"] == [i for i, c in enumerate(text) if c in "\r\n"]


def test_redaction_is_fast() -> None:
    text = ("    token = self.tokens[index]  # a secret of https://example.com\n" * 700)[:40_000]
    mask(text)
    begin = time.process_time()
    for _ in range(5):
        mask(text)
    assert (time.process_time() - begin) / 5 < 0.02  # 2 to 3 ms measured on a busy machine


def test_the_model_sees_no_secret() -> None:
    secret = SECRETS[1]
    text = f"TOKEN = '{secret}'\n" + "def f():\n    pass\n" * 50 + f"x = \ny = '{secret}'\n"
    snapshot = Snapshot("file:///a.py", 1, "python", text, text.index("x = ") + 4)
    context = build_context(
        snapshot,
        HOLE,
        Budget(400, 200),
        (Snippet("b.py", f"T = '{secret}'"),),
        [Match(f"'{secret}'", 40, 10), Match("1", 40, 10)],
    )
    assert secret not in repr(context)
    assert [match.text for match in context.matches] == ["1"]
    assert context.suffix.startswith("\ny = 'xxxx")


# Ignored files


def refusal(folder: Path, name: str, rules: IgnoreRules | None = None, *, with_git: bool = True) -> str | None:
    refused = (rules or IgnoreRules()).refuse((folder / name).as_uri(), with_git=with_git)
    return refused.detail if refused is not None else None


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


NAMES = [
    "a.py", "build/a.py", "build/deep/a.py", "src/build/a.py", "src/a.log", "src/keep.log", "src/gen/x.py",
    "src/gen/keep.py", "local.py", "src/local.py", "docs/a b.md", "docs/café.md", "x/y/z.tmp", "x/y/z.py",
]  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {".gitignore": "build/\n*.log\n!keep.log\n"},
        {".gitignore": "/local.py\n# comment\n\n*.tmp\n", "src/.gitignore": "gen/*\n!gen/keep.py\n"},
        {".gitignore": "src/gen\n", "src/.gitignore": "!gen\n", "src/gen/.gitignore": "!keep.py\n"},
        {".gitignore": "*.md\n", "docs/.gitignore": "!*.md\n"},
        {".gitignore": "**/y/**\nx/**/z.py\n"},
        {".gitignore": "*\n!*/\n!*.py\n"},
        {".gitignore": "/build/*\n!/build/deep/\n/src/*\n!/src/build/\nx\n!x/y/\n"},
        {".gitignore": "*\n!build/\n!src\n"},
        {".git/info/exclude": "local.py\n"},
    ],
)
def test_gitignore_matches_git(repository: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(repository / "none"))
    for name in NAMES:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("")
    for name, text in files.items():
        (repository / name).write_text(text)
    rules = IgnoreRules()
    for name in NAMES:
        asked = subprocess.run(["git", "-C", str(repository), "check-ignore", "-q", "--no-index", name], check=False)
        assert (refusal(repository, name, rules) is not None) == (asked.returncode == 0), name
        assert refusal(repository, name, rules, with_git=False) is None


def test_gitignore_needs_a_repository(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*\n")
    assert refusal(tmp_path, "a.py") is None


def test_the_own_ignore_file_always_applies(tmp_path: Path) -> None:
    (tmp_path / ".fimserverignore").write_text("*.sql\nprivate/\n[\n")
    for name in ("a.sql", "deep/er/b.sql", "private/x.py"):
        detail = refusal(tmp_path, name, with_git=False)
        assert detail is not None
        assert str(tmp_path / ".fimserverignore") in detail
    assert refusal(tmp_path, "a.py") is None


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    rules = IgnoreRules()
    file = tmp_path / ".fimserverignore"
    assert refusal(tmp_path, "a.py", rules) is None
    file.write_text("a.py\n")
    assert refusal(tmp_path, "a.py", rules) is not None
    file.write_text("another.py\n")
    assert refusal(tmp_path, "a.py", rules) is None
    file.unlink()
    assert refusal(tmp_path, "another.py", rules) is None


def test_a_link_to_a_secret_is_private(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("A=1")
    (tmp_path / "settings.txt").symlink_to(tmp_path / ".env")
    detail = refusal(tmp_path, "settings.txt")
    assert detail is not None
    assert "secrets" in detail


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a/b%20c.py", Path("/a/b c.py")),
        ("file://localhost/a.py", Path("/a.py")),
        ("vscode-notebook-cell:/a/n.ipynb#X1", Path("/a/n.ipynb")),
        ("file://server/share/a.py", None),
        ("untitled:Untitled-1", None),
        ("vscode-remote://ssh/a.py", None),
        ("git:/a.py?ref", None),
        ("file:///a%00b", None),
        ("http://[bad", None),
        ("", None),
    ],
)
def test_uris(uri: str, path: Path | None) -> None:
    assert path_of_file(uri) == path
    assert IgnoreRules().refuse(uri) is None


def others_of(session: Session, snapshot: Snapshot) -> Iterator[OtherDocument]:
    query = session.to_query(snapshot, invoked=True)
    return Memory().readable(query.others, snapshot, query.settings)


def test_the_session_asks(repository: Path) -> None:
    (repository / ".gitignore").write_text("generated.py\n")
    session = Session()
    texts = {"generated.py": "value = compute_everything(1)\n", "a.py": "x = \n"}
    for name, text in texts.items():
        session.open(Document((repository / name).as_uri(), "python", 1, LineIndex(text)))
    uri = (repository / "generated.py").as_uri()
    snapshot = Snapshot((repository / "a.py").as_uri(), 1, "python", texts["a.py"], 4)
    assert list(others_of(session, snapshot)) == []
    generated = Snapshot(uri, 1, "python", texts["generated.py"], 8)
    place = find_hole_at(session.to_query(generated, invoked=True), Memory())
    assert isinstance(place, NoCompletion)
    assert place.reason == "ignored_file"
    assert "completeIgnored" in place.detail
    session.configuration.set_layer(Source.CONFIG_FILE, {"completeIgnored": True})
    assert len(list(others_of(session, snapshot))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "'password' => 'hunter2abc'",
        'password = f"hunter2abcd"',
        'passwd = """hunter2abc"""',
        'password: Optional[str] = "hunter2abc"',
        'db_password: str | None = "hunter2abc"',
    ],
)
def test_literals_of_other_styles_are_crossed_out(text: str) -> None:
    assert "hunter2" not in mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "token" * 8000,
        "token=\n" * 8000,
        "eyJaaaaaaaa-" * 8000,
        "password = '" * 3000,
        "://a:" * 8000,
        "--password " * 5000,
        "auth=('a', '" * 4000,
        ";password=" * 5000,
        "pass: '" * 6000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    begin = time.process_time()
    mask(text)
    assert time.process_time() - begin < 2.0


@pytest.mark.parametrize("lines", [40, 2000])
def test_a_key_that_begins_above_the_window_and_a_token_under_the_cursor(lines: int) -> None:
    body = "\n".join(f"MIIEpAIBAAKCAQEA{i:04}abcdefghijklmnop" for i in range(lines))
    text = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----\nx = \n"
    snapshot = Snapshot("file:///a.py", 1, "python", text, text.index("x = ") + 4)
    assert "MIIE" not in repr(build_context(snapshot, HOLE, Budget(300, 100)))
    inside = replace(snapshot, cursor=snapshot.cursor - 700)
    assert "MIIE" not in repr(build_context(inside, HOLE, Budget(300, 100)))
    token = SECRETS[1]
    text = f"x = {token}\n"
    context = build_context(Snapshot("file:///a.py", 1, "python", text, 12), HOLE, Budget(300, 100))
    assert token[:6] not in context.prefix
    assert token[12:] not in context.suffix


@pytest.mark.parametrize(
    ("before", "match"),
    [
        ("DB_PASSWORD = ", '"hunter2secret99"'),
        ('DB_PASSWORD = "', 'hunter2secret99"'),
        ('DB_PASSWORD = "', "hunter2secret99"),
    ],
)
def test_a_match_with_a_secret_is_dropped(before: str, match: str) -> None:
    assert reveals(before, match)
    assert not reveals("value = ", "compute(1)")


@pytest.mark.slow("starts servers")
@pytest.mark.parametrize("language", ["python", "markdown", "yaml", "plaintext"])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_typed_key_prefix_is_not_completed_with_a_key(
    start_fake: Callable[..., FakeServer], language: str, *, is_own: bool
) -> None:
    lines = [f"MIIEpAIBAAKCAQEA{i:04}abcdefghijklmnopABCDEFGHIJKLMNOPqrstuvwxyz0123" for i in range(8)]
    key = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *lines, "-----END RSA PRIVATE KEY-----", ""])
    server = start_fake()
    server.wait_until_ready()
    begin = "-----BEGIN RSA PRIVATE KEY-----\n"
    if not is_own:
        server.open("file:///home/me/other", key, language)
    text = f"{key}\n{begin}{MARK}\n" if is_own else f"{begin}{MARK}\n"
    for typed in ("", "MIIEpA", lines[0][:-8], f"{lines[0]}\n", f"{lines[0]}\n{lines[1][:30]}"):
        uri, line, column = server.show(f"file:///home/me/{len(typed)}", text.replace(MARK, typed + MARK), language)
        for invoked in (True, False):
            offered = server.complete(uri, line, column, invoked=invoked)
            assert all("MII" not in item["insertText"] for item in offered)
            reported = [item["insertText"] for item in offered]
            assert [piece for piece in reported if piece in key and "PRIVATE" not in piece and len(piece) > 3] == []
        server.shut(uri)
    assert "MIIE" not in json.dumps([begun["others"] for begun in server.noted("begun")])


def test_devices_and_endless_patterns_take_no_time(tmp_path: Path) -> None:
    (tmp_path / ".fimserverignore").symlink_to("/dev/zero")
    assert refusal(tmp_path, "a.py") is None
    (tmp_path / ".fimserverignore").unlink()
    os.mkfifo(tmp_path / ".fimserverignore")
    assert refusal(tmp_path, "a.py") is None
    (tmp_path / ".fimserverignore").unlink()
    (tmp_path / ".fimserverignore").write_text("*a*a*a*a*a*a*a*a*b\n*.sql\n")
    begin = time.process_time()
    assert refusal(tmp_path, "a" * 200) is None
    assert time.process_time() - begin < 1.0
    assert refusal(tmp_path, "a.sql") is not None
