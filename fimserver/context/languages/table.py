"""Define the languages: their grammars, and the syntax of their comments, strings and blocks.

    LANGUAGES   those with a grammar
    PLAIN       a language of which nothing is known

The tables cover what a tree cannot: unfinished code. Grammars are loaded on first use.

Knows:  lexical facts.  Never: trees, documents.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any


class BlockStyle(StrEnum):
    """The way a language marks the body of a header."""

    INDENT = "indent"
    BRACE = "brace"
    KEYWORD = "keyword"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Quote:
    """One kind of string: its marks, whether it may span lines, whether a backslash escapes.

    ``code`` is a regular expression for the start of interpolated code, up to a bracket.
    """

    open: str
    close: str
    multiline: bool = False
    escapes: bool = True
    code: str = ""


def _quotes(text: str, *, multiline: bool = False, escapes: bool = True, code: str = "") -> tuple[Quote, ...]:
    return tuple(Quote(mark, mark, multiline, escapes, code) for mark in text.split())


@dataclass(frozen=True, eq=False)
class Language:
    """One language; its regular expressions are for single lines without comments."""

    id: str  # VS Code's language id; other names are in ``names.py``
    grammar: tuple[str, str] | None = None  # module and function
    suffixes: tuple[str, ...] = ()  # of file names, with the dot
    line_comments: tuple[str, ...] = ()  # marks that begin a comment up to the end of the line
    block_comments: tuple[tuple[str, str], ...] = ()  # marks that begin and end a comment
    quotes: tuple[Quote, ...] = ()  # kinds of strings, longer marks first
    comment_after_space: bool = False  # "#" inside a word does not start a comment
    quote_after_space: bool = False  # an apostrophe inside a word is not a quote
    literals: str = ""  # tokens that only look like a quote, a bracket or a comment
    literal_starts: str = ""  # first characters of ``literals``
    documents: str = ""  # start of a here-document
    has_brackets: bool = True
    style: BlockStyle = BlockStyle.NONE  # how the body of a header is marked
    header: str = r"(?!)"  # a line that begins a statement with a body
    opener: str = r"(?!)"  # end of a line that opens a body
    imports: str = r"(?!)"  # an import line
    whole_file: int = 6_000  # characters up to which a file is analysed whole; parsing so many takes 1 ms
    reserved: str = ""  # keywords that the grammar reads as names
    jumps: str = ""  # words that begin a statement after which the rest of its block does not run
    end_words: tuple[tuple[str, str], ...] = ()  # (header, end word) of the keyword style
    is_lexical: bool = False  # only comments, strings and brackets are known (``lexical.py``)

    @cached_property
    def header_pattern(self) -> re.Pattern[str]:
        """Return the pattern of a line that begins a statement with a body."""
        return re.compile(rf"\s*(?:{self.header})")

    @cached_property
    def opener_pattern(self) -> re.Pattern[str]:
        """Return the pattern of the end of a line that opens a body."""
        return re.compile(self.opener)

    @cached_property
    def import_pattern(self) -> re.Pattern[str]:
        """Return the pattern of an import line."""
        return re.compile(self.imports, re.MULTILINE)

    def end_word(self, header: str) -> str:
        """Return the word that ends the body of a header line; empty for languages without one."""
        return next((word for pattern, word in self.end_words if re.search(pattern, header)), "")


def words(text: str) -> frozenset[str]:
    """Split a text into a set of words."""
    return frozenset(text.split())


_JUMPS = "return throw break continue"
_C_WORDS = "if else for while do switch case return break continue"
_JS_WORDS = f"{_C_WORDS} function class const var throw try catch finally import export extends in instanceof"
# Keywords, types and values that many languages have; none is the beginning of a longer name.
KEYWORDS = words(
    f"{_JS_WORDS} raise yield await async def fn func fun let mut val local module namespace package use using include "
    "require from as is not and or then do done end fi elif elsif elseif except rescue ensure begin unless until loop "
    "match when with where self this super nil null none None true false True False void int long short char bool "
    "boolean float double byte string String str object any number var auto new delete typeof sizeof static final "
    "public private protected internal abstract virtual override readonly struct enum union interface trait impl type "
    "typedef template pub crate mod ref out go defer select chan map range echo print println printf len"
)
_RUBY_HEADERS = "def|class|module|if|elsif|else|unless|while|until|case|when|begin|rescue|ensure|for"
_C_COMMENTS: dict[str, Any] = {"line_comments": ("//",), "block_comments": (("/*", "*/"),)}
_PLAIN_QUOTES = _quotes("\" '")
_JS_QUOTES = (*_quotes("`", multiline=True, code=r"\$\{"), *_PLAIN_QUOTES)
_JS_REGEX: dict[str, Any] = {
    "literals": r"(?:(?<=[=(,:;!&|?{\[])|(?<=[=(,:;!&|?{\[] )|(?<==> )|(?<=return )|(?<![\s\S]))"
    r"/(?![*/])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/"
    r"|(?<=\w)'(?=(?:s|t|re|ll|ve|d|m)\b)",  # apostrophe in a word of an element's text
    "literal_starts": "/'",
}
_DIGITS_APART: dict[str, Any] = {"literals": r"(?<=\d)'(?=\d)", "literal_starts": "'"}
VOID_ELEMENTS = "area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr"  # HTML elements without an end tag
_BRACE_HEADER = (
    r"(?:\}\s*)?(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|unsafe|override|"
    r"virtual|sealed|partial|inline|constexpr|pub(?:\([\w:]+\))?|declare|const(?=\s+(?:fn|enum)))\s+)*"
    r"(?:if|else|for|foreach|while|do|switch|try|catch|finally|function|func|fn|class|struct|union|enum|interface|"
    r"trait|impl|namespace|mod|module|match|loop|select|record|type\s+\w+\s+(?:struct|interface))\b"
)
_BRACE: dict[str, Any] = {"style": BlockStyle.BRACE, "header": _BRACE_HEADER, "opener": r"[{]\s*$"}
_CASE_OPENER = r"[{]\s*$|^\s*(?:case\b.*|default\s*):\s*$"
_JS_BLOCKS: dict[str, Any] = _BRACE | {"opener": _CASE_OPENER}
_C_OPENER = rf"{_CASE_OPENER}|^\s*(?:public|private|protected)\s*:\s*$"

LANGUAGES = (
    Language(
        "python",
        ("tree_sitter_python", "language"),
        (".py", ".pyi", ".pyw"),
        line_comments=("#",),
        quotes=(*_quotes("\"\"\" '''", multiline=True), *_PLAIN_QUOTES),
        style=BlockStyle.INDENT,
        header=r"(?:async|class|def|elif|else|except|finally|for|if|match|case|try|while|with)\b",
        opener=r":\s*$",
        imports=r"(?:import|from)\s",
        jumps="return raise break continue",
    ),
    Language(
        "javascript",
        ("tree_sitter_javascript", "language"),
        (".js", ".mjs", ".cjs", ".jsx"),
        **_C_COMMENTS,
        quotes=_JS_QUOTES,
        **_JS_REGEX,
        **_JS_BLOCKS,
        reserved=_JS_WORDS,
        imports=r"import\b|export .* from\b|(?:const|let|var) .*\brequire\(",
        jumps=_JUMPS,
    ),
    Language(
        "typescript",
        ("tree_sitter_typescript", "language_typescript"),
        (".ts", ".mts", ".cts"),
        **_C_COMMENTS,
        quotes=_JS_QUOTES,
        **_JS_REGEX,
        **_JS_BLOCKS,
        reserved=_JS_WORDS,
        imports=r"import\b|export .* from\b",
        jumps=_JUMPS,
    ),
    Language(
        "typescriptreact",
        ("tree_sitter_typescript", "language_tsx"),
        (".tsx",),
        **_C_COMMENTS,
        quotes=_JS_QUOTES,
        **_JS_REGEX,
        **_JS_BLOCKS,
        reserved=_JS_WORDS,
        imports=r"import\b|export .* from\b",
        jumps=_JUMPS,
    ),
    Language(
        "go",
        ("tree_sitter_go", "language"),
        (".go",),
        **_C_COMMENTS,
        quotes=(*_quotes("`", multiline=True, escapes=False), *_PLAIN_QUOTES),
        style=BlockStyle.BRACE,
        header=_BRACE_HEADER,
        opener=rf"{_CASE_OPENER}|^\s*(?:import|const|var|type)\s*\(\s*$",
        reserved="if else for switch case return break continue func var const type package import range go defer",
        imports=r"import\b|package\b",
        jumps="return break continue goto",
    ),
    Language(
        "rust",
        ("tree_sitter_rust", "language"),
        (".rs",),
        **_C_COMMENTS,
        quotes=(
            *(Quote(f'r{marks}"', f'"{marks}', multiline=True, escapes=False) for marks in ("", "#", "##")),
            *_quotes('"', multiline=True),
        ),
        literals=r"'(?:\\(?:u\{[^}]*\}|x\w\w|.)|[^\\'\n])'",
        literal_starts="'",
        **_BRACE,
        reserved="if else for while loop match return break continue fn let mut impl struct enum trait use mod pub in",
        imports=r"(?:pub )?use\b|extern crate\b",
        jumps="return break continue",
    ),
    Language(
        "java",
        ("tree_sitter_java", "language"),
        (".java",),
        **_C_COMMENTS,
        quotes=(*_quotes('"""', multiline=True), *_PLAIN_QUOTES),
        style=BlockStyle.BRACE,
        header=_BRACE_HEADER,
        opener=_C_OPENER,
        reserved=f"{_C_WORDS} class interface enum new throw throws try catch finally import package extends",
        imports=r"import\b|package\b",
        jumps=_JUMPS,
    ),
    Language(
        "c",
        ("tree_sitter_c", "language"),
        (".c", ".h"),
        **_C_COMMENTS,
        quotes=_PLAIN_QUOTES,
        **_DIGITS_APART,
        style=BlockStyle.BRACE,
        header=_BRACE_HEADER,
        opener=_C_OPENER,
        reserved=f"{_C_WORDS} struct union enum typedef goto sizeof",
        imports=r"#\s*include\b",
        jumps="return break continue goto",
    ),
    Language(
        "cpp",
        ("tree_sitter_cpp", "language"),
        (".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx"),
        **_C_COMMENTS,
        quotes=(Quote('R"(', ')"', multiline=True, escapes=False), *_PLAIN_QUOTES),
        literals=_DIGITS_APART["literals"] + r'|\bR"(?P<name>\w*)\([\s\S]*?\)(?P=name)"',
        literal_starts="'R",
        style=BlockStyle.BRACE,
        header=_BRACE_HEADER,
        opener=_C_OPENER,
        reserved=f"{_C_WORDS} struct class namespace template throw try catch using goto",
        imports=r"#\s*include\b|using\b|import\b",
        jumps=f"{_JUMPS} goto",
    ),
    Language(
        "csharp",
        ("tree_sitter_c_sharp", "language"),
        (".cs",),
        **_C_COMMENTS,
        quotes=(
            *_quotes('"""', multiline=True, escapes=False),
            Quote('$@"', '"', multiline=True, escapes=False, code=r"\{(?!\{)"),
            Quote('@$"', '"', multiline=True, escapes=False, code=r"\{(?!\{)"),
            Quote('$"', '"', code=r"\{(?!\{)"),
            Quote('@"', '"', multiline=True, escapes=False),
            *_PLAIN_QUOTES,
        ),
        style=BlockStyle.BRACE,
        header=_BRACE_HEADER,
        opener=_C_OPENER,
        reserved=f"{_C_WORDS} class struct namespace interface new throw try catch finally foreach using",
        imports=r"using\b|namespace\b",
        jumps=f"{_JUMPS} goto",
    ),
    Language(
        "ruby",
        ("tree_sitter_ruby", "language"),
        (".rb", ".rake", ".gemspec"),
        line_comments=("#",),
        quotes=(*_quotes('" `', multiline=True, code=r"#\{"), *_quotes("'", multiline=True)),
        documents=r"<<(?:[~-][\"'`]?\w+[\"'`]?|[A-Z_]+\b|[\"']\w+[\"'])",
        style=BlockStyle.KEYWORD,
        header=rf"(?:{_RUBY_HEADERS})\b",
        opener=(
            r"^\s*(?!def\s+[\w.]+\s*(?:\([^)]*\))?\s*=\s|.*\bend$)"
            rf"(?:{_RUBY_HEADERS})\b"
            r"|\bdo(?:\s*\|[^|]*\|)?\s*$|[{](?:\s*\|[^|]*\|)?\s*$"
        ),
        reserved="def class module if elsif else unless while until case when begin rescue ensure end then do",
        imports=r"require\b|require_relative\b|include\b",
        end_words=(
            (
                rf"^\s*(?:{_RUBY_HEADERS})\b|\bdo(?:\s*\|[^|]*\|)?\s*$",
                "end",
            ),
        ),
        jumps="return raise break next redo retry",
    ),
    Language(
        "php",
        ("tree_sitter_php", "language_php"),
        (".php",),
        line_comments=("//", "#"),
        block_comments=(("/*", "*/"),),
        quotes=(*_quotes('"', multiline=True, code=r"\{(?=\$)"), *_quotes("'", multiline=True)),
        literals=r"#(?=\[)|(?<![\s\S])[\s\S]*?<\?(?:php|=)|\?>[\s\S]*?(?:<\?(?:php|=)|(?![\s\S]))",
        literal_starts="#?<",
        documents=r"<<<[\"']?[A-Za-z_]\w*[\"']?",
        style=BlockStyle.BRACE,
        header=_BRACE_HEADER,
        opener=_C_OPENER,
        imports=r"use\b|namespace\b|require(?:_once)?\b|include(?:_once)?\b|<\?php",
        jumps=_JUMPS,
    ),
    Language(
        "shellscript",
        ("tree_sitter_bash", "language"),
        (".sh", ".bash", ".zsh", ".ksh"),
        line_comments=("#",),
        comment_after_space=True,
        quotes=(
            *_quotes('"', multiline=True, code=r"\$\(|\$\{"),
            Quote("$'", "'", multiline=True),
            *_quotes("'", multiline=True, escapes=False),
        ),
        literals=r"\\[\s\S]|<<<",
        literal_starts="\\",
        documents=r"<<-?[ \t]*[\"']?[A-Za-z_]\w*[\"']?",
        style=BlockStyle.KEYWORD,
        header=r"(?:if|elif|else|for|while|until|case|function|select)\b|[\w-]+\s*\(\)",
        opener=r"\b(?:then|do|else|in)\s*$|(?<!\$)[{]\s*$|^\s*[^\s()]+(?:\s*\|\s*[^\s()]+)*\)\s*$",
        reserved="then do else elif fi done esac",
        imports=r"source\b|\.\s",
        end_words=(
            (r"\bif\b|\bthen\s*$|^\s*else\b", "fi"),
            (r"^\s*(?:for|while|until|select)\b|\bdo\s*$", "done"),
            (r"^\s*case\b", "esac"),
        ),
        jumps="return exit break continue",
    ),
    Language(
        "lua",
        ("tree_sitter_lua", "language"),
        (".lua",),
        line_comments=("--",),
        block_comments=tuple((f"--[{marks}[", f"]{marks}]") for marks in ("", "=", "==", "===")),
        quotes=(
            *(Quote(f"[{m}[", f"]{m}]", multiline=True, escapes=False) for m in ("", "=", "==", "===")),
            *_PLAIN_QUOTES,
        ),
        style=BlockStyle.KEYWORD,
        header=r"(?:local\s+)?(?:function|if|elseif|else|for|while|repeat|do)\b",
        opener=r"\b(?:then|do|else|repeat)\s*$|\bfunction\b[\s\w.:]*\([^)]*\)\s*$|[{]\s*$",
        reserved="and break do else elseif end for function if in local or repeat return then until while",
        imports=r"(?:local\s+\w+\s*=\s*)?require\b",
        end_words=((r"\b(?:function|if|elseif|else|for|while|do)\b", "end"),),
        jumps="return break goto",
    ),
    Language(
        "html",
        ("tree_sitter_html", "language"),
        (".html", ".htm"),
        block_comments=(("<!--", "-->"),),
        quotes=(Quote('="', '"', multiline=True, escapes=False), Quote("='", "'", multiline=True, escapes=False)),
        has_brackets=False,
        style=BlockStyle.NONE,
        opener=rf"<(?!(?:{VOID_ELEMENTS})\b)\w(?:[^>]*[^/>])?>\s*$",
        imports=r"<link\b|<script\b",
    ),
    Language(
        "css",
        ("tree_sitter_css", "language"),
        (".css",),
        block_comments=(("/*", "*/"),),
        quotes=_PLAIN_QUOTES,
        style=BlockStyle.BRACE,
        opener=r"[{]\s*$",
        imports=r"@import\b",
    ),
    Language(
        "json",
        ("tree_sitter_json", "language"),
        (".json", ".jsonc"),
        **_C_COMMENTS,
        quotes=_quotes('"'),
        style=BlockStyle.BRACE,
        opener=r"[{\[]\s*$",
        whole_file=64_000,
    ),
    Language(
        "yaml",
        ("tree_sitter_yaml", "language"),
        (".yaml", ".yml"),
        line_comments=("#",),
        comment_after_space=True,
        quotes=(*_quotes('"', multiline=True), *_quotes("'", multiline=True, escapes=False)),
        quote_after_space=True,
        style=BlockStyle.INDENT,
        opener=r":(?:\s+[|>][+-]?\d*)?$",
    ),
    Language(
        "toml",
        ("tree_sitter_toml", "language"),
        (".toml",),
        line_comments=("#",),
        quotes=(
            *_quotes('"""', multiline=True),
            *_quotes("'''", multiline=True, escapes=False),
            *_quotes('"'),
            *_quotes("'", escapes=False),
        ),
        style=BlockStyle.NONE,
        opener=r"^\s*\[.*\]\s*$|[\[{]\s*$",
    ),
    Language("markdown", ("tree_sitter_markdown", "language"), (".md", ".markdown"), has_brackets=False),
)
PLAIN = Language("plaintext", quotes=_PLAIN_QUOTES, opener=r"[:{]\s*$")
