"""Matches: how long they may be, which code they may come from, and what they must not bring back."""

from collections.abc import Sequence

import pytest

from fimserver.context.focus import language_at
from fimserver.context.gather import brings_back
from fimserver.context.languages.names import find_language
from fimserver.context.limits import MATCH
from fimserver.context.query import Deletion, Query
from fimserver.datatypes import NoCompletion, Snapshot
from fimserver.pipeline import Memory, find
from fimserver.settings import Settings

MARK = "\u25ae"
URI = "file:///project/a"
CALL = "sendTheInvoiceToTheCustomerByMail("
VUE = f'<template>\n  <button @click="{CALL}order, total)">Send</button>\n</template>\n<script>\n{{}}\n</script>\n'


@pytest.fixture(autouse=True)
def no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimserver.context.gather.find_matches.__kwdefaults__", {"max_seconds": 10.0})


def offered(marked: str, language: str, deleted: Sequence[Deletion] = ()) -> str | None:
    """Return the text of the match that is offered without the model."""
    snapshot = Snapshot(URI, 1, language, marked.replace(MARK, ""), marked.index(MARK))
    found = find(Query(snapshot, Settings(), invoked=False, deleted=deleted), Memory())
    assert not isinstance(found, NoCompletion), found
    return found.sure.middle if found.sure is not None else None


@pytest.mark.parametrize("language", ["sql", "csv", "python", "kotlin", "go"])
@pytest.mark.parametrize("length", [MATCH - 20, MATCH + 1])
def test_a_match_is_not_a_wall_of_text(language: str, length: int) -> None:
    insert = "insert_into_measurements_by_hour(station, "
    row = "1, " * (length // 3) + ")"
    marked = f"{insert}{row}\nother(1)\n{insert}{MARK}\n"
    assert (offered(marked, language) is not None) is (len(row) <= MATCH)


# What follows elsewhere, the line at the cursor, and what may be offered: brackets have to be those of this place.
NAME = "isTheOrderShippedToTheCustomer"
BRACKETS = [
    ("kotlin", f"if ({NAME}(order)) {{\n    log()\n}}", f"val a = {NAME}(", None),
    ("swift", f"if ({NAME}(order)) {{\n}}", f"let a = {NAME}(", None),
    ("zig", f"if ({NAME}(order)) {{\n}}", f"const a = {NAME}(", None),
    ("groovy", f"{NAME}(options, [\n])", f"x = {NAME}(options, ", None),
    ("unheard", f"if ({NAME}(order)) {{\n}}", f"a = {NAME}(", None),
    ("dart", f"print({NAME}(order));", f"final a = {NAME}(", "order)"),
    ("scala", f"f({NAME}(order))", f"val a = {NAME}(", "order)"),
    ("kotlin", f"val b = {NAME}(order)", f"val a = {NAME}(", "order)"),
    ("dart", f"final b = {NAME}(order);", f"final a = {NAME}(", "order);"),
    ("plaintext", f"see ({NAME} a) b) and more", f"{NAME} a", ") b) and more"),
]


@pytest.mark.parametrize(("language", "elsewhere", "here", "middle"), BRACKETS)
def test_brackets_without_a_grammar(language: str, elsewhere: str, here: str, middle: str | None) -> None:
    assert offered(f"{elsewhere}\nbegin(\n)\n{here}{MARK}\n", language) == middle


@pytest.mark.parametrize("language", ["kotlin", "swift", "zig", "scala", "dart"])
def test_a_bracket_that_the_editor_closed_is_not_opened_again(language: str) -> None:
    found = offered(f"if ({NAME}(order)) {{\n}}\na = {NAME}({MARK})\n", language)
    assert found in {None, "order"}


@pytest.mark.parametrize(
    ("language", "marked"),
    [
        ("vue", VUE.format(f"  {CALL}{MARK})")),
        ("svelte", f"<script>\n  {CALL}{MARK}\n</script>\n<b on:click={{() => {CALL}order, total)}}>Send</b>\n"),
        ("html", VUE.format(f"  {CALL}{MARK})")),
        ("astro", f"---\n{CALL}{MARK}\n---\n<b onclick={{() => {CALL}order, total)}}>Send</b>\n"),
        ("markdown", f"Call {CALL}order, total) and **wait** for it.\n\n```js\n{CALL}{MARK}\n```\n"),
        ("php", f"<b onclick='{CALL}order, total)'>Send</b>\n<?php\n{CALL}{MARK}\n"),
        ("javascriptreact", f"const a = (\n  <b onClick={{() => {CALL}order, total)}}>Send</b>\n);\n{CALL}{MARK}\n"),
    ],
)
def test_markup_is_not_put_into_code(language: str, marked: str) -> None:
    assert "<" not in (offered(marked, language) or "")


@pytest.mark.parametrize("language", ["vue", "svelte", "html"])
def test_code_of_the_same_script_is_offered(language: str) -> None:
    marked = f"<p></p>\n<script>\n{CALL}order, total);\nlog();\n{CALL}{MARK}\n</script>\n"
    assert offered(marked, language) == "order, total);"


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("vue", "<template><a>\u25ae</a></template>\n<script>let a;</script>", "vue"),
        ("vue", "<script lang='ts'>let a\u25ae;</script>", "typescript"),
        ("vue", "<style lang='scss'>a {\u25ae}</style>", "scss"),
        ("svelte", "<script>let a\u25ae;</script>", "javascript"),
        ("astro", "---\nlet a\u25ae;\n---\n<p/>", "typescript"),
        ("astro", "---\nlet a;\n---\n<p>\u25ae", "astro"),
        ("php", "<p>\u25ae<?php f(); ?>", "html"),
        ("php", "<p><?php f(\u25ae); ?>", "php"),
        ("php", "<p><?php f(); ?>\u25ae", "html"),
        ("markdown", "# \u25ae\n```py\nx\n```\n", "markdown"),
        ("markdown", "# a\n```py\nx\u25ae\n```\n", "py"),
        ("typescriptreact", "  <b>\u25ae</b>", "typescriptreact, markup"),
        ("typescriptreact", "  f(\u25ae)", "typescriptreact"),
        ("python", "%%bash -x\nls \u25ae\n", "bash"),
        ("python", "%%time\nls(\u25ae)\n", "python"),
        ("python", "a = 1\n%%bash\nls \u25ae\n", "python"),
    ],
)
def test_the_language_at_a_place(language: str, text: str, expected: str) -> None:
    assert language_at(text.replace(MARK, ""), text.index(MARK), find_language(language)) == expected


QUOTES = [
    ("css", 'a { content: "the quick brown fox jumps over"; }\nb { content: \'the quick brown fox\u25ae\n}', None),
    ("python", "a = \"the quick brown fox jumped over\"\nb = 'the quick brown fox jumped\u25ae'\n", None),
    ("python", "a = 'the quick brown fox jumped over'\nb = 'the quick brown fox jumped\u25ae'\n", " over"),
    ("javascript", 'const a = "the quick brown fox jumped over";\nthe quick brown fox jumped\u25ae\n', None),
    ("kotlin", 'val a = "the quick brown fox jumped over"\nval b = "the quick brown fox jumped\u25ae"\n', " over"),
]


@pytest.mark.parametrize(("language", "marked", "middle"), QUOTES)
def test_the_same_kind_of_string_is_open(language: str, marked: str, middle: str | None) -> None:
    assert offered(marked, language) == middle


@pytest.mark.parametrize(
    ("language", "opening", "typed", "rest"),
    [
        ("javascript", "const a = `", "  background-image-of-the-page: url(", "https://example.com/a.png);"),
        ("python", 'a = """', "  border-of-the-whole-front-page: 1px", " solid #ccc;"),
        ("kotlin", 'val a = """', "  border-of-the-whole-front-page: 1px", " // #ccc;"),
    ],
)
def test_a_string_of_several_lines_has_no_remarks(language: str, opening: str, typed: str, rest: str) -> None:
    closing = "`" if "`" in opening else '"""'
    assert offered(f"{opening}\n{typed}{rest}\nother\n{typed}{MARK}\n{closing}\n", language) == rest


@pytest.mark.parametrize(
    ("language", "remark"),
    [("python", "  # ask Anna"), ("kotlin", " // ask Anna"), ("sql", " -- ask Anna"), ("javascript", " /* ask Anna"),
     ("yaml", " # ask Anna"), ("haskell", " -- ask Anna")],
)  # fmt: skip
def test_a_remark_about_another_line_is_not_copied(language: str, remark: str) -> None:
    line = "the_total_of_all_invoices: compute_the_total_of(order)"
    assert offered(f"{line}{remark}\nthe_total_of_all_invoices: compute_the_total_of{MARK}\n", language) == "(order)"


class TestDeleted:
    LINE = "send_the_invoice_to_the_customer(order.customer)"
    BEFORE, DELETED = "send_the_invoice_to_the_customer(order", ".customer)"

    @pytest.mark.parametrize("language", ["python", "kotlin", "go", "javascript", "sql", "ruby"])
    def test_it_is_not_offered_where_it_was_deleted(self, language: str) -> None:
        marked = f"{self.LINE}\nother(1)\n{self.BEFORE}{MARK}\n"
        assert offered(marked, language) == self.DELETED, "as the other line has it"
        deletion = Deletion(URI, f"{self.LINE}\nother(1)\n{self.BEFORE}", self.DELETED, "\n")
        assert offered(marked, language, [deletion]) is None

    def test_it_is_offered_elsewhere(self) -> None:
        deletion = Deletion(URI, f"another line\n{self.BEFORE}", self.DELETED, "\n")
        marked = f"first = 1\nresult = {self.BEFORE}{MARK}\n"
        assert offered(marked, "python", [deletion]) == self.DELETED
        assert offered(marked, "python") is None

    @pytest.mark.parametrize(
        ("text", "before", "uri", "expected"),
        [
            (".customer)", "f(order", URI, True),
            (".cust", "f(order", URI, True),
            (".customer).id", "f(order", URI, True),
            (".other)", "f(order", URI, False),
            (".customer)", "f(invoice", URI, False),
            (".customer)", "f(order", "file:///other", False),
            (".customer)", "f(order ", URI, True),
            (".customer)", "order", URI, False),
        ],
    )
    def test_what_brings_it_back(self, text: str, before: str, uri: str, expected: bool) -> None:
        snapshot = Snapshot(URI, 1, "python", "f(order", 7)
        above = "first = 1\n" * 10
        longer = Snapshot(URI, 1, "python", above + "f(order", 107)
        assert brings_back(text, longer, [Deletion(uri, (above + before)[-64:], ".customer)", "")]) is expected
        assert brings_back(text, snapshot, [Deletion(uri, before, ".customer)", "")]) is expected
