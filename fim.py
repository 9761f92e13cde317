"""Fill-in-the-middle: the prompt that asks a model for what stands between two texts (arXiv:2207.14255).

    [prefix] encode(before the gap) [suffix] encode(after the gap) [middle] -> the gap, until an end

The three markers are tokens that the model was trained with; they are found in its tokenizer and put in as
ids. The texts themselves hold no marker: "<fim_prefix>" inside one of them is encoded as the text it is.
"""

from __future__ import annotations

from tokenizer import Tokenizer

MARKERS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder
)
# What else such a model writes where the gap is full: another file begins, or the text ends.
ENDS = (
    "<fim_pad>",
    "<fim-pad>",
    "<|fim_pad|>",
    "<|endoftext|>",
    "<file_sep>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<|im_end|>",
)


def fim_markers(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of the tokens before the prefix, the suffix and the middle.

    Raises:
        ValueError: The tokenizer has none, so that the model was not trained to fill gaps.
    """
    for markers in MARKERS:
        prefix, suffix, middle = (tokenizer.token_id(token) for token in markers)
        if prefix is not None and suffix is not None and middle is not None:
            return prefix, suffix, middle
    raise ValueError(
        f"the tokenizer has no fill-in-the-middle tokens such as {MARKERS[0][0]}, so the model cannot use a "
        "suffix; leave it out, or use a model such as StarCoder or Qwen2.5-Coder"
    )


def fim_prompt_ids(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """The ids that ask for what stands between two texts; the one way to build them.

    Raises:
        ValueError: See `fim_markers`.
    """
    before, after, middle = fim_markers(tokenizer)
    return [
        before,
        *tokenizer.encode(prefix),
        after,
        *tokenizer.encode(suffix),
        middle,
    ]


def fim_end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a middle: eos, the markers themselves, and where another file or text begins."""
    ends = {tokenizer.token_id(token) for token in ENDS} | {tokenizer.eos_id, *fim_markers(tokenizer)}
    return frozenset(id for id in ends if id is not None)
