"""Files with a fault somewhere: what is checked at the cursor must not depend on it."""

import ast
import time

import pytest

from fimserver.context.focus import find_embedded
from fimserver.context.hole import first_comments, refuse_document
from fimserver.context.languages.names import find_language
from fimserver.context.place import Place, complete_place, find_place
from fimserver.datatypes import Completion, NoCompletion, Snapshot
from fimserver.settings import Settings

MARK = "\u25ae"
# Faults that make ``ast.parse`` refuse a whole file, above and below the cursor.
FAULTS = {
    "a byte order mark": ("\ufeff", ""),
    "a cell magic": ("%%time\n", ""),
    "a line magic": ("%matplotlib inline\n", ""),
    "a shell command": ("!pip install x\n", ""),
    "a Python 2 print": ('print "started"\n', ""),
    "a Python 2 print below": ("", '\nprint "done"\n'),
    "a Python 2 except": ("try:\n    pass\nexcept ValueError, e:\n    pass\n", ""),
    "an open bracket below": ("", "\nvalues = [1, 2\n"),
    "an open bracket above": ("def broken(:\n    pass\n\n\n", ""),
    "conflict markers": ("", "\n<<<<<<< HEAD\nx = 1\n=======\nx = 2\n>>>>>>> other\n"),
}
# At a place, an answer, and whether it may stand there.
ANSWERS = [
    ("def total(values):\n    for value in values:\n        ▮\n    return values\n", "result += value", True),
    ("def total(values):\n    for value in values:\n        ▮\n    return values\n", "if value:", False),
    ("def total(values):\n    for value in values:\n        ▮\n    return values\n", "if value == = 1: pass", False),
    ("def total(values):\n    for value in values:\n        ▮\n    return values\n", "return return", False),
    ("def total(values):\n    result = ▮\n    return values\n", "sum(values)", True),
    ("def total(values):\n    result = ▮\n    return values\n", "sum(values))", False),
    ("def total(values):\n    result = ▮\n    return values\n", "lambda: = 1", False),
    ("import numpy as ▮\n", "np", True),
    ("import numpy as ▮\n", "np as", False),
    ("if values:\n    pass\n▮\n", "else:\n    pass", True),
    ("if values:\n    ▮\n", "x = 1", True),
]


def fill(marked: str, answer: str, language: str = "python") -> str:
    cursor = marked.index(MARK)
    text = marked.replace(MARK, "")
    place = find_place(Snapshot("file:///a", 1, language, text, cursor), Settings(), invoked=True)
    assert isinstance(place, Place), place
    outcome = complete_place(answer, place)
    if isinstance(outcome, NoCompletion):
        return f"! {outcome.reason}"
    assert isinstance(outcome, Completion)
    return text[: outcome.replace_start] + outcome.middle + text[outcome.replace_end :]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("marked", "answer", "is_right"), ANSWERS)
def test_a_fault_elsewhere_disables_no_check(fault: str, marked: str, answer: str, is_right: bool) -> None:
    above, below = FAULTS[fault]
    found = fill(above + marked + below, answer)
    if found.startswith("! "):
        is_expected = not is_right or fault == "an open bracket above" or below
        assert is_expected, found
        return
    offered = found[len(above) : len(found) - len(below)]
    ast.parse(offered)  # the code without the faults, with the answer as it was repaired


@pytest.mark.parametrize("fault", ["a byte order mark", "a cell magic", "a shell command", "a Python 2 print"])
def test_right_answers_are_offered_there(fault: str) -> None:
    above, _ = FAULTS[fault]
    for marked, answer, is_right in ANSWERS:
        if is_right:
            assert fill(above + marked, answer) == above + marked.replace(MARK, answer)


def test_python_2_is_completed_in_its_own_way() -> None:
    above = 'print "started"\n\n\ndef f(a):\n    '
    assert fill(f"{above}{MARK}\n", 'print "a", a') == f'{above}print "a", a\n'
    assert fill("x = 1\n\n\ndef f(a):\n    \u25ae\n", 'print "a", a').startswith("!")


@pytest.mark.parametrize("language", ["python", "javascript", "json", "go", "yaml", "css", "kotlin"])
def test_nothing_goes_before_a_byte_order_mark(language: str) -> None:
    snapshot = Snapshot("file:///a", 1, language, "\ufeff\n", 0)
    found = find_place(snapshot, Settings(), invoked=True)
    assert isinstance(found, NoCompletion)
    assert found.reason == "before_mark"
    after = find_place(Snapshot("file:///a", 1, language, "\ufeff\n", 1), Settings(), invoked=True)
    assert isinstance(after, Place)
    completion = complete_place("x", after)
    assert isinstance(completion, NoCompletion) or completion.replace_start == 1


@pytest.mark.parametrize(("language", "marked", "answer"), [
    ("python", "import os\rvalues = os.\u25ae\r", "getcwd()"),
    ("go", "package main\r\r// a\rfunc f() {\r\ta := \u25ae\r}\r", "g()"),
    ("javascript", "// a\rconst b = \u25ae\r", "c();"),
    ("yaml", "# a\rb: \u25ae\r", "c"),
])  # fmt: skip
def test_lone_carriage_returns_end_lines(language: str, marked: str, answer: str) -> None:
    assert fill(marked, answer, language) == marked.replace(MARK, answer)


def test_a_block_has_the_files_own_line_ends() -> None:
    assert fill("def f():\u25ae\rx = 1\r", "\n    a = 1\n    b = 2") == "def f():\r    a = 1\r    b = 2\rx = 1\r"


GENERATED = [
    ("python", "# Code generated by make. DO NOT EDIT.\nx = 1\n"),
    ("python", "#!/usr/bin/env python\n# coding: utf-8\n# Generated by the protocol buffer compiler.  DO NOT EDIT!\n"),
    ("go", "// Copyright 2020\n\n// Code generated by protoc-gen-go. DO NOT EDIT.\npackage a\n"),
    ("javascript", "/**\n * @generated SignedSource<<abc>>\n */\n'use strict';\n"),
    ("javascript", "'use strict';\n/* This file is auto-generated from schema.graphql */\n"),
    ("csharp", "// <auto-generated>\n//     This code was generated by a tool.\n// </auto-generated>\n"),
    ("java", "/* The following code was generated by JFlex 1.6.1 */\n// DO NOT EDIT\n"),
    ("kotlin", "// Automatically generated by SQLDelight\npackage a\n"),
    ("html", "<!DOCTYPE html>\n<!-- Generated by javadoc -->\n<html>\n"),
    ("sql", "-- Do not edit this file: it is written by make schema\nSELECT 1;\n"),
    ("php", "<?php\n// @generated\n"),
    ("yaml", "# Autogenerated by conda-lock\nversion: 1\n"),
]  # fmt: skip
WRITTEN = [
    ("python", '"""Writes the C headers."""\nHEADER = "/* made by headers.py, DO NOT EDIT */"\n'),
    ("python", "# Please do not edit the defaults below without asking Anna.\n"),
    ("python", '"""Tests for the parser auto-generated from grammar.peg."""\n'),
    ("python", "# Generated by Django 4.2.1 on 2023-05-10 12:00\n"),
    ("python", "import os\n# Code generated by make. DO NOT EDIT.\n"),
    ("javascript", 'const notice = "@generated";\n'),
    ("go", "// Package gen writes code that was generated by users.\npackage gen\n"),
    ("css", "a::after { content: 'DO NOT EDIT'; }\n"),
    ("markdown", "Files generated elsewhere, please DO NOT EDIT them.\n"),
    ("kotlin", "// see user@generated.example.org\nfun a() {}\n"),
]


@pytest.mark.parametrize(("language", "text"), GENERATED)
def test_generated_files(language: str, text: str) -> None:
    refusal = refuse_document(Snapshot("file:///a", 1, language, text, 0))
    assert refusal is not None
    assert refusal.reason == "generated_file"
    assert refuse_document(Snapshot("file:///a", 1, language, text, 0), invoked=True) is None


@pytest.mark.parametrize(("language", "text"), WRITTEN)
def test_files_that_people_write(language: str, text: str) -> None:
    assert refuse_document(Snapshot("file:///a", 1, language, text, 0)) is None


@pytest.mark.parametrize(
    "text", ["/*" + "\n" * 3990 + "*/\n", "#\n" * 2000, "/*" + " " * 3990 + "*/", "# this file is " * 300]
)
def test_no_first_comment_takes_long(text: str) -> None:
    begin = time.process_time()
    refuse_document(Snapshot("file:///a", 1, "c" if text.startswith("/*") else "python", text, 0))
    find_embedded(Snapshot("file:///a", 1, "markdown", f"```{'a' * 19_000}`\n{text}", 1))
    assert time.process_time() - begin < 1.0


def test_the_first_comments() -> None:
    text = "#!/bin/sh\n# one\n\n# two\nx=1 # three\n# four\n"
    assert first_comments(text, find_language("shellscript")) == "# one\n# two"
    assert first_comments("/* a", find_language("c")) == "/* a"
    assert first_comments("", find_language("c")) == ""
