"""Conversations as a model reads them: by the template in its tokenizer's folder. No other code builds them.

    asked_ids(tokenizer, [Message("user", "Sort a list.")])     # asks for the assistant's next message
    answered_ids(tokenizer, [messages, ...])                    # (ids of the prompt, ids of the last message)
    template_fingerprint(tokenizer)                             # of all that decides them besides the tokens

A template is a program of whoever published the model. It runs in jinja2's sandbox, in a child process
(tokenization/chat_child.py) that has SECONDS of processor time and MEMORY for each conversation. What it
writes is read with special tokens, as transformers reads it, and nothing is put before it: a template writes
its own start. Messages, on the other hand, may be anybody's: one that spells a special token is refused, as
it could end its own turn and speak for somebody else.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenization.base import Tokenizer
from tokenization.pretrained import PretrainedTokenizer

VERSION = 1  # Of what `answered_ids` gives: raise it when the same conversations would have other ids.
CHILD = Path(__file__).with_name("chat_child.py")
SECONDS = 1.0  # of processor time, for one conversation
MEMORY = 256  # MiB of a child's address space
MOST_BYTES = 1 << 20  # of what one conversation becomes
PATIENCE = 20  # A child may take this many times its processor time by the clock, on a busy machine.
SHOWN = 200  # Characters of what a template says that are passed on.
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)
# Templates may write the day into a prompt. In data it is this one always, so that equal data give equal ids.
DAY_OF_DATA = datetime.datetime(2024, 7, 26)


class Message(NamedTuple):
    """What one side of a conversation says."""

    role: str
    content: str


Conversation = tuple[Message, ...]


class ConversationError(ValueError):
    """One of several conversations cannot be written; `number` is its place among them."""

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.number = number


@contextlib.contextmanager
def _of(number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConversationError(str(error), number) from None


def messages_of(value: Any) -> Conversation:
    """Return the conversation of a JSON value, a list of objects with `role` and `content`.

    Raises:
        ValueError: It is anything else; the sentence names the message.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of objects with role and content, and not empty")
    found = []
    for number, one in enumerate(value, 1):
        if not isinstance(one, dict) or {k for k, v in one.items() if v is not None} != {"role", "content"}:
            has = ", ".join(sorted(one)) or "nothing" if isinstance(one, dict) else type(one).__name__
            raise ValueError(
                f"message {number} has {has}, and must have role and content alone: calls of tools and other "
                "parts are not read"
            )
        if one["role"] not in ROLES:
            raise ValueError(f"the role of message {number} must be one of {', '.join(ROLES)}")
        if not isinstance(one["content"], str):
            raise ValueError(f"the content of message {number} must be a text")
        found.append(Message(one["role"], one["content"]))
    return tuple(found)


def with_template(tokenizer: Tokenizer) -> PretrainedTokenizer:
    """Return the tokenizer if it has a template.

    Raises:
        ValueError: It has none.
    """
    if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chat_template is not None:
        return tokenizer
    raise ValueError(
        "the model's tokenizer has no chat template, which says how the model reads conversations; give "
        "plain text, or take a model that was tuned for chat"
    )


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of what decides the ids of conversations besides the tokenizer's own.

    Raises:
        ValueError: As `with_template`.
    """
    known = with_template(tokenizer)
    parts = [VERSION, known.chat_template, known.special_texts, known.eos_ids, DAY_OF_DATA.isoformat()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def render(
    tokenizer: PretrainedTokenizer,
    conversations: Sequence[tuple[Conversation, bool]],
    today: datetime.datetime,
) -> list[str]:
    """Return the text of each conversation; where its flag is set, with what asks for an answer behind it.

    Args:
        today: The day that a template may ask for.

    Raises:
        ConversationError: The template refuses or fails; the sentence has the template's own.
    """
    settings = {
        "template": tokenizer.chat_template,
        "variables": {"tools": None, "documents": None, **tokenizer.special_texts},
        "today": today.isoformat(),
        "seconds": SECONDS,
        "memory": MEMORY,
        "most": MOST_BYTES,
    }
    asked = [
        {"messages": [one._asdict() for one in messages], "add_generation_prompt": asks}
        for messages, asks in conversations
    ]
    lines = "".join(json.dumps(value) + "\n" for value in (settings, *asked))
    # Neither the environment nor the caller's folder reaches the child's imports.
    with subprocess.Popen(
        [sys.executable, "-I", "-B", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
    ) as child:
        try:
            said, _ = child.communicate(lines.encode(), timeout=60 + PATIENCE * SECONDS * len(asked))
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
    answers = [json.loads(line) for line in said.splitlines() if line.endswith(b"]")]
    for number, (kind, text) in enumerate(answers):
        if kind == "error":
            raise ConversationError(f"the chat template {_shown(text)}", number)
    if len(answers) < len(asked):
        raise ConversationError(
            f"the chat template took more than {SECONDS:g} s, or its process died; mend the template",
            len(answers),
        )
    return [text for _, text in answers]


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:SHOWN])


def asked_ids(
    tokenizer: Tokenizer, messages: Conversation, today: datetime.datetime | None = None
) -> list[int]:
    """Return the ids that ask for the assistant's next message.

    Args:
        today: The day that the template may write; None for the present one.

    Raises:
        ValueError: As `with_template` and `render`; a message spells a special token; or the template starts
            the text twice.
    """
    return many_asked_ids(tokenizer, [messages], today or datetime.datetime.now())[0]


def many_asked_ids(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], today: datetime.datetime
) -> list[list[int]]:
    """Return `asked_ids` of each conversation.

    Raises:
        ValueError: The tokenizer has no template.
        ConversationError: As `asked_ids`.
    """
    known = with_template(tokenizer)
    for number, messages in enumerate(conversations):
        with _of(number):
            _refuse_spelled(known, messages)
    found = []
    for number, text in enumerate(render(known, [(messages, True) for messages in conversations], today)):
        with _of(number):
            found.append(_ids_of(known, text))
    return found


def answered_ids(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> list[tuple[list[int], list[int]]]:
    """Return for each conversation the ids that ask for its last message, and those that the model answers.

    An answer goes on to the first token that ends a text, where generation stops; without one the tokenizer's
    end is added. What the template writes behind it is left out.

    Raises:
        ValueError: The tokenizer has no template.
        ConversationError: As `asked_ids`; or the template changes the last message, or what stands before it.
    """
    known = with_template(tokenizer)
    for number, messages in enumerate(conversations):
        with _of(number):
            _refuse_spelled(known, messages)
    asked = [part for messages in conversations for part in ((messages[:-1], True), (messages, False))]
    try:
        texts = render(known, asked, DAY_OF_DATA)
    except ConversationError as error:
        error.number //= 2
        raise
    found = []
    for number, messages in enumerate(conversations):
        with _of(number):
            found.append(_split(known, texts[2 * number], texts[2 * number + 1], messages[-1].content))
    return found


def _split(
    tokenizer: PretrainedTokenizer, prompt: str, whole: str, content: str
) -> tuple[list[int], list[int]]:
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template writes what stands before an answer otherwise than where it asks for the "
            "answer, so that training would show what generation never does; give prompt and completion"
        )
    if content.strip() not in whole[len(prompt) :]:
        raise ValueError(
            "the chat template changes the text of the last answer; write it as the template does, or give "
            "prompt and completion"
        )
    before, ids = _ids_of(tokenizer, prompt), _ids_of(tokenizer, whole)
    answer = ids[len(before) :]
    if ids[: len(before)] != before:  # A token lies over the border; generation begins behind it.
        answer = tokenizer.encode(whole[len(prompt) :], specials=True)
        if tokenizer.decode([*before, *answer]) != tokenizer.decode(ids):
            raise ValueError("the tokenizer does not keep the conversation and its last answer together")
    ends = {*tokenizer.eos_ids, tokenizer.eos_id} - {None}
    at = next((place for place, id in enumerate(answer) if id in ends), None)
    if at is not None:
        return before, answer[: at + 1]
    return before, answer if tokenizer.eos_id is None else [*answer, tokenizer.eos_id]


def _ids_of(tokenizer: PretrainedTokenizer, text: str) -> list[int]:
    """Return the ids of what a template wrote; its start is its own."""
    ids = tokenizer.encode(text, specials=True)
    for start in {tokenizer.start_id, tokenizer.bos_id} - {None}:
        if ids[:2] == [start, start]:
            raise ValueError("the chat template starts the text twice; take one start token out of it")
    if not ids:
        raise ValueError("the chat template writes nothing of this conversation")
    return ids


def _refuse_spelled(tokenizer: PretrainedTokenizer, messages: Conversation) -> None:
    for number, message in enumerate(messages, 1):
        if (token := tokenizer.spelled_special(message.content)) is not None:
            raise ValueError(
                f"message {number} spells the special token {token!r}, with which it could end its turn; "
                "take it out of the text"
            )
