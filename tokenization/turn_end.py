"""The token with which an answer ends, as a chat template writes it.

Phi-3's end of a text is not the end of a turn: that is `<|end|>`, which generation_config.json names. In a
folder without that file the template alone has it, and a model would go on and speak for its user.
"""

from __future__ import annotations

import sys

from tokenization.base import Tokenizer
from tokenization.chat import ASSISTANT, DAY_OF_DATA, Message, render
from tokenization.pretrained import PretrainedTokenizer

CONVERSATION = Message("user", "Is 7 odd?"), Message(ASSISTANT, "Yes, 7 is.")


def turn_end(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """Return the special token that the template writes next behind an answer, and its text.

    None stands for a tokenizer without a template, and a template that writes none or fails; what fails is
    told where a conversation is asked for.
    """
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
        return None
    try:
        (text,) = render(tokenizer, [(CONVERSATION, False)], DAY_OF_DATA)
    except ValueError:
        return None
    _, answered, behind = text.rpartition(CONVERSATION[-1].content)
    ids = tokenizer.encode(behind.lstrip(), specials=True) if answered else []
    if not ids or tokenizer.bytes_of(ids[:1]) is not None:
        return None
    return ids[0], tokenizer.spelled_special(behind) or ""


def end_turns(tokenizer: Tokenizer) -> None:
    """Let generation end where a turn does, which a line says where the folder's files do not."""
    found = turn_end(tokenizer)
    own = tokenizer.eos_ids or (() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    if found is not None and found[0] not in own:
        tokenizer.eos_ids = (*own, found[0])
        print(
            f"answers end with {found[1]!r}, as the chat template has it; no file of the model says so",
            file=sys.stderr,
        )
