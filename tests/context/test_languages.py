"""Languages: names as editors write them, and what is known of those without a grammar."""

import pytest

from fimserver.context.languages.lexical import FILE, LEXICAL, NAMES
from fimserver.context.languages.names import find_language, language_of_path
from fimserver.context.languages.probe import to_text
from fimserver.context.languages.table import LANGUAGES
from fimserver.context.place import Place, complete_place, find_place
from fimserver.context.scan import scan
from fimserver.datatypes import Completion, HoleKind, NoCompletion, Snapshot
from fimserver.settings import Settings

MARK = "\u25ae"
# Identifiers of VS Code (its documentation's list of known ones) and file types of Vim and Neovim, with the language.
_SAME = (
    "coffeescript cuda-cpp d dart dockerfile elixir erlang go groovy handlebars haskell julia less lua nim nix ocaml "
    "php prolog pug r ruby rust sass scala scheme slim solidity stylus svelte swift systemverilog tcl toml vala "
    "verilog vhdl vim vue zig kotlin fish graphql cmake crystal gleam odin elm purescript racket fennel awk ada"
)
EDITORS_NAMES = {
    **dict.fromkeys(["python", "python.django", "python3", "pyi", "ipython", "Python"], "python"),
    **dict.fromkeys(["javascript", "javascriptreact", "javascript.jsx", "mjs"], "javascript"),
    **dict.fromkeys(["typescriptreact", "typescript.tsx", "tsx"], "typescriptreact"),
    **dict.fromkeys(["sh", "bash", "zsh", "shellscript", "ksh", "sh.bash"], "shellscript"),
    **dict.fromkeys(["yaml", "yaml.ansible", "yaml.docker-compose", "dockercompose", "yml"], "yaml"),
    **dict.fromkeys(["html", "xhtml", "eruby", "html.django_template", "erb"], "html"),
    **dict.fromkeys(["markdown", "markdown.mdx", "vimwiki.markdown", "rmd", "quarto", "mdx"], "markdown"),
    **dict.fromkeys(["json", "jsonc", "json5", "jsonl"], "json"),
    **dict.fromkeys(["c", "c.doxygen", "h"], "c"),
    **dict.fromkeys(["cpp", "cpp.doxygen", "c++"], "cpp"),
    **dict.fromkeys(["cs", "csharp", "c#"], "csharp"),
    **dict.fromkeys(["make", "makefile", "mk"], "makefile"),
    **dict.fromkeys(["bat", "dosbatch"], "bat"),
    **dict.fromkeys(["ps1", "powershell"], "powershell"),
    **dict.fromkeys(["dosini", "ini", "properties", "systemd", "gitconfig"], "ini"),
    **dict.fromkeys(["tex", "latex", "plaintex"], "latex"),
    **dict.fromkeys(["objc", "objective-c"], "objective-c"),
    **dict.fromkeys(["objcpp", "objective-cpp"], "objective-cpp"),
    **dict.fromkeys(["fsharp", "f#"], "fsharp"),
    **dict.fromkeys(["perl", "perl5"], "perl"),
    **dict.fromkeys(["raku", "perl6"], "raku"),
    **dict.fromkeys(["terraform", "hcl", "tf", "terraform-vars"], "hcl"),
    **dict.fromkeys(["proto", "proto3", "protobuf"], "proto3"),
    **dict.fromkeys(["htmldjango", "jinja", "django-html", "jinja-html"], "jinja"),
    **dict.fromkeys(["vb", "vbnet"], "vb"),
    **dict.fromkeys(["lisp", "commonlisp"], "commonlisp"),
    **dict.fromkeys(["clojure", "edn"], "clojure"),
    **dict.fromkeys(["sql", "mysql", "plsql", "pgsql"], "sql"),
    **dict.fromkeys(["bzl", "bazel", "starlark"], "starlark"),
    **dict.fromkeys(["scss", "postcss"], "scss"),
    **dict.fromkeys(["xml", "xsl", "svg", "xsd"], "xml"),
    **{name: name for name in _SAME.split()},
    "": "plaintext",
    "plaintext": "plaintext",
    "my.own": "my.own",
}
# A comment with the cursor, in a file of code around it.
COMMENTS = {
    "kotlin": "fun a() {{}}\n{}\nfun b() {{}}\n // x",
    "sql": "SELECT 1;\n{}\nSELECT 2;\n -- x",
    "dockerfile": "FROM a\n{}\nRUN b\n # x",
    "scss": "a {{ color: red; }}\n{}\nb {{ color: red; }}\n /* x */",
    "vue": "<template>\n{}\n</template>\n <!-- x -->",
    "haskell": "a = 1\n{}\nb = 2\n -- x",
    "powershell": "$a = 1\n{}\n$b = 2\n <# x #>",
    "julia": "a = 1\n{}\nb = 2\n #= x =#",
    "clojure": "(def a 1)\n{}\n(def b 2)\n ; x",
    "vb": "Dim a\n{}\nDim b\n ' x",
    "erlang": "a() -> 1.\n{}\nb() -> 2.\n % x",
    "fortran": "a = 1\n{}\nb = 2\n ! x",
    "bat": "echo a\n{}\necho b\n REM x",
    "latex": "\\section{{a}}\n{}\ntext 50\\% of it\n % x",
    "ocaml": "let a = 1\n{}\nlet b = 2\n (* x *)",
    "swift": "let a = 1\n{}\nlet b = 2\n /* x */",
    "dart": "var a = 1;\n{}\nvar b = 2;\n // x",
    "nix": "{{ a = 1;\n{}\n}}\n # x",
    "zig": "const a = 1;\n{}\nconst b = 2;\n // x",
    "makefile": "a: b\n{}\nc: d\n # x",
}


def hole_at(marked: str, language: str, *, comments: bool = True) -> Place | NoCompletion:
    cursor = marked.index(MARK)
    snapshot = Snapshot("file:///a", 1, language, marked.replace(MARK, ""), cursor)
    return find_place(snapshot, Settings(comments=comments), invoked=True)


@pytest.mark.parametrize("name", EDITORS_NAMES)
def test_names_of_editors(name: str) -> None:
    assert find_language(name).id == EDITORS_NAMES[name]


def test_a_hundred_languages_are_known() -> None:
    assert len({language.id for language in (*LANGUAGES, *LEXICAL)}) >= 120
    assert [language.id for language in LEXICAL] == list(NAMES)
    assert not {language.id for language in LEXICAL} & {language.id for language in LANGUAGES}


def test_the_file_is_what_the_lexers_say() -> None:
    assert FILE.read_text(encoding="utf-8") == to_text(), "run: python -m fimserver.context.languages.probe"


@pytest.mark.parametrize("language", COMMENTS)
def test_comments_of_languages_without_a_grammar(language: str) -> None:
    text, _, example = COMMENTS[language].rpartition("\n ")
    comment = example.replace("x", f"rows that were skipped{MARK} here")
    assert getattr(hole_at(text.format(comment), language, comments=False), "reason", "") == "in_comment"
    found = hole_at(text.format(comment), language)
    assert isinstance(found, Place)
    assert found.hole.kind is HoleKind.COMMENT
    after = hole_at(text.format(example) + MARK, language, comments=False)
    assert isinstance(after, Place), "the comment has ended"


@pytest.mark.parametrize(
    ("language", "marked", "kind"),
    [
        ("kotlin", f'val a = "text {MARK}"', HoleKind.STRING),
        ("swift", f'let a = "text {MARK}"', HoleKind.STRING),
        ("perl", f"my $a = 'text {MARK}';", HoleKind.STRING),
        ("dart", f"var a = 'text {MARK}';", HoleKind.STRING),
        ("kotlin", f'val a = """\n  text " {MARK}\n"""', HoleKind.STRING),
        ("elixir", f'a = "it\'s {MARK}"', HoleKind.STRING),
        ("haskell", f"a' = f {MARK}", HoleKind.REST_OF_LINE),
        ("scala", f"val it's = {MARK}", HoleKind.REST_OF_LINE),
        ("plaintext", f"we don't {MARK}", HoleKind.REST_OF_LINE),
        ("unheard-of", f"we don't (ever) # {MARK}", HoleKind.REST_OF_LINE),
    ],
)
def test_strings_of_languages_without_a_grammar(language: str, marked: str, kind: HoleKind) -> None:
    found = hole_at(marked + "\n", language)
    assert isinstance(found, Place)
    assert found.hole.kind is kind


CHARACTERS = [
    ("kotlin", "val i = \u25ae", "s.indexOf('(')"),
    ("objective-c", "\u25ae", "if (c == '(') { foo(); }"),
    ("swift", "let i = \u25ae", "f('\"')"),
    ("haskell", "a = \u25ae", "takeWhile (/= '(') x'"),
    ("scala", "val a = \u25ae", "s.split(')')"),
    ("scheme", "(define a \u25ae)", "#\\("),
    ("clojure", "(def a \u25ae)", "\\)"),
    ("perl", "\u25ae", "$x =~ s/\\)//g;"),
    ("elixir", "a = \u25ae", "?("),
    ("erlang", "A = \u25ae", "$(."),
    ("zig", "const a = \u25ae", "'{';"),
]


@pytest.mark.parametrize(("language", "marked", "answer"), CHARACTERS)
def test_characters_are_no_brackets(language: str, marked: str, answer: str) -> None:
    found = hole_at(marked + "\n", language)
    assert isinstance(found, Place)
    completion = complete_place(answer, found)
    assert isinstance(completion, Completion), completion
    assert completion.middle == answer


@pytest.mark.parametrize(
    ("language", "marked"),
    [
        ("ini", "url = http://a.com/#\u25ae"),
        ("ini", "url = jdbc:a;\u25ae"),
        ("properties", "a.url=http://x/#\u25ae"),
        ("perl", "my $n = $#\u25ae"),
        ("elixir", "a = ?#\u25ae"),
        ("asm", "mov r0, #\u25ae"),
        ("dockerfile", "RUN echo a#\u25ae"),
    ],
)
def test_what_is_no_comment(language: str, marked: str) -> None:
    found = hole_at(marked + "\n", language, comments=False)
    assert isinstance(found, Place), found


@pytest.mark.parametrize(
    ("language", "marked", "answer", "is_right"),
    [
        ("kotlin", "fun \u25ae", "main() {", True),
        ("nginx", "location ~ \\.php$ \u25ae", "{", True),
        ("dart", "void main() {\n  \u25ae\n}", "if (x) {", True),
        ("dart", "void main() {\n  \u25ae\n}", "if (x {", False),
        ("swift", "let a = [1)\nlet b = \u25ae\nlet c = f(2)", "f(1)", True),
        ("kotlin", "val a = \u25ae", "f(1))", False),
    ],
)
def test_headers_of_blocks_and_faults_elsewhere(language: str, marked: str, answer: str, is_right: bool) -> None:
    found = hole_at(marked + "\n", language)
    assert isinstance(found, Place)
    assert isinstance(complete_place(answer, found), Completion) is is_right


def test_an_escaped_per_cent_sign_begins_no_comment() -> None:
    assert not scan("50\\% of it", find_language("latex")).in_comment
    assert scan("50 % of it", find_language("latex")).in_comment


def test_languages_that_are_not_known_are_different_languages() -> None:
    assert find_language("foo") is find_language("FOO")
    assert find_language("foo") is not find_language("bar")


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a/b.kt", "kotlin"),
        ("Dockerfile", "dockerfile"),
        ("C:\\src\\a.TF", "hcl"),
        ("build.gradle", "groovy"),
        ("CMakeLists.txt", "cmake"),
        ("a.svelte", "svelte"),
        ("a.unheard", "unheard"),
        ("noending", "plaintext"),
    ],
)
def test_languages_of_paths(path: str, language: str) -> None:
    assert language_of_path(path) == language
