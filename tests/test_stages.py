"""scraping/stages: what each keeps, changes and drops, from real headers and from the seeds' faults."""

# ruff: noqa: E501 (tables of cases, one a line)

from __future__ import annotations

import ast
import base64
import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from scraping.documents import Drop, RawFile, ScrapedDocument
from scraping.stages import Stage, encoding, formatting, licences, origin, shape, syntax
from scraping.stages.headers import without_header


def document(text: str, path: str = "a.py", licence: str = "MIT") -> ScrapedDocument:
    return ScrapedDocument(text, "o/r", path, "c", licence)


def nothing(name: str) -> None:
    pass


def reason(stage: Stage, text: str, path: str = "a.py", licence: str = "MIT") -> str:
    """Why it goes; "" if it stays."""
    result = stage(document(text, path, licence))
    return result.reason if isinstance(result, Drop) else ""


CODE = "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n"

# --- encoding ---


def read(data: bytes, path: str = "a.py", latin1: bool = False, line_ends: str = "lf") -> str | Drop:
    result = encoding.build(latin1, line_ends, nothing)(RawFile("o/r", path, "c", "MIT", data))
    return result if isinstance(result, Drop) else result.text


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_a_byte_order_mark_is_obeyed_and_removed(codec: str) -> None:
    assert read("x = 'é\U0001f40d'\n".encode(codec)) == "x = 'é\U0001f40d'\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"), "# -*- coding: latin-1 -*-\nx = 'é'\n"),
        ("#!/bin/python\n# vim: set fileencoding=cp1251 :\nx = 'ж'\n".encode("cp1251"), "x = 'ж'\n"),
        (b"# coding: no-such-codec\nx = 1\n", "unknown coding line"),
        (b"# coding: utf-7\nx = '+AGE-'\n", "unknown coding line"),  # reads as another text than it shows
        (b"# coding: rot13\nk = 1\n", "unknown coding line"),
        (b"# coding: zlib\nk = 1\n", "unknown coding line"),
        (b"x = 1\ny = 2\n# coding: rot13\n", "# coding: rot13\n"),  # the third line is no coding line
        (b"x = 1\n# coding: rot13\n", "# coding: rot13\n"),  # nor is one after code
        ("# coding: ascii\nx = 'é'\n".encode(), "undecodable"),
        (b"x = '\xe9'\n", "undecodable"),
        (b"x = '\xed\xa0\x80'\n", "undecodable"),  # a lone surrogate
        (b"\x7fELF\0\0\1\2", "binary"),
        (b"\xff\xfex\0\0\0", "binary"),
        (bytes(range(1, 32)) * 9, "binary"),
        (b"BEL = '\x07'" + b" " * 400, " "),
    ],
)
def test_bytes_become_text_or_go_with_a_reason(data: bytes, expected: str) -> None:
    result = read(data)
    if isinstance(result, Drop):
        assert result.reason == expected
    else:
        assert result.endswith(expected)


def test_python_itself_reads_the_same_text_from_files_with_coding_lines() -> None:
    for codec in ("latin-1", "cp1252", "koi8-r", "euc-jp", "gb18030", "shift_jis"):
        data = f"# coding: {codec}\nx = '{'日本' if codec[0] in 'egs' else 'ж' if codec[0] == 'k' else 'é'}'\n".encode(
            codec
        )
        text = read(data)
        assert isinstance(text, str)
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(data)), codec


def test_latin_1_is_a_fallback_only_where_it_is_asked_for_and_it_is_counted() -> None:
    counted = Counter[str]()
    stage = encoding.build(True, "lf", lambda name: counted.update([name]))
    result = stage(RawFile("o/r", "a.kt", "c", "MIT", b"val x = '\xe9'"))
    assert isinstance(result, ScrapedDocument)
    assert result.text == "val x = 'é'"
    assert counted == {"read as latin-1": 1}


def test_line_ends_become_lf_as_python_reads_them_unless_they_are_kept() -> None:
    data = b"x = 1\r\ny = '''a\rb'''\r\n"
    text = read(data)
    assert isinstance(text, str)
    assert text == "x = 1\ny = '''a\nb'''\n"
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(data))
    assert read(data, line_ends="keep") == data.decode()


# --- licence ---

LICENCE = licences.build(licences.PERMISSIVE, False, nothing)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", ""),
        ("mit", ""),
        ("MIT OR GPL-3.0-only", ""),
        ("MIT AND GPL-3.0-only", "licence not allowed"),
        ("(MIT OR GPL-2.0-only) AND Apache-2.0", ""),
        ("Apache-2.0 WITH LLVM-exception", ""),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "licence not allowed"),
        ("GPL-3.0", "licence not allowed"),
        ("", "licence unknown"),
        ("NOASSERTION", "licence unknown"),
        # "mit" stands in each of these
        ("permitted", "licence unknown"),
        ("All uses permitted", "licence unknown"),
        ("submit", "licence unknown"),
        ("MIT-like", "licence unknown"),
        ("LicenseRef-permitted", "licence unknown"),
        ("MITRE", "licence unknown"),
        ("MITNFA", "licence not allowed"),
        ("MIT-feh OR GPL-2.0-only", "licence not allowed"),
        ("MIT OR", "licence unknown"),
        ("(" * 200 + "MIT" + ")" * 200, ""),
        (" OR ".join(["GPL-2.0-only"] * 5000), "licence unknown"),
    ],
)
def test_a_licence_is_compared_whole(expression: str, expected: str) -> None:
    assert reason(LICENCE, CODE, licence=expression) == expected


GPL = """# This program is free software: you can redistribute it and/or modify
# it under the terms of the GNU General Public License as published by
# the Free Software Foundation, either version 3 of the License, or
# (at your option) any later version.
"""
MIT = """/*
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software
 * and associated documentation files (the "Software"), to deal in the Software without restriction.
 */
"""


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        (GPL + CODE, "a.py", "licence of the file differs"),
        (f'"""A tool.\n\n{GPL}"""\n{CODE}', "a.py", "licence of the file differs"),
        (GPL.replace("# ", "// ") + "package a\n", "A.kt", "licence of the file differs"),
        ("package a;\n\n/* Licensed under the LGPL. */\n", "A.java", "licence of the file differs"),
        ("# Licensed under the Mozilla Public License\n", "a.py", "licence of the file differs"),
        (
            "# Proprietary and confidential. Unauthorized copying is prohibited.\n",
            "a.py",
            "licence of the file differs",
        ),
        ("# SPDX-License-Identifier: GPL-2.0-or-later\n", "a.py", "licence of the file differs"),
        (
            "# SPDX-License-Identifier: MIT\n# SPDX-License-Identifier: GPL-2.0-only\n",
            "a.py",
            "licence of the file differs",
        ),
        ("# SPDX-License-Identifier: permitted\n", "a.py", "licence unknown"),
        ("// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */\n", "A.kt", ""),
        (
            "# Dual licensed under the MIT License or the terms of the GNU General Public License\n",
            "a.py",
            "",
        ),
        (MIT + "class A\n", "A.kt", ""),
        ("# Converts files. Copying is permitted.\n" + CODE, "a.py", ""),
        (CODE + 'GPL = "under the terms of the GNU General Public License"\n', "a.py", ""),
        (CODE + GPL, "a.py", ""),  # below code it is no header
    ],
)
def test_what_the_file_says_is_compared_with_the_repository(text: str, path: str, expected: str) -> None:
    assert reason(LICENCE, text, path) == expected


def test_a_file_goes_by_its_own_identifier() -> None:
    result = LICENCE(document("# SPDX-License-Identifier: apache-2.0\nx = 1\n", licence=""))
    assert isinstance(result, ScrapedDocument)
    assert result.licence == "Apache-2.0"


def test_unknown_licences_and_other_lists_are_settings() -> None:
    assert reason(licences.build(("MIT",), True, nothing), CODE, licence="") == ""
    assert (
        reason(licences.build(("GPL-3.0-or-later",), False, nothing), GPL + CODE, licence="GPL-3.0-or-later")
        == ""
    )
    with pytest.raises(ValueError, match="names permissive, which is no SPDX identifier"):
        licences.check(("MIT", "permissive"))


# --- origin ---


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("src/vendor/x.py", CODE, "vendored"),
        ("pip/_vendor/six.py", CODE, "vendored"),
        ("a/node_modules/b/i.js", CODE, "vendored"),
        ("jquery.min.js", CODE, "minified"),
        ("api_pb2.py", CODE, "generated"),
        ("a.py", "# Generated by the protocol buffer compiler.  DO NOT EDIT!\n" + CODE, "generated"),
        (
            "a.py",
            '"""Keywords.\n\nThis file is automatically generated; please leave it.\n"""\n' + CODE,
            "generated",
        ),
        ("A.kt", "// @generated\npackage a\n", "generated"),
        (
            "A.kt",
            "package a\n\nimport b\n\n/** This class is generated by {@link G}. DO NOT MODIFY MANUALLY */\n",
            "generated",
        ),
        ("0001_initial.py", "# Generated by Django 3.2 on 2021-05-01 10:00\n\n" + CODE, "generated"),
        (
            "cp037.py",
            '""" Codec cp037 generated from \'MAPPINGS/CP037.TXT\' with gencodec.py.\n\n"""\n' + CODE,
            "generated",
        ),
        ("a.py", '"""Reads the output generated by ls."""\n' + CODE, ""),
        ("a.py", '"""Turns a model into code that is generated by templates."""\n' + CODE, ""),
        ("a.py", CODE + '# DO NOT EDIT\nHEADER = "# Code generated by tool. DO NOT EDIT."\n', ""),
        ("A.kt", "package a\n\n/** DO NOT CHANGE THE CONSTANT VALUE. Users may depend on it. */\n", ""),
        ("venv/__init__.py", CODE, ""),  # a module of the standard library
        ("vendors.py", CODE, ""),
        ("invendor/x.py", CODE, ""),
    ],
)
def test_what_nobody_wrote_here_goes(path: str, text: str, expected: str) -> None:
    assert reason(origin.build(), text, path) == expected


# --- shape ---

SHAPE = shape.build(3, 1000, 100, 0.25, 64, 200)
# It is from the table that a Kotlin corpus was spoiled by.
EMOJI = "-\\uD83C\\uDF10--\\uD83C\\uDF10\\ud83c\\udf09"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CODE, ""),
        ("import a\n\n\n\nimport b\n", "too short"),
        ("", "too short"),
        (CODE + f'x = "{"a" * 1100}"\n', "absurd line"),
        ("\n".join("x = " + " + ".join(["value"] * 20) for _ in range(9)), "minified"),
        ("\n".join(["()[]{}<>;:,"] * 9), "few letters"),
        (CODE * 9 + "\n".join(f'const val S{i} = "{EMOJI * 5}"' for i in range(3)), ""),
        (CODE * 9 + f'val t = "{EMOJI * 20}"\n', "absurd literal"),
        (CODE * 20 + "val t = listOf(\n" + '    "\\uD83C\\uDF10",\n' * 101 + ")\n", "absurd literal"),
        (CODE * 20 + "val t = listOf(\n" + '    "\\uD83C\\uDF10",\n' * 100 + ")\n", ""),
        (CODE * 20 + "val t =\n" + "    '\\u00e9'..'\\u00ea', '\\u00eb',\n" * 67, "absurd literal"),
        (CODE * 20 + "".join(f'val s{i} = "\\u00e9"\n' for i in range(300)), ""),
        (
            "x = [\n" + "".join(f"    {i}, 0x{i:04x}, -{i}.5e3,\n" for i in range(70)) + "]\n",
            "absurd literal",
        ),
        ("x = [\n" + "".join(f"    {i}, {i + 1},\n" for i in range(95)) + "]\n", ""),
        ("x = [\n" + "".join(f"    Row({i}, name={i}),\n" for i in range(500)) + "]\n", ""),
        (
            "x = (\n"
            + "".join(f'    "{base64.b64encode(bytes(range(i, i + 45))).decode()}"\n' for i in range(40))
            + ")\n",
            "encoded data",
        ),
        (
            "x = (\n"
            + "".join(f'    "{base64.b64encode(bytes(range(i, i + 45))).decode()}"\n' for i in range(20))
            + ")\n",
            "",
        ),
        (
            '"""\n'
            + "A long text of plain words that goes on without any end and has no point\n" * 40
            + '"""\n',
            "",
        ),
        ("# Привет, мир\nимя = 'значение'\nprint(имя)\n", ""),
    ],
)
def test_absurd_shapes_go(text: str, expected: str) -> None:
    assert reason(SHAPE, text) == expected


def test_the_run_that_is_allowed_is_exact() -> None:
    def table(n: int) -> str:
        return "a = 1\nb = 2\n" + "x = '" + "\\x41" * n + "'\n"

    def stage(max_escapes: int) -> Stage:
        return shape.build(3, 10_000, 10_000, 0, max_escapes, 0)

    assert reason(stage(200), table(200)) == ""
    assert reason(stage(200), table(201)) == "absurd literal"
    assert reason(stage(0), table(2000)) == ""


# --- headers ---

KOTLIN = """/*
 * Copyright 2010-2023 JetBrains s.r.o. and Kotlin Programming Language contributors.
 * Use of this source code is governed by the Apache 2.0 license that can be found in the license/LICENSE.txt file.
 */

package a

fun f() = 1
"""


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("A.kt", KOTLIN, "package a\n\nfun f() = 1\n"),
        ("A.kt", "// Copyright 2020 A. B.\n// All rights reserved.\n\npackage a\n", "package a\n"),
        (
            "A.kt",
            "/* Copyright 2020 */\n/* What it does. */\npackage a\n",
            "/* What it does. */\npackage a\n",
        ),
        (
            "a.py",
            "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# Copyright (c) 2020 A\n# Licensed under MIT\n\nx = 1\n",
            "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n\nx = 1\n",
        ),
        (
            "a.py",
            "# Copyright 2020 A\n#\n# Reads a file and prints it.\n#\n# THE SOFTWARE IS PROVIDED AS IS\nx = 1\n",
            "# Reads a file and prints it.\nx = 1\n",
        ),
        ("a.py", "# Reads a file. Needs no license.\nx = 1\n", "# Reads a file. Needs no license.\nx = 1\n"),
        (
            "a.py",
            '"""Copyright 2020 A."""\nx = 1\n',
            '"""Copyright 2020 A."""\nx = 1\n',
        ),  # a docstring is code
        ("a.py", "x = 1\n# Copyright 2020 A\n", "x = 1\n# Copyright 2020 A\n"),
        ("a.py", "# Copyright 2020\n# pylint: disable=all\nx = 1\n", "# pylint: disable=all\nx = 1\n"),
        ("a.py", "# Copyright 2020\n\n\n# coding: x\nx = 1\n", "# Copyright 2020\n\n\n# coding: x\nx = 1\n"),
        ("a.css", "/* Copyright 2020 */\n", "/* Copyright 2020 */\n"),  # a language that is not known stays
        ("A.kt", "/* Copyright 2020 */ package a\n", "/* Copyright 2020 */ package a\n"),
        ("A.kt", "/* Copyright 2020\n", "/* Copyright 2020\n"),
        (
            "A.java",
            "/*\n * Copyright 2020\n *\n * Adds numbers.\n */\nclass A {}\n",
            "/*\n * Adds numbers.\n */\nclass A {}\n",
        ),
    ],
)
def test_headers_go_and_nothing_else(path: str, text: str, expected: str) -> None:
    assert without_header(text, path) == expected


def test_no_file_of_the_library_changes_its_syntax_tree_when_its_header_goes() -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    changed = 0
    for path in [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]:
        text = path.read_text(encoding="utf-8", errors="replace")
        stripped = without_header(text, path.name)
        if stripped != text and len(text) < 30_000:
            changed += 1
            assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(text)), path
        if changed == 15:
            break
    assert changed > 5


# --- syntax ---

SYNTAX = syntax.build(0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CODE, ""),
        ('x = "\\d"\n', ""),
        ('print "hello"\n', "python 2"),
        ("try:\n    f()\nexcept OSError, e:\n    pass\n", "python 2"),
        ("try:\n    f()\nexcept OSError, e:\n    pass\n" + CODE, "python 2"),
        (CODE + '"""\n    except OSError, e:\n"""\n', ""),
        ("x = 0777\n", "python 2"),
        ("x = 10L\n", "python 2"),
        ("if a <> b:\n    pass\n", "python 2"),
        ("exec 'x' in d\n", "python 2"),
        ("raise ValueError, 'no'\n", "python 2"),
        ("x = `y`\n", "python 2"),
        ("def f(:\n    pass\n", "syntax error"),
        ("print(1\n", "syntax error"),
        ("x = 1 +\n", "syntax error"),
        ("return = 3\n", "syntax error"),
        ("x = " + "-" * 100_000 + "1\n", "nested too deeply"),
        ("x = " + "+".join(["a"] * 100_000) + "\n", "nested too deeply"),
        ("x" + "()" * 500_000 + "\n", "nested too deeply"),
        ("if x:\n    pass\n" + "elif x:\n    pass\n" * 20_000, "nested too deeply"),
        ("(" * 300 + ")" * 300, "syntax error"),
    ],
)
def test_python_parses_or_is_named(text: str, expected: str) -> None:
    assert reason(SYNTAX, text) == expected


def test_a_message_does_not_quote_the_file() -> None:
    result = SYNTAX(document("def f(ghp_secret):\n    global ghp_secret\n"))
    assert isinstance(result, Drop)
    assert "ghp_secret" not in result.evidence


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("A.kt", "class A(val x: Int) {\n    fun f(y: Int): Int = x + y\n}\n" * 3),
        ("A.java", "class A {\n    int x;\n    int f(int y) { return x + y; }\n}\n" * 3),
    ],
)
def test_kotlin_and_java_are_measured_by_what_their_grammar_cannot_place(path: str, good: str) -> None:
    assert reason(SYNTAX, good, path) == ""
    prose = Path(ast.__file__).read_text(encoding="utf-8")  # no Kotlin, and no Java
    assert reason(SYNTAX, prose, path) == "syntax error"
    assert reason(syntax.build(1.0), prose, path) == ""
    broken = good + "fun (((\n"
    assert 0 < syntax.unparsed_share(broken, path.rpartition(".")[2]) < 0.3
    assert syntax.unparsed_share(good, path.rpartition(".")[2]) == 0


def test_other_languages_pass() -> None:
    assert reason(SYNTAX, "fn main() {", "a.rs") == ""


# --- formatting ---

UGLY = "import os\nos.chdir('/')\nimport sys\nx=[ 1,2 ]\nif x :\n  print( sys.path )\n"


@pytest.mark.parametrize("tool", ["autopep8", "ruff"])
def test_python_gets_one_layout_and_keeps_its_meaning_and_the_order_of_its_imports(tool: str) -> None:
    counted = Counter[str]()
    stage = formatting.build(tool, lambda name: counted.update([name]))
    result = stage(document(UGLY))
    assert isinstance(result, ScrapedDocument)
    assert "x = [1, 2]\nif x:\n" in result.text
    assert result.text.index("chdir") < result.text.index("import sys")
    assert ast.dump(ast.parse(result.text)) == ast.dump(ast.parse(UGLY))
    assert stage(document(UGLY, "a.kt")) == document(UGLY, "a.kt")
    assert stage(document("x = (", "a.py")) == document("x = (", "a.py")
    assert counted == {"formatted": 1, "kept unformatted: the tool failed": 1}


def test_a_layout_that_changes_the_meaning_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "y = [x * 2 for x in xs]\n"
    rewrites = {
        "y = [x * 2 for var1 in var0]\n": source,  # The renaming by a seed made this of it.
        "y=[x*2 for x in xs]\n": "y=[x*2 for x in xs]\n",
    }
    for rewritten, expected in rewrites.items():
        monkeypatch.setattr(formatting, "_autopep8", lambda text, rewritten=rewritten: rewritten)
        assert formatting.build("autopep8", nothing)(document(source)) == document(expected)


def test_ruff_mends_docstrings_and_that_is_no_change_of_meaning() -> None:
    source = 'def f():\n    """ A. \n\n      B.   \n    """\n    return  1\n'
    result = formatting.build("ruff", nothing)(document(source))
    assert isinstance(result, ScrapedDocument)
    assert "return 1" in result.text


def test_a_missing_ruff_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formatting, "ruff", lambda: None)
    with pytest.raises(ValueError, match="needs the program ruff, which is not installed: pip install ruff"):
        formatting.check("ruff")


def test_stages_take_linear_time_on_hostile_texts() -> None:
    """Each would take minutes with a pattern that backtracks; the pool's limit is seconds."""
    import time

    from scraping.stages import secrets

    rng = random.Random(0)
    n = 50_000
    texts = [
        "\\u0041" * (n // 6),
        "1, " * (n // 3),
        "A" * n,
        "9" * n,
        "9" * 300 + "-9" * (n // 2),
        "a@" * (n // 2),
        "a.a." * (n // 4) + "@a",
        "1." * (n // 2),
        "-----BEGIN RSA PRIVATE KEY-----\n" * (n // 32),
        "password=" * (n // 9),
        "token: " * (n // 7),
        "://" * (n // 3) + ":" * 200,
        "# copyright\n" * (n // 12),
        "/*" * (n // 2),
        '"' * n,
        "2001:" * (n // 5),
        "".join(rng.choice("ab:@./-_1\n\"'=") for _ in range(n)),
    ]
    started = time.process_time()
    for text in texts:
        shape.build(0, 10**9, 10**9, 0, 64, 200)(document(text))
        without_header(text, "a.py")
        without_header(text, "a.kt")
        for stage in (LICENCE, origin.build()):
            stage(document(text))
        secrets.findings(document(text))
    assert time.process_time() - started < 10
