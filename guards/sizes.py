"""Guard of sizes: ids fit the vocabulary, and rows the positions. It runs first: misfits crash the others."""

from __future__ import annotations

from collections.abc import Iterator

from guards.faults import Fault
from guards.subject import GuardSubject
from modules.positions import ABSOLUTE_POSITIONS

# Rows of the embedding beyond the tokenizer's ids that are healthy: as many as padding to a round number
# adds, or this share of the ids, as in CodeGen and Phi, which have 51,200 rows for 50,295 ids.
SPARE_IDS = 128
SPARE_SHARE = 0.025


def sizes(subject: GuardSubject) -> Iterator[Fault | str]:
    """See that ids fit the vocabulary, and rows the positions."""
    model, tokenizer = subject.config.model, subject.tokenizer
    spare = model.vocab_size - tokenizer.vocab_size
    if spare > max(SPARE_IDS, SPARE_SHARE * tokenizer.vocab_size):
        yield Fault(
            "vocabulary-too-large",
            f"model.vocab_size is {model.vocab_size} and the tokenizer has {tokenizer.vocab_size} ids",
            "leave model.vocab_size out to take the tokenizer's",
        )
    batches = [subject.micro_batch(0), *subject.validation_batches(2)]
    largest = max(int(batch.tokens.max()) for batch in batches)
    if largest >= model.vocab_size:
        yield Fault(
            "id-outside-vocabulary",
            f"the data hold the id {largest} and the embedding has {model.vocab_size} rows",
            "use the tokenizer that the model was made for",
        )
        return
    furthest = max(int(batch.positions.max()) for batch in batches)
    if model.position in ABSOLUTE_POSITIONS and furthest >= model.block_size:
        yield Fault(
            "too-few-positions",
            f"a row reaches position {furthest} and the model has {model.block_size}",
            "raise model.block_size or shorten the rows",
        )
