"""The lines that a run prints of its data and its parameters before the first update, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from architecture import Decoder
from config import Config, unread_rates
from config.tested import changed
from data.fim import fim_markers
from data.tokenstore import TokenStore
from dataset import GAPS_SEEN, PreparedData, gaps_in_sight, is_trimmed, refuse_long_answers
from tokenizer import Tokenizer
from training.optim import ParameterGroup, groups_table, parameter_groups


def say_data(config: Config, data: PreparedData, tokenizer: Tokenizer, warn: bool) -> None:
    """Print what changed of the code, a line for each split, and what its rows cannot show of it.

    Args:
        warn: Whether to warn of gaps that are filled by guessing.

    Raises:
        ValueError: The completion of an example does not fit a row.
    """
    if changes := changed():
        print(changes)
    if groups := data.report.groups:
        documents = sum(data.report.kept.values())
        print(f"split: {documents:,} documents in {groups:,} groups by their text (data.regroup true)")
    for store in dict.fromkeys((data.train, data.validation, data.test)):
        kind = "answers" if store.holds_conversations else "examples" if store.holds_examples else "files"
        refuse_long_answers(config.data, store, config.row_length)
        longer = int(is_trimmed(store, config.row_length).sum())
        gaps = data.report.gaps if store is data.train else 0
        print(
            f"{store.split}: {store.n_documents:,} {kind}, {store.n_bytes:,} bytes, {store.n_tokens:,} tokens"
            + (f"; {longer:,} trimmed to a row of {config.row_length}" if longer else "")
            + (f"; {gaps:,} with a gap to fill" if gaps else "")
        )
    if config.lora.new_tokens:
        say_absent(config.lora.new_tokens, tokenizer, data.train)
    if data.report.gaps:
        share = gaps_in_sight(data.train, fim_markers(tokenizer), config.row_length)
        say_gaps_in_sight(share, config, warn)


def say_absent(new_tokens: Sequence[str], tokenizer: Tokenizer, train: TokenStore) -> None:
    """Warn of new tokens that no training text holds."""
    ids = [id for token in new_tokens if (id := tokenizer.token_id(token)) is not None]
    counts = dict(zip(new_tokens, train.occurrences(ids), strict=True))
    absent = [repr(token) for token, count in counts.items() if not count]
    if absent:
        print(
            f"warning: no training text holds {', '.join(absent)}: {len(absent)} of {len(counts)} "
            f"lora.new_tokens occur 0 times in {train.n_tokens:,} tokens, and their rows cannot learn what "
            "they mean; spell them in the data as they are named, or leave them out",
            file=sys.stderr,
        )


def say_gaps_in_sight(share: float, config: Config, warn: bool) -> None:
    """Print the share of a gap's tokens that see their prefix and suffix, and warn where it is small.

    Rows are cut from documents with their gaps: in the rest of a long one, a gap is filled by guessing.
    """
    length = config.row_length
    print(f"gaps: {share:.1%} of the tokens that fill one see their prefix and suffix in a row of {length}")
    if warn and share < GAPS_SEEN:
        print(
            f"warning: of the tokens that --data.fim_rate {config.data.fim_rate} makes the model fill in, "
            f"{1 - share:.1%} are learned without prefix and suffix, since documents are longer than rows of "
            f"{length} tokens: set --row_length higher, or give functions instead of files",
            file=sys.stderr,
        )


def say_groups(config: Config, model: Decoder) -> None:
    """Print each group of parameters; raise a ValueError as `checked_groups` does."""
    groups = checked_groups(config, model)
    print(groups_table(groups, config.optimizer))
    if config.optimizer.name == "muon" and all(group.optimizer != "Muon" for group in groups):
        print(
            "warning: optimizer.name is muon, and no matrix of a block trains, which is all that Muon moves: "
            "AdamW moves everything; set --optimizer.name adamw to say so",
            file=sys.stderr,
        )


def checked_groups(config: Config, model: Decoder) -> list[ParameterGroup]:
    """Return the groups of parameters; ValueError for a learning rate that is set and that no group has."""
    groups = parameter_groups(model, config.optimizer, config.lora.lr_ratio, config.model.width_mult)
    for key, reason in unread_rates(config.optimizer, {group.kind for group in groups}):
        raise ValueError(f"{key} is set, but {reason}; remove it")
    return groups
