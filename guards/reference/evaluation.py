"""Comparison of a run's evaluation with the reference, before it is printed and written.

Of some held-out files, sampled anew each time, the loss and the hits of the model and of the n-gram model are
derived again from the token store's files; and of generated texts, the longest run that stands in training.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from architecture import Decoder
from data.ngram import NGramModel
from data.tokenstore import TokenStore
from dataset import PreparedData
from guards.faults import Fault
from guards.reference.comparison import Comparison, Differs
from guards.reference.effective import config_of, weights_of
from guards.reference.reader import Reader
from guards.reference.rounding import STEP32
from lora import adapters_disabled
from modules.precision import Precision
from modules.quantized_linear import n_weights
from reference import scores
from reference.forward import nll_of
from reference.memory import Training
from reference.ngrams import NGrams
from reference.rows import trimmed
from reference.stored import Stored
from tokenizer import Tokenizer

PRODUCTS = 2e9  # Weights x tokens that are scored again, in fp64: 0.4 s on two cores.
TOKENS = 600  # Of the test files that the model scores again.
COUNTED = 100_000  # Training tokens whose n-grams are counted again: 1 s, 100 MB.
PREDICTED = 1_000  # Tokens that the n-gram model predicts again.
SEARCHED = 1e9  # Training tokens x tokens of texts that are searched for in them: 1 s.
LISTED = 10  # An evaluation lists so many of the longest runs.
LONG = 50  # An evaluation counts a run of so many tokens as long.
HITS = {"top1": 1, "top5": 5}
TIED = 1e-9  # Probabilities that differ by less, relatively, may be in either order.


class Evaluated(Protocol):
    """What is evaluated: `suites.evaluated.EvaluatedModel` has the attributes."""

    @property
    def model(self) -> Decoder: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def length(self) -> int: ...
    @property
    def adapted(self) -> bool: ...
    @property
    def precision(self) -> Precision: ...


def refuse_other_scores(
    result: dict[str, Any], evaluated: Evaluated, data: PreparedData, allowed: bool
) -> None:
    """Compare an evaluation of a run with the reference, and print that both agree.

    Args:
        result: What is about to be written.
        allowed: Print a difference and go on.

    Raises:
        Fault: They differ.
    """
    comparison, started = Comparison(), time.perf_counter()
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            if "documents" in result:
                comparison.begin("scores")
                compare_token_scores(comparison, result, evaluated, data)
            comparison.begin("memorised text")
            for record in [result.get("suite", {}), *result.get("more_suites", ())]:
                if "memorisation" in record:
                    compare_memorised(comparison, record, evaluated, data.train)
    except Differs as difference:
        remedy = f"{difference.remedy}; no score was written"
        fault = Fault("differs-from-reference", comparison.evidence(difference), remedy, "evaluate")
        if not allowed:
            raise fault from None
        print(f"ALLOWED {fault.name}: {fault.evidence}", file=sys.stderr)
        result["allowed faults"] = result["allowed faults"] | {fault.name: fault.evidence}
        return
    said = [f"a second opinion agrees: {comparison.summary()}"] if comparison.stages else []
    seconds = time.perf_counter() - started
    found = "; ".join([*comparison.left_out, *said])
    print(f"preflight, evaluation: {found} ({seconds:.1f} s)", file=sys.stderr)


# --- token scores -------------------------------------------------------------------------------------


def compare_token_scores(
    comparison: Comparison, result: dict[str, Any], evaluated: Evaluated, data: PreparedData
) -> None:
    """Compare the sums of some documents, and the means over all of them."""
    stored, documents = Stored(data.test.folder, data.test.split), result["documents"]
    counted = {"files": len(stored), "bytes": int(stored.byte_lengths.sum())}
    comparison.exact("files and bytes", {key: result[key] for key in counted}, counted, "what is counted")
    n = n_weights(evaluated.model)
    most = PRODUCTS / n / (2 if evaluated.adapted else 1)
    chosen = sampled(stored.lengths, min(TOKENS, most))
    if not chosen:  # The shortest, if it is one that there is time for.
        shortest = int(np.argmin(stored.lengths))
        chosen = [shortest] if 1 < stored.lengths[shortest] <= most else []
    if not chosen:
        comparison.leave_out("the loss of test files", f"one takes too long with a model of {n:,} weights")
    for number in chosen:
        shown = Shown(stored, number, evaluated.length)
        comparison.exact(
            f"targets of test document {number}", documents["tokens"][number], shown.n_targets, "what counts"
        )
    systems = {"model": contextlib.nullcontext(), "base": adapters_disabled(evaluated.model)}
    for system in [name for name in systems if chosen and name in documents["nats"]]:
        with systems[system]:
            scored = Scored(comparison, system, evaluated)
            for number in chosen:
                scored.same(number, Shown(stored, number, evaluated.length), documents)
    compare_ngrams(comparison, result, evaluated.length, data)
    n_targets = sum(documents["tokens"])
    n_bytes = int(stored.byte_lengths.sum())
    for system in documents["nats"]:
        loss = math.fsum(documents["nats"][system]) / n_targets
        expected = {
            "tokens": n_targets,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss * n_targets / math.log(2) / n_bytes,
            "top1": sum(documents["top1"][system]) / n_targets,
            "top5": sum(documents["top5"][system]) / n_targets,
        }
        for key, value in expected.items():
            stage, remedy = f"{key} of the {system}", "how the sums of documents become a score"
            comparison.close(stage, _number(result[system][key]), _number(value), 1e-5, remedy)


class Shown:
    """What is scored of one held-out document: pieces of ids, each read by itself.

    A plain text is cut where rows end, and the last token of a row predicts the first of the next. An example
    is in one row.

    Attributes:
        pieces: The ids of each piece, with its last target.
        first: The place of the first target in the first piece.
    """

    def __init__(self, stored: Stored, number: int, length: int):
        if stored.holds_examples:
            ids, n_prompt = trimmed(stored, number, length + 1)
            self.pieces, self.first = [ids], max(1, n_prompt)
        else:
            ids, begin = stored.document(number), int(stored.offsets[number])
            cuts = [0, *range(-begin % length or length, len(ids) - 1, length), len(ids) - 1]
            self.pieces = [ids[a : b + 1] for a, b in itertools.pairwise(cuts) if a < b]
            self.first = 1

    @property
    def n_targets(self) -> int:
        return sum(len(piece) - 1 for piece in self.pieces) - (self.first - 1) * bool(self.pieces)

    def targets(self) -> Iterator[tuple[list[int], int]]:
        """Yield each piece with the place of its first target."""
        for number, piece in enumerate(self.pieces):
            yield piece, 1 if number else self.first


def sampled(lengths: np.ndarray, most: float) -> list[int]:
    """Return some documents, sampled anew, that have at most so many tokens together."""
    chosen, total = list[int](), 0
    for number in np.random.Generator(np.random.PCG64()).permutation(len(lengths)).tolist():
        if 1 < lengths[number] <= most - total:
            chosen.append(number)
            total += int(lengths[number])
    return chosen


class Scored:
    """The comparison of one system's sums with the model as it is now.

    Args:
        system: Its name in an evaluation.
    """

    def __init__(self, comparison: Comparison, system: str, evaluated: Evaluated):
        self.comparison, self.system, model = comparison, system, evaluated.model
        self.reader = Reader(model, config_of(model, model.config), weights_of(model, {}))
        self.reader.step = max(self.reader.step, torch.finfo(evaluated.precision.dtype).eps)

    def same(self, number: int, shown: Shown, documents: dict[str, Any]) -> None:
        """Compare loss and hits of a document."""
        nats, least, most = 0.0, dict.fromkeys(HITS, 0), dict.fromkeys(HITS, 0)
        for ids, first in shown.targets():
            logits, labels = self.reader.logits(ids[:-1])[first - 1 :], torch.tensor(ids[first:])
            nats += float(nll_of(logits, labels).sum())
            for key, k in HITS.items():
                least[key] += scores.hits(logits, labels, k, -2 * self.reader.off)
                most[key] += scores.hits(logits, labels, k, 2 * self.reader.off)
        # Errors of tokens are independent; what they have in common is of second order.
        n, off = shown.n_targets, self.reader.off
        # The log of a sum of exponentials in fp32 rounds some more.
        off = 2 * off * (math.sqrt(n) + n * off) + 8 * STEP32 * (n + nats)
        _same_nats(self.comparison, self.system, number, documents, nats, off)
        _same_hits(self.comparison, self.system, number, documents, (least, most))


def _same_nats(
    comparison: Comparison, system: str, number: int, documents: dict[str, Any], nats: float, off: float
) -> None:
    """Compare a document's summed loss, which rounding may change by `off`."""
    found, expected = _number(documents["nats"][system][number]), _number(nats)
    stage = f"loss of the {system} on test document {number}"
    comparison.close(stage, found, expected, off / abs(nats or 1.0), "what the scores of tokens are made of")


def _same_hits(
    comparison: Comparison,
    system: str,
    number: int,
    documents: dict[str, Any],
    bounds: tuple[dict[str, int], dict[str, int]],
) -> None:
    """Compare how many of a document's targets were hit; rounding decides between what is nearly equal."""
    for key in HITS:
        least, most, found = bounds[0][key], bounds[1][key], documents[key][system][number]
        stage = f"{key} of the {system} on test document {number}"
        expected = found if least <= found <= most else least
        comparison.exact(stage, found, expected, "how a target's rank is counted")


def compare_ngrams(comparison: Comparison, result: dict[str, Any], length: int, data: PreparedData) -> None:
    """Compare the n-gram model's sums; of a large training split one is trained on some documents."""
    test, train = Stored(data.test.folder, data.test.split), Stored(data.train.folder, data.train.split)
    order, chosen = result["n-gram order"], sampled(test.lengths, PREDICTED)
    if not chosen:
        comparison.leave_out("the n-gram model", f"no test file has at most {PREDICTED:,} tokens")
        return
    is_whole = int(train.offsets[-1]) <= COUNTED
    numbers = list(range(len(train))) if is_whole else sampled(train.lengths, COUNTED)
    if not numbers:
        comparison.leave_out("the n-gram model", f"no training file has at most {COUNTED:,} tokens")
        return
    counted = [train.document(number) for number in numbers]
    derived = NGrams(counted, data.train.vocab_size, order)
    documents = result["documents"]
    model = None
    if not is_whole:
        again = f"{len(numbers)} of {len(train):,} files were counted again"
        comparison.leave_out("the n-gram model of all training files", again)
        model = NGramModel([np.array(ids) for ids in counted], data.train.vocab_size, order)
    for number in chosen:
        ids, first = shown_whole(test, number, length)
        nats, least, most = 0.0, dict.fromkeys(HITS, 0), dict.fromkeys(HITS, 0)
        for history, token in list(derived.predicted(ids))[first - 1 :]:
            p = derived.distribution(history)
            nats -= math.log(p[token])
            for key, k in HITS.items():
                least[key] += int((p >= p[token] * (1 - TIED)).sum() <= k)
                most[key] += int((p > p[token] * (1 + TIED)).sum() < k)
        if model is not None:
            of_tokens = -model.log_probs([np.array(ids)])[first - 1 :]
            hits = model.top([np.array(ids)], 5)[first - 1 :] == np.array(ids[first:])[:, None]
            sums = {"nats": of_tokens.sum(), "top1": hits[:, 0].sum(), "top5": hits.any(1).sum()}
            documents = {key: {"n-gram": {number: float(value)}} for key, value in sums.items()}
        _same_nats(comparison, "n-gram", number, documents, nats, 1e-9 * abs(nats))
        _same_hits(comparison, "n-gram", number, documents, (least, most))


def shown_whole(stored: Stored, number: int, length: int) -> tuple[list[int], int]:
    """Return the ids of a document that the n-gram model reads, and the place of its first target.

    Of an example these are the ones that fit into a row.
    """
    if not stored.holds_examples:
        return stored.document(number), 1
    ids, n_prompt = trimmed(stored, number, length + 1)
    return ids, max(1, n_prompt)


# --- memorised text -----------------------------------------------------------------------------------


def compare_memorised(
    comparison: Comparison, record: dict[str, Any], evaluated: Evaluated, train: TokenStore
) -> None:
    """Compare what generated texts repeat: the listed runs, and the counts where all were searched for.

    Raises:
        Differs: They differ.
    """
    stored, found = Stored(train.folder, train.split), record["memorisation"]
    most = SEARCHED / max(1, int(stored.offsets[-1]))
    if most < 1:
        comparison.leave_out("memorised text", f"{int(stored.offsets[-1]):,} training tokens are too many")
        return
    training = Training([stored.document(number) for number in range(len(stored))])
    texts = [
        (system, number, text)
        for number, sample in enumerate(record["samples"], 1)
        for system in found["systems"]
        for text in _texts_of(sample, system)
    ]
    draw = np.random.Generator(np.random.PCG64())
    runs: dict[str, list[int]] = {system: [] for system in found["systems"]}
    searched = 0
    for at in draw.permutation(len(texts)).tolist():
        system, number, text = texts[at]
        ids = evaluated.tokenizer.encode(text)
        most -= len(ids)
        if most < 0:
            break
        size, times, document = training.longest_run(ids, found["least"])
        runs[system].append(size)
        searched += 1
        _same_run(comparison, found, (system, number, len(ids)), (size, times, stored.names[document]))
    if searched < len(texts):
        comparison.leave_out("memorised text", f"{searched} of {len(texts)} texts were searched for again")
        return
    for system, sizes in runs.items():
        expected = {
            "texts": len(sizes),
            "median": float(np.median(sizes)),
            "longest": max(sizes),
            "long": sum(size >= LONG for size in sizes),
        }
        own = {key: found["systems"][system][key] for key in expected}
        comparison.exact(f"memorised text of the {system}", own, expected, "how runs are found and counted")


def _texts_of(sample: dict[str, Any], system: str) -> list[str]:
    if system == "reference":
        return [sample["reference"]]
    return [sample["predictions"][system], *sample.get("more", {}).get(system, [])]


def _same_run(
    comparison: Comparison, found: dict[str, Any], text: tuple[str, int, int], run: tuple[int, int, str]
) -> None:
    """Compare a text's longest run with the listed ones, among which a long one must be."""
    (system, number, n_tokens), (size, times, name) = text, run
    listed = [(row["system"], row["sample"], row["of"], row["tokens"]) for row in found["longest"]]
    shortest = min((row[-1] for row in listed), default=0) if len(listed) == LISTED else 0
    own = (system, number, n_tokens, size)
    stage = f"longest run of sample {number} of the {system} in training"
    if size > shortest and system != "reference":
        comparison.exact(stage, own in listed, True, "how runs of tokens are searched for in training")
    for row in found["longest"]:
        if (row["system"], row["sample"], row["of"], row["tokens"]) == own:
            rows = [(one["times"], one["file"]) for one in found["longest"] if one["sample"] == number]
            comparison.exact(f"{stage}: times and file", (times, name) in rows, True, "what is kept of a run")
            break


def _number(value: float) -> Tensor:
    return torch.tensor(float(value)).double()
