"""An example of a token store as the text that it was before tokenisation."""

from __future__ import annotations

from data.tokenstore import TokenStore
from generation.text import added_text
from suites.scoring import Example
from tokenizer import Tokenizer


def text_of_example(store: TokenStore, tokenizer: Tokenizer, number: int) -> Example:
    """Return one example of the store, with its texts as they were: the store checked that when built."""
    ids = store.document(number).tolist()
    name, cut = store.names[number], int(store.cuts[number])
    if cut >= 0:
        text = tokenizer.decode(ids)
        return Example(name, number, text[:cut], text[cut:])
    prompt_length, gap = int(store.prompt_lengths[number]), int(store.suffix_places[number])
    prompt, suffix = ids[:prompt_length], None
    if store.holds_conversations:
        ends = {*tokenizer.eos_ids, tokenizer.eos_id}  # The template's end may have a text.
        answer = ids[prompt_length : len(ids) - (ids[-1] in ends)]
        reference = added_text(tokenizer, prompt, answer)
        return Example(name, number, tokenizer.decode(prompt), reference, ids=tuple(prompt))
    reference = added_text(tokenizer, prompt, ids[prompt_length:])
    if gap:
        prompt, after = ids[store.gap_lead + 1 : gap], ids[gap + 1 : prompt_length - 1]
        if store.suffix_first:
            prompt, after = ids[gap + 1 : prompt_length], ids[store.gap_lead + 2 : gap]
        suffix = tokenizer.decode(after)
    return Example(name, number, tokenizer.decode(prompt), reference, suffix)
