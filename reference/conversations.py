"""Answers of conversations, as far as they can be known without the template: what its ids must spell.

A chat template is a program that nobody has read, and it is not run a second time. Whatever it writes, the
ids before an answer spell the question, the ids of the answer spell the answer and one end behind it, no mark
of a turn stands before the answer's text, and the ids are those of the text that they spell.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import tokenizers

from reference.library import LibraryTokens
from reference.text import SourceDocument


class Spelled:
    """A tokenizer's reader for texts of templates, in which the spelling of a special token is that token."""

    def __init__(self, folder: Path, tokens: LibraryTokens):
        self.library = tokenizers.Tokenizer.from_str(json.dumps(tokens.json))
        for token in _named(tokens, "bos_token", "eos_token", "unk_token", "pad_token"):
            if tokens.id_of(token) is not None:
                self.library.add_special_tokens([token])
        marks = self.library.get_added_tokens_decoder()
        self.marks = {id for id, token in marks.items() if token.special}
        self.ends = {tokens.end} - {None}
        path = folder / "generation_config.json"
        more = json.loads(path.read_text("utf-8")).get("eos_token_id", []) if path.is_file() else []
        self.ends |= {*more} if isinstance(more, list) else {more}
        start = tokens.special("bos_token")
        self.starts = {tokens.start, start} - {None}
        self.is_exact = (tokens.json.get("decoder") or {}).get("type") == "ByteLevel"

    def text(self, ids: list[int]) -> str:
        """Return what ids spell, special tokens included."""
        return self.library.decode(ids, skip_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text that a template wrote."""
        return self.library.encode(text, add_special_tokens=False).ids


def wrong_with(document: SourceDocument, ids: list[int], n_prompt: int, spelled: Spelled) -> str | None:
    """Return what the ids of an answer and of what asks for it are not, in a sentence; None if nothing.

    Args:
        ids: Those of the document.
        n_prompt: How many of them ask for the answer.
    """
    asked, answer = ids[:n_prompt], ids[n_prompt:]
    if not asked or not answer:
        return f"of {len(ids)} tokens {n_prompt} are prompt"
    role, question = document.turns[-1]
    if role != "assistant" and not _within(question, spelled.text(asked)):
        return f"the prompt does not spell the last message before the answer, {_cut(question)!r}"
    if not _within(document.text, spelled.text(answer)):
        return f"its targets do not spell the answer {_cut(document.text)!r}"
    if ids[:2] == ids[:1] * 2 and ids[0] in spelled.starts:
        return "it starts twice"
    if spelled.ends and (answer[-1] not in spelled.ends or spelled.ends & {*answer[:-1]}):
        return "the answer does not end at its first end token"
    for place, id in enumerate(answer):
        if id in spelled.marks:
            before, mark = spelled.text(answer[:place]), spelled.text([id])
            if place + 1 < len(answer) and not _within(document.text, before):
                return f"a mark of a turn, {mark!r}, is a target before the answer"
            if place + 1 < len(answer) and _within(before, document.text):
                more = len(answer) - place - 1
                return f"{more} targets stand behind {mark!r}, where the turn is over"
            break
    if spelled.is_exact:
        apart = [*spelled.ids(spelled.text(asked)), *spelled.ids(spelled.text(answer))]
        if ids not in (apart, spelled.ids(spelled.text(ids))):
            return "the ids are not those of the text that they spell"
    return None


def _named(tokens: LibraryTokens, *keys: str) -> list[str]:
    found = (tokens.config.get(key) for key in keys)
    return [token["content"] if isinstance(token, dict) else token for token in found if token]


def _within(part: str, text: str) -> bool:
    """Return whether a text holds a part, whose white space around it a template may drop."""
    one, other = (unicodedata.normalize("NFKC", given) for given in (part.strip(), text))
    return one in other


def _cut(text: str) -> str:
    return text if len(text) < 40 else f"{text[:40]}..."
