"""Check licences by SPDX expression: the repository's, or the one that a file itself names.

Identifiers are compared whole (https://spdx.org/licenses): "mit" is no part of "permitted". A choice (OR)
needs one allowed operand, a conjunction (AND) both; an exception (WITH) only adds permissions. A file that
names a licence itself, by `SPDX-License-Identifier:` or by the sentences of well-known headers, has that one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from scraping.documents import UNKNOWN, Drop, ScrapedDocument
from scraping.stages import Note, Stage
from scraping.stages.headers import head, sentences

VERSION = 1

# Permissive by the Blue Oak Council's list (https://blueoakcouncil.org/list): those that code on GitHub bears
_PERMISSIVE = """
    0BSD AFL-3.0 Apache-2.0 Artistic-2.0 BlueOak-1.0.0 BSD-1-Clause BSD-2-Clause BSD-2-Clause-Patent
    BSD-3-Clause BSD-3-Clause-Clear BSL-1.0 CC0-1.0 CNRI-Python ECL-2.0 HPND ISC MIT MIT-0 MIT-CMU
    MulanPSL-2.0 NCSA PostgreSQL PSF-2.0 Python-2.0 Python-2.0.1 Unlicense UPL-1.0 W3C X11 Zlib ZPL-2.1
"""
PERMISSIVE = tuple(_PERMISSIVE.split())
NOT_KNOWN = frozenset({UNKNOWN, "noassertion", "none", "other"})  # words of GitHub and SPDX
TAG = re.compile(r"SPDX-License-Identifier:\s*([-\w.+() ]*[\w+)])", re.IGNORECASE)
UNDER = r"(?:under|terms|conditions|licen[sc]e[ds]?|version|copy)\b.{0,60}?"
SHORT = r"licen[sc]ed?\W+(?:under\W+)?(?:the\W+)?(?:gnu )?"
# Family of identifiers -> sentences of files' headers (texts: https://github.com/spdx/license-list-data).
SENTENCES = {
    "AGPL": rf"{UNDER}\bgnu affero general public licen|{SHORT}agpl",
    "LGPL": rf"{UNDER}\bgnu (?:lesser|library) (?:general )?public licen|{SHORT}lgpl",
    "GPL": rf"{UNDER}\bgnu general public licen|{SHORT}gpl",
    "MPL": rf"{UNDER}\bmozilla public licen",
    "EPL": rf"{UNDER}\beclipse public licen",
    "CDDL": rf"{UNDER}\bcommon development and distribution licen",
    "EUPL": rf"{UNDER}\beuropean union public licen",
    "SSPL": rf"{UNDER}\bserver side public licen",
    "BUSL": rf"{UNDER}\bbusiness source licen",
    "Elastic": rf"{UNDER}\belastic licen",
    "CC-BY-NC": r"creative ?commons attribution[- ]non-?commercial|\bcc[- ]by-nc",
    "CC-BY-SA": r"creative ?commons attribution[- ]share-?alike|\bcc[- ]by-sa",
    "proprietary": r"unauthori[sz]ed (?:copying|use|distribution)|proprietary and confidential"
    r"|confidential and proprietary|company confidential|may not be (?:copied|reproduced|disclosed)",
    "Apache": rf"{UNDER}\bapache (?:software )?licen[sc]e",
    "MIT": r"permission is hereby granted, free of charge, to any person obtaining a copy of|"
    rf"{UNDER}\bmit licen[sc]e\b",
    "BSD": rf"redistribution and use in source and binary forms|{UNDER}\bbsd(?:[- ]style)? licen[sc]e\b",
    "ISC": r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with or",
}
HEADERS = {family: re.compile(pattern) for family, pattern in SENTENCES.items()}
HINT = re.compile(
    r"licen[sc]e|permission|redistribution|copying|confidential|creative ?commons|cc[- ]by|may not be"
)
CHOICE = re.compile(
    r"\bdual(?:ly)?\b|\balternatively\b|\bat your choice\b|\bchoice of\b|\bor\W+the\W+(?:mit|bsd|apache)"
)


@functools.cache
def _licensing() -> Any:
    from license_expression import get_spdx_licensing  # The import takes half a second.

    return get_spdx_licensing()


@functools.lru_cache(maxsize=4096)
def allowed(expression: str, allow: frozenset[str]) -> bool | None:
    """Return whether licences of `allow` (lower case) meet an SPDX expression; None if it cannot be read."""
    if expression.lower() in allow:
        return True
    if len(expression) > 500:  # Parsing takes time that is quadratic in the length.
        return None
    from license_expression import ExpressionError

    try:
        tree = _licensing().parse(expression, validate=True)
    except (ExpressionError, ValueError, RecursionError):
        return None
    return None if tree is None else _met(tree, allow)


def _met(tree: Any, allow: frozenset[str]) -> bool:
    name = type(tree).__name__
    if name in ("OR", "AND"):
        return (any if name == "OR" else all)(_met(part, allow) for part in tree.args)
    if name == "LicenseWithExceptionSymbol":
        tree = tree.license_symbol
    return tree.key.lower() in allow


def _family_allowed(family: str, allow: frozenset[str]) -> bool:
    return any(key == family.lower() or key.startswith(f"{family.lower()}-") for key in allow)


def build(licences: tuple[str, ...], keep_unknown: bool, note: Note) -> Stage:
    """Build the stage.

    Args:
        licences: SPDX identifiers that are allowed.
        keep_unknown: Keep files whose licence nobody states.
        note: Counts files whose own licence decides instead of the repository's.
    """
    allow = frozenset(licence.lower() for licence in licences)

    def licence(document: ScrapedDocument) -> ScrapedDocument | Drop:
        lines = head(document)
        own = sorted({match[1] for line in lines if (match := TAG.search(line))})
        if own:
            expression = own[0] if len(own) == 1 else " AND ".join(f"({one})" for one in own)
            evidence = f"the file says {expression[:80]}, the repository {document.licence or 'nothing'}"
            verdict = allowed(expression, allow)
            if verdict is None:
                return Drop("licence unknown", evidence)
            if not verdict:
                return Drop("licence of the file differs", evidence)
            if expression.lower() != document.licence.lower():
                note("goes by the file's own licence")
                return dataclasses.replace(document, licence=_spelled(expression, licences))
            return document
        stated = document.licence.lower() not in NOT_KNOWN
        verdict = allowed(document.licence, allow) if stated else None
        if verdict is None and not keep_unknown:
            return Drop("licence unknown", document.licence[:80])
        if verdict is False:
            return Drop("licence not allowed", document.licence[:80])
        said = sentences(lines)
        if HINT.search(said):
            families = [family for family, pattern in HEADERS.items() if pattern.search(said)]
            wrong = [family for family in families if not _family_allowed(family, allow)]
            if wrong and (len(wrong) == len(families) or not CHOICE.search(said)):
                evidence = (
                    f"the file says {' and '.join(wrong)}, the repository {document.licence or 'nothing'}"
                )
                return Drop("licence of the file differs", evidence)
        return document

    return licence


def _spelled(expression: str, licences: tuple[str, ...]) -> str:
    known = {licence.lower(): licence for licence in licences}
    if expression.lower() in known:
        return known[expression.lower()]
    return str(_licensing().parse(expression, validate=True).render())


def check(licences: tuple[str, ...]) -> None:
    """Raise a ValueError if one of the allowed licences is no SPDX identifier."""
    for licence in licences:
        if licence in PERMISSIVE:
            continue
        if licence not in _licensing().known_symbols:
            raise ValueError(
                f"--licences names {licence}, which is no SPDX identifier; see https://spdx.org/licenses"
            )
