"""Know comments, strings and brackets of languages without a grammar here, by what pygments' lexers make of samples.

    LEXICAL   those languages; their facts are in ``lexical.json``

``probe.py`` writes that file.

Knows:  names, a file of this package.  Never: documents.
"""

import json
from pathlib import Path
from typing import Any

from fimserver.context.languages.table import PLAIN, Language, Quote

FILE = Path(__file__).with_name("lexical.json")
# Editors' ids, each with its other names (VS Code's, Vim's, of Markdown fences). The first is also pygments' name,
# unless ``probe.py`` says otherwise.
NAMES = {
    "ada": "",
    "apex": "apexcode",
    "applescript": "",
    "asm": "nasm gas masm assembly",
    "astro": "",
    "autohotkey": "ahk",
    "awk": "gawk",
    "ballerina": "",
    "bat": "dosbatch batch cmd",
    "bibtex": "bib",
    "bicep": "",
    "clojure": "clj cljs clojurescript edn",
    "cmake": "",
    "cobol": "",
    "coffeescript": "coffee",
    "commonlisp": "lisp cl",
    "crystal": "cr",
    "cuda-cpp": "cuda cu",
    "cython": "pyx",
    "d": "",
    "dart": "",
    "delphi": "pascal objectpascal",
    "diff": "patch",
    "dockerfile": "docker containerfile",
    "elisp": "emacs-lisp",
    "elixir": "ex exs eelixir",
    "elm": "",
    "erlang": "erl",
    "fennel": "",
    "fish": "fishshell",
    "fortran": "f90 fortran-modern fortran_fixed-form fortranfixed",
    "fsharp": "f# fs",
    "gdscript": "gd",
    "gherkin": "cucumber feature",
    "gleam": "",
    "glsl": "vert frag",
    "gnuplot": "",
    "graphql": "gql",
    "groovy": "gradle jenkinsfile Jenkinsfile",
    "handlebars": "hbs mustache html.handlebars",
    "hare": "",
    "haskell": "hs lhaskell",
    "haxe": "hx",
    "hcl": "terraform tf terraform-vars opentofu",
    "hlsl": "",
    "idris": "idris2",
    "ini": "dosini cfg conf editorconfig gitconfig systemd properties jproperties",
    "j": "",
    "jinja": "jinja2 django-html htmldjango jinja-html",
    "jsonnet": "",
    "julia": "jl",
    "just": "",
    "kotlin": "kt kts",
    "latex": "tex plaintex",
    "less": "",
    "llvm": "ll",
    "makefile": "make mk automake",
    "mathematica": "wl wolfram mma",
    "matlab": "octave",
    "meson": "meson.build",
    "mojo": "",
    "nginx": "nginxconf",
    "nim": "nimrod",
    "nix": "",
    "nushell": "nu",
    "objective-c": "objc objectivec",
    "objective-cpp": "objcpp objective-c++",
    "ocaml": "ml ocaml.interface",
    "odin": "",
    "perl": "pl perl5",
    "pony": "",
    "postscript": "postscr",
    "powershell": "ps1 pwsh posh",
    "prisma": "",
    "prolog": "",
    "proto3": "proto protobuf",
    "pug": "jade",
    "puppet": "",
    "purescript": "purs",
    "qml": "",
    "r": "splus rscript",
    "racket": "rkt",
    "raku": "perl6",
    "razor": "cshtml aspnetcorerazor",
    "reasonml": "reason rescript",
    "rego": "",
    "restructuredtext": "rst",
    "sass": "",
    "scala": "sbt",
    "scheme": "scm",
    "scss": "postcss",
    "sed": "",
    "slim": "",
    "smalltalk": "st",
    "solidity": "sol",
    "sparql": "",
    "sql": "mysql plsql pgsql postgres postgresql sqlite tsql mssql",
    "starlark": "bazel bzl",
    "stylus": "",
    "svelte": "",
    "swift": "",
    "systemverilog": "sv",
    "tcl": "tk",
    "thrift": "",
    "typst": "typ",
    "v": "vlang",
    "vala": "",
    "vb": "vbnet visualbasic vb.net basic vbs vbscript",
    "verilog": "",
    "vhdl": "",
    "vim": "viml vimscript",
    "vue": "vue-html",
    "vyper": "vy",
    "wgsl": "",
    "xml": "svg xsd xsl xslt rss plist html.angular docbk",
    "yang": "",
    "zig": "",
}
# Tokens that only look like a bracket, a quote or a comment, and their first characters: characters of Lisps, escapes.
_ESCAPED = {
    **dict.fromkeys(("commonlisp", "scheme", "racket", "clojure", "fennel", "raku", "sed", "awk"), (r"\\[^\n]", "\\")),
    **dict.fromkeys(("dockerfile", "makefile", "fish", "tcl", "powershell", "nushell"), (r"\\[^\n]", "\\")),
    **dict.fromkeys(("elixir", "elisp"), (r"\?\\?[^\n\w]", "?")),
    "perl": (r"\\[^\n]|\$#", "\\$"),
    "erlang": (r"\$\\?[^\n\w]", "$"),
}
# ``Language.jumps`` of the languages in which these words are statements.
_JUMPS = {
    "return throw break continue": "apex ballerina coffeescript cuda-cpp d dart groovy haxe julia kotlin objective-c "
    "objective-cpp powershell scala swift vala",
    "return break continue": "glsl hlsl wgsl hare matlab odin solidity v zig",
    "return raise break continue": "cython gdscript mojo nim starlark vyper",
    "return exit break continue": "awk fish",
    "return raise break next": "crystal",
    "return stop break next": "r",
    "return die exit last next redo": "perl raku",
}
_JUMPS_OF = {name: jumps for jumps, names in _JUMPS.items() for name in names.split()}
PROSE = frozenset({"diff", "latex", "restructuredtext", "gherkin", "typst", "bibtex"})  # text has brackets


def _has_characters(values: dict[str, Any]) -> bool:
    """Return whether an apostrophe may be around one character: it begins neither strings nor comments."""
    return "'" not in values["line"] and all(quote["mark"] != "'" for quote in values["quotes"])


def _read() -> tuple[Language, ...]:
    return tuple(_to_language(name, values) for name, values in json.loads(FILE.read_text(encoding="utf-8")).items())


def _to_language(name: str, values: dict[str, Any]) -> Language:
    if values["is_markup"]:
        marks = (Quote('="', '"', multiline=True, escapes=False), Quote("='", "'", multiline=True, escapes=False))
        return Language(name, block_comments=(("<!--", "-->"),), quotes=marks, has_brackets=False, is_lexical=True)
    quotes: tuple[Quote, ...] = tuple(
        Quote(q["mark"], q["mark"], q["multiline"], q["escapes"]) for q in values["quotes"]
    )
    known = {
        r"'(?:\\[^\n]{1,8}|[^\\'\n])'": "'" if _has_characters(values) else "",
        r"(?<=\w)'": "'" if any(quote.open == "'" for quote in quotes) else "",  # in a word, as in don't
        r"\\%": "\\" if "%" in values["line"] else "",  # a per cent sign, not a comment
    }
    known |= dict([_ESCAPED[name]]) if name in _ESCAPED else {}
    literals = [literal for literal, start in known.items() if start]
    return Language(
        name,
        line_comments=tuple(values["line"]),
        block_comments=tuple((begin, end) for begin, end in values["block"]),
        comment_after_space=values["after_space"],
        quotes=quotes,
        literals="|".join(literals),
        literal_starts="".join(known.values()),
        opener=PLAIN.opener,
        jumps=_JUMPS_OF.get(name, ""),
        is_lexical=True,
    )


LEXICAL = _read() if FILE.exists() else ()
