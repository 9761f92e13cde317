"""Guard of the start: the first loss against that of knowing nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from adapters.layers import Bias, TrainableRows
from data.tokenstore import TokenStore
from dataset import IGNORE_INDEX, Batch
from guards.faults import Fault
from guards.subject import GuardSubject, affordable
from lora import Adapted, adapter_layers

FIRST_LOSS_PASSES = 1.25  # Of `affordable`, for each of two batches: at 1B 32 tokens, through all blocks.
UNIGRAM_TOKENS = 1_000_000  # Tokens that are counted, evenly spread.
FIRST_LOSS_ABOVE, FIRST_LOSS_BELOW = 1.5, 0.75  # Nats. Healthy initialisations stay within 0.3 of ln V.


def start(subject: GuardSubject) -> Iterator[Fault | str]:
    """See that the tokens of the data can train, and that the first loss is what the start should give."""
    yield from untrained_tokens(subject)
    held_out = [affordable(subject, batch, FIRST_LOSS_PASSES) for batch in subject.validation_batches(2)]
    if len({batch.tokens.shape for batch in held_out}) == 1:  # One pass reads the weights once.
        held_out = [Batch(*(torch.cat(parts) for parts in zip(*held_out, strict=True)))]
    vocab_size = subject.config.model.vocab_size
    scores, uniform = subject.score(held_out), math.log(vocab_size)
    loss = scores.loss
    yield f"loss {loss:.3f} on {scores.tokens:,} validation tokens; ln(vocabulary) is {uniform:.3f}"
    if not math.isfinite(loss):
        yield Fault("first-loss-not-finite", f"the first loss is {loss}", "check the weights and --precision")
    elif subject.start == "fresh" and loss > uniform + FIRST_LOSS_ABOVE:
        yield Fault(
            "first-loss-too-high",
            f"the first loss is {loss:.2f}, and knowing nothing costs ln({vocab_size}) = {uniform:.2f}",
            "scale the initialisation of the embedding and the head down",
        )
    elif subject.start == "fresh" and loss < uniform - FIRST_LOSS_BELOW:
        yield Fault(
            "first-loss-too-low",
            f"a model that was never trained has loss {loss:.2f}, and knowing nothing costs {uniform:.2f}",
            "look for labels that can be seen in the inputs",
        )
    elif subject.start == "loaded" and loss > (bound := least_knowledge(subject, held_out)):
        known = "nothing" if bound == uniform else "token frequencies alone"
        yield Fault(
            "worse-than-unigram",
            f"the loaded weights have loss {loss:.2f}, and knowing {known} costs {bound:.2f}",
            "check that weights, config and tokenizer belong together",
        )


def untrained_tokens(subject: GuardSubject) -> Iterator[Fault]:
    """Yield a fault for tokens that the base never saw, and whose rows of the embedding will not train."""
    known, embed = subject.known_ids, subject.model.embed
    if known is None or any(p.requires_grad and p.dim() > 1 for p in embed.parameters(recurse=False)):
        return
    trained: set[int] = set()
    for layer in adapter_layers(subject.model, "default").values() if isinstance(embed, Adapted) else ():
        if isinstance(layer, TrainableRows):
            trained |= set(layer.ids.tolist())
    if isinstance(embed, Adapted) and not all(
        isinstance(c, TrainableRows | Bias) for c in embed.adapters.values()
    ):
        return
    seen = np.unique(counted_tokens(subject.train))
    new = [int(id) for id in seen[seen >= known] if int(id) not in trained]
    if new:
        yield Fault(
            "token-never-trained",
            f"the data hold {subject.tokenizer.decode(new[:1])!r} (id {new[0]}), which is not among the "
            f"base's {known} ids, and its row of the embedding is frozen",
            "name it in --lora.new_tokens, so that its rows train, or take the base's own tokenizer",
        )


def counted_tokens(train: TokenStore) -> np.ndarray:
    """Return up to UNIGRAM_TOKENS of the training tokens, evenly spread."""
    return train.gather(np.arange(0, train.n_tokens, -(-train.n_tokens // UNIGRAM_TOKENS)))


def least_knowledge(subject: GuardSubject, held_out: Iterable[Batch]) -> float:
    """Return the loss that loaded weights must stay below: that of token frequencies.

    On answers, whose form a base cannot know before it is tuned ("yes" or "no"), that of knowing nothing.
    """
    if subject.train.holds_examples:
        return math.log(subject.config.model.vocab_size)
    return unigram_loss(subject.train, held_out)


def unigram_loss(train: TokenStore, batches: Iterable[Batch]) -> float:
    """Return the nats a label of a model that knows only the frequencies of training tokens, each plus one.

    The frequencies of the labels themselves would be no bound: a thousand tokens predict themselves with 2
    nats less than the language does.
    """
    counts = np.bincount(counted_tokens(train), minlength=train.vocab_size) + 1.0
    labels = torch.cat([batch.labels[batch.labels != IGNORE_INDEX] for batch in batches]).cpu().numpy()
    return float(np.log(counts.sum()) - np.log(counts[labels]).mean())
