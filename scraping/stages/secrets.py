"""Replace secrets and personal data by placeholders: `<GITHUB_TOKEN>`, `<PRIVATE_KEY>`, `<EMAIL>`, `<IP>`.

There are three kinds of findings, of which the earlier wins where two overlap: secrets of a documented form,
random values that are assigned to a name like `password`, and e-mail and internet addresses. Similar texts
stay: examples from manuals, `XXXX`, templates, hashes and UUIDs under other names, private and documentation
addresses, version numbers.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

from scraping.documents import Drop, ScrapedDocument
from scraping.stages import Finding, Note, Stage, suffix
from scraping.stages.addresses import internet_addresses, mails, words_of_python
from scraping.stages.assigned import assigned
from scraping.stages.forms import FORMS, private_keys
from scraping.stages.syntax import PYTHON, problem

VERSION = 1


def findings(document: ScrapedDocument, personal: bool = True, words_only: bool = False) -> list[Finding]:
    """Return (start, end, kind) of what is to be replaced, in order and without overlap.

    A private key in several string literals gives several findings: the first is replaced by the placeholder,
    and the others, of kind "", by nothing.

    Args:
        document: The text, and the path, which tells the language.
        personal: Look for e-mail and internet addresses too.
        words_only: In Python, look for e-mail addresses in strings and comments only: `a@b.to` may multiply.
    """
    text = document.text
    taken: list[Finding] = []

    def offer(new: Iterable[Finding]) -> None:
        for finding in new:
            at = bisect.bisect(taken, finding)
            before_ends = at == 0 or taken[at - 1][1] <= finding[0]
            if before_ends and (at == len(taken) or finding[1] <= taken[at][0]):
                taken.insert(at, finding)

    if "PRIVATE KEY" in text:
        offer(private_keys(text))
    for form in FORMS:
        offer(form.found(text))
    offer(assigned(text, suffix(document.path)))
    if personal:
        found = list(mails(text))
        if found and words_only and suffix(document.path) in PYTHON:
            words = list(words_of_python(text))
            starts = [start for start, _ in words]
            places = [bisect.bisect(starts, start) - 1 for start, _, _ in found]
            found = [m for m, at in zip(found, places, strict=True) if at >= 0 and m[1] <= words[at][1]]
        offer(found)
        offer(internet_addresses(text))
    return taken


def redact(document: ScrapedDocument, found: list[Finding]) -> ScrapedDocument:
    """Return the document with placeholders in place of the findings."""
    if not found:
        return document
    out: list[str] = []
    at = 0
    for start, end, kind in found:
        out += [document.text[at:start], f"<{kind}>" if kind else ""]
        at = end
    return dataclasses.replace(document, text="".join([*out, document.text[at:]]))


def build(personal: bool, note: Note) -> Stage:
    """Build the stage.

    Args:
        personal: Replace e-mail and internet addresses too.
        note: Counts placeholders by kind.
    """

    def secrets(document: ScrapedDocument) -> ScrapedDocument | Drop:
        found = findings(document, personal)
        redacted = redact(document, found)
        python = found and suffix(document.path) in PYTHON
        if python and problem(redacted.text) and not problem(document.text):
            found = findings(document, personal, words_only=True)
            redacted = redact(document, found)
            if problem(redacted.text):
                return Drop("cannot be redacted", "with placeholders it does not parse any more")
        for _, _, kind in found:
            if kind:
                note(f"<{kind}>")
        return redacted

    return secrets
