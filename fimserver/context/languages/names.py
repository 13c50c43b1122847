"""Find a language by the name that an editor uses, or by a file's name.

    find_language(language_id)   -> Language; PLAIN for an unknown id
    language_of_path(path)       -> the language id of a file name

Knows:  names.  Never: trees, documents.
"""

from functools import cache
from pathlib import PurePosixPath

from fimserver.context.languages.table import LANGUAGES, PLAIN, Language

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
}
_BY_ID = {language.id: language for language in LANGUAGES}
_BY_SUFFIX = {suffix: language.id for language in LANGUAGES for suffix in language.suffixes}
_BY_NAME = {"Rakefile": "ruby", "Gemfile": "ruby", ".bashrc": "shellscript", ".zshrc": "shellscript"}


@cache
def find_language(language_id: str) -> Language:
    """Return the language of an editor's id, ignoring case; ``PLAIN`` for an unknown id."""
    name = language_id.lower()
    return _BY_ID.get(_ALIASES.get(name, name), PLAIN)


def language_of_path(path: str) -> str:
    """Return the language id of a file name: by its suffix, else the suffix itself, else ``plaintext``."""
    name = PurePosixPath(path.replace("\\", "/"))
    suffix = name.suffix.lower()
    return _BY_NAME.get(name.name) or _BY_SUFFIX.get(suffix) or suffix.lstrip(".") or "plaintext"
