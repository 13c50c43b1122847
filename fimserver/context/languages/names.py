"""Find a language by the name that an editor uses, or by a file's name.

    find_language(language_id)   -> Language; as little is known of an unknown id as of plain text
    language_of_path(path)       -> the language id of a file name
    is_prose(language_id)        return whether a language is text for readers, not code

Knows:  names.  Never: trees, documents.
"""

from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath

from fimserver.context.languages.lexical import LEXICAL, NAMES
from fimserver.context.languages.table import LANGUAGES, PLAIN, Language, words

# Editors' names: VS Code's ids, Vim's file types, info strings of Markdown fences.
_ALIASES = {
    "py": "python",
    "python3": "python",
    "js": "javascript",
    "jsx": "javascript",
    "javascriptreact": "javascript",
    "node": "javascript",
    "ts": "typescript",
    "tsx": "typescriptreact",
    "golang": "go",
    "rs": "rust",
    "h": "c",
    "c++": "cpp",
    "cc": "cpp",
    "cs": "csharp",
    "c#": "csharp",
    "rb": "ruby",
    "sh": "shellscript",
    "bash": "shellscript",
    "zsh": "shellscript",
    "shell": "shellscript",
    "htm": "html",
    "jsonc": "json",
    "json5": "json",
    "yml": "yaml",
    "md": "markdown",
    "rmd": "markdown",
    "quarto": "markdown",
    "mdx": "markdown",
    "pandoc": "markdown",
    "typescript.tsx": "typescriptreact",
    "javascript.jsx": "javascript",
    "cpp.doxygen": "cpp",
    "objective-c.c": "objective-c",
    "eruby": "html",
    "erb": "html",
    "ejs": "html",
    "xhtml": "html",
    "jsonl": "json",
    "ndjson": "json",
    "jsonlines": "json",
    "geojson": "json",
    "ipynb": "json",
    "dockercompose": "yaml",
    "github-actions-workflow": "yaml",
    "ksh": "shellscript",
    "shell-session": "plaintext",
    "console": "plaintext",
    "luau": "lua",
    "svg": "xml",
    "writefile": "plaintext",
    "script": "plaintext",
    "pyi": "python",
    "ipython": "python",
    "sage": "python",
    "mts": "typescript",
    "cts": "typescript",
    "mjs": "javascript",
    "cjs": "javascript",
    "hpp": "cpp",
    "cxx": "cpp",
    "php3": "php",
}
_PLAIN_NAMES = {"", "plaintext", "text", "txt"}
_PROSE = words(  # ids of VS Code and Vim; LaTeX and its like, which are mostly commands, are not prose
    "plaintext markdown restructuredtext asciidoc asciidoctor org textile mediawiki git-commit gitcommit scminput mail"
)
_LEXICAL = {name: language for language in LEXICAL for name in (language.id, *NAMES[language.id].split())}
_BY_ID = _LEXICAL | {language.id: language for language in LANGUAGES}
_BY_SUFFIX = {suffix: language.id for language in LANGUAGES for suffix in language.suffixes}
_BY_NAME = {
    "Rakefile": "ruby",
    "Gemfile": "ruby",
    ".bashrc": "shellscript",
    ".zshrc": "shellscript",
    "Dockerfile": "dockerfile",
    "Containerfile": "dockerfile",
    "Makefile": "makefile",
    "GNUmakefile": "makefile",
    "CMakeLists.txt": "cmake",
    "Jenkinsfile": "groovy",
    "BUILD": "starlark",
    "WORKSPACE": "starlark",
}


def find_language(language_id: str) -> Language:
    """Return the language of an editor's id, ignoring case.

    Of a compound id, as Vim has them (``python.django``), the first part that is known counts. An unknown id is a
    language of its own, of which as much is known as of plain text.
    """
    return _find(language_id.strip().lower())


@cache
def _find(name: str) -> Language:
    for part in (name, *(name.split(".") if "." in name else ())):
        known = _BY_ID.get(_ALIASES.get(part, part))
        if known is not None:
            return known
    return PLAIN if name in _PLAIN_NAMES else replace(PLAIN, id=name)


def is_prose(language_id: str) -> bool:
    """Return whether a language is text for readers, by any of its names."""
    return find_language(language_id).id in _PROSE


def language_of_path(path: str) -> str:
    """Return the language id of a file name: by its suffix, else the suffix itself, else ``plaintext``."""
    name = PurePosixPath(path.replace("\\", "/"))
    suffix = name.suffix.lower()
    if found := _BY_NAME.get(name.name) or _BY_SUFFIX.get(suffix):
        return found
    known = _LEXICAL.get(suffix.lstrip("."))
    return known.id if known is not None else suffix.lstrip(".") or PLAIN.id
