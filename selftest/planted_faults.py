"""The planted faults: each of the silent faults that cost someone a result, put into a small healthy run.

A planted fault patches one place of the product as the fault had it (`selftest/faults.py`), or sets one thing
in the configuration, and names what must stop the run. `selftest/run.py` runs them; no guard knows of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modules.attention import reference_attention
from modules.dropout import Dropout
from selftest.faults import (
    EOS,
    Patch,
    adapters_not_dropped,
    attention_by,
    attention_to_nothing,
    base_moved,
    base_thawed,
    batches_by,
    beams_by_logits,
    blind,
    clip_stored_only,
    decay_ignored,
    documents_joined,
    dropout_argument_ignored,
    dropout_in_evaluation,
    embedding_shuffled,
    encoded_by,
    giant_weights,
    gradients_kept,
    gradients_summed,
    half_the_micro_batches,
    inverted_mask,
    keys_not_rotated,
    labels_by,
    mask_as_numbers,
    masked_where,
    micro_batches_by,
    moments_dropped,
    moments_not_finite,
    old_gpu,
    one_batch_only,
    one_residual_undropped,
    one_token_late,
    optimizers_idle,
    order_unread,
    other_base,
    padded_on_the_right,
    padding_seen,
    part_detached,
    positions_unread,
    prompt_kept,
    random_states_dropped,
    rarity_inverted,
    rates_ignored,
    replaced_after_build,
    rotation_dropped,
    scaling_ignored,
    schedule_ignored,
    schedule_stopped,
    score_times,
    scores_divided_twice,
    seed_forgotten,
    smoothing_in_the_score,
    smoothing_unread,
    splits_read,
    swapped_axes,
    term_dropped,
    tie_broken,
    tokenizer_by,
    trained_in_evaluation,
    truncated_on_the_right,
    validation_of_its_own,
    weights_dropped,
    width_forgotten,
    window_ignored,
)


@dataclass(frozen=True)
class PlantedFault:
    """A fault, and how to plant it.

    Attributes:
        name: The id under which the fault is known, and a word.
        story: What happened.
        expected: A name, or words, of what stops the run.
        fault: Returns a context that patches the product.
        settings: Replaces groups of the configuration; the healthy twin has them too, but for `wrong`.
        wrong: Replaces keys of the configuration in the faulty run only.
        resumed: Whether the fault comes when a run of three healthy updates goes on.
    """

    name: str
    story: str
    expected: str
    fault: Patch = contextlib.nullcontext
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    wrong: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    resumed: bool = False


def merged(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of one, with those of the other in their place, group by group."""
    return {name: one.get(name, {}) | other.get(name, {}) for name in one | other}


def split_by_row(name: str, story: str, file: str) -> PlantedFault:
    """Return a fault whose rows of one origin fall into both splits; the twin groups them by their origin."""
    settings = {"data": {"source": file, "group_field": "origin"}, "model": {"block_size": 256}}
    return PlantedFault(name, story, "split-leaks", settings=settings, wrong={"data": {"group_field": None}})


TUNED: dict[str, dict[str, Any]] = {
    "train": {"base": "base"},
    "lora": {"r": 4, "targets": ("c_attn", "c_proj")},
    "optimizer": {"name": "adamw", "lr": 1e-3, "embedding_lr": 0.0, "head_lr": 0.0},
}
GRADED: dict[str, dict[str, Any]] = {"data": {"source": "graded", "order": "easy-first"}}
EXAMPLES: dict[str, dict[str, Any]] = {"data": {"source": "examples.jsonl"}, "model": {"block_size": 256}}
LONG_PROMPTS: dict[str, dict[str, Any]] = {"data": {"source": "prompts.jsonl"}, "model": {"block_size": 256}}
PLANTED_FAULTS = [
    PlantedFault("D6 order", "scores of difficulty were never read", "order-ignored", order_unread, GRADED),
    PlantedFault(
        "D7 rarity", "the rarest tokens were scored as easiest", "order-inverted", rarity_inverted, GRADED
    ),
    split_by_row("D1 variants", "variants of one function in two splits", "variants.jsonl"),
    split_by_row("D2 lines", "lines of one page in two splits", "lines.jsonl"),
    split_by_row("D3 windows", "overlapping windows in two splits", "windows.jsonl"),
    split_by_row("D4 chunks", "chunks of one file in two splits", "chunks.jsonl"),
    PlantedFault(
        "E3 trained on",
        "evaluated on training data",
        "split-leaks",
        splits_read("train", "validation", "train"),
    ),
    PlantedFault(
        "E3 validated",
        "validated on training data",
        "split-leaks",
        splits_read("train", "train", "test"),
    ),
    PlantedFault(
        "E3 chosen by",
        "evaluated on what checkpoints were chosen by",
        "split-leaks",
        splits_read("train", "validation", "validation"),
    ),
    PlantedFault("M1 axes", "batch and time swapped, hidden by a flatten", "other-row-visible", swapped_axes),
    PlantedFault("M2 mask", "a causal mask inverted", "future-visible", inverted_mask),
    PlantedFault("M2 blind", "a mask that hides the past too", "past-invisible", blind),
    PlantedFault("M2 packing", "packed documents see each other", "other-document-visible", documents_joined),
    PlantedFault(
        "M2 ids",
        "packed documents share one id",
        "documents-not-separated",
        batches_by(lambda batch: batch._replace(document_ids=batch.document_ids.clamp(max=0))),
    ),
    PlantedFault(
        "M2 positions",
        "positions stay 0",
        "positions-not-counted",
        batches_by(lambda batch: batch._replace(positions=batch.positions * 0)),
    ),
    PlantedFault(
        "M2 late", "labels shifted twice", "token-invisible", one_token_late, {"model": {"dropout": 0.0}}
    ),
    PlantedFault("M2 padding", "padding is seen", "padding-visible", padding_seen),
    PlantedFault(
        "M3 positions",
        "rows longer than the table of positions",
        "too-few-positions",
        settings={"model": {"position": "learned"}},
        wrong={"train": {"row_length": 128}},
    ),
    PlantedFault("M3 low", "a loss divided by too many tokens", "first-loss-too-low", score_times(0.5)),
    PlantedFault("M4 loss", "the loss overflows", "first-loss-not-finite", score_times(float("inf"))),
    PlantedFault("M4 nothing", "a mask leaves a token nothing", "gradient-not-finite", attention_to_nothing),
    PlantedFault(
        "M2 count",
        "the model counts positions by itself",
        "positions-ignored",
        positions_unread,
        {"model": {"position": "learned"}},
    ),
    PlantedFault("M2 rotary", "rotary positions never applied", "positions-ignored", rotation_dropped),
    PlantedFault("M2 keys", "rotary positions of queries only", "positions-not-relative", keys_not_rotated),
    PlantedFault("M3 start", "first loss far above ln V", "first-loss-too-high", giant_weights),
    PlantedFault("M4 numbers", "a boolean mask added as numbers", "future-visible", mask_as_numbers),
    PlantedFault(
        "M5 clip",
        "clip value stored, never applied",
        "clip-ignored",
        clip_stored_only,
        {"optimizer": {"grad_clip": 0.01}},
    ),
    PlantedFault("M6 dropout", "`dropout` argument ignored", "dropout-ignored", dropout_argument_ignored),
    PlantedFault("M6 half", "residuals of blocks not dropped", "dropout-ignored", one_residual_undropped),
    PlantedFault("M6 mode", "updates in evaluation mode", "dropout-ignored", trained_in_evaluation),
    PlantedFault(
        "M6 tie",
        "embedding and head came apart",
        "setting-ignored",
        tie_broken,
        {"model": {"tie_embeddings": True}},
    ),
    PlantedFault("M6 eval", "dropout in evaluation", "evaluation-not-repeatable", dropout_in_evaluation),
    PlantedFault(
        "M6 schedule",
        "the schedule never reached the optimizer",
        "schedule-ignored",
        schedule_ignored,
        {"optimizer": {"warmup_steps": 10}},
    ),
    PlantedFault(
        "M6 stopped",
        "after a resume the schedule stood still",
        "schedule-ignored",
        schedule_stopped,
        {"optimizer": {"warmup_steps": 10, "schedule": "constant"}},
        resumed=True,
    ),
    PlantedFault("M6 gradients", "gradients never cleared", "gradient-not-cleared", gradients_kept),
    PlantedFault(
        "M6 mean",
        "accumulated gradients summed, not averaged",
        "gradient-not-the-mean",
        gradients_summed,
        {"train": {"accumulation": 2}},
    ),
    PlantedFault("M6 idle", "the optimizer never steps", "parameter-not-updated", optimizers_idle),
    PlantedFault(
        "M6 stale", "the optimizer holds another matrix", "parameter-not-updated", replaced_after_build
    ),
    PlantedFault(
        "M6 micro",
        "one micro-batch accumulated twice",
        "batch-repeated",
        micro_batches_by(lambda manager, index: index - index % 2),
        {"train": {"accumulation": 2}},
    ),
    PlantedFault("M10 batch", "every batch is the first", "batch-repeated", one_batch_only),
    PlantedFault(
        "M10 data",
        "after a resume the data began anew",
        "data-out-of-order",
        micro_batches_by(
            lambda manager, index: max(0, index - 3) if manager.resumed_from and manager.began else index
        ),
        resumed=True,
    ),
    PlantedFault(
        "M6 window",
        "the sliding window ignored",
        "setting-ignored",
        window_ignored,
        {"model": {"sliding_window": 20, "window_layers": (1,)}},
    ),
    PlantedFault(
        "M6 rope",
        "the scaling of rotary frequencies ignored",
        "setting-ignored",
        scaling_ignored,
        {"model": {"rope_scaling": "dynamic", "rope_factor": 2.0}},
    ),
    PlantedFault("M6 decay", "the rate never fell", "schedule-ignored", decay_ignored),
    PlantedFault("M6 rates", "one learning rate for all", "setting-ignored", rates_ignored(embedding_lr=0.0)),
    PlantedFault(
        "M6 width",
        "rates not carried over to another width",
        "setting-ignored",
        width_forgotten,
        {"model": {"base_width": 8}},
    ),
    PlantedFault(
        "M6 adapters",
        "dropout of adapters ignored",
        "dropout-ignored",
        adapters_not_dropped,
        merged(TUNED, {"lora": {"dropout": 0.1}}),
    ),
    PlantedFault(
        "M6 smoothing",
        "label smoothing ignored",
        "objective-not-the-loss",
        smoothing_unread,
        {"optimizer": {"label_smoothing": 0.1}},
    ),
    PlantedFault(
        "M6 steps",
        "accumulation ignored",
        "accumulation-ignored",
        half_the_micro_batches,
        {"train": {"accumulation": 2}},
    ),
    PlantedFault(
        "M7 part", "a part that is cut off from training", "parameter-without-gradient", part_detached
    ),
    PlantedFault(
        "M8 vocabulary",
        "vocabulary size left at its default",
        "vocabulary-too-large",
        wrong={"model": {"vocab_size": 4_000}},
    ),
    PlantedFault("M9 path", "validation ran another path", "validation-differs", validation_of_its_own),
    PlantedFault(
        "T1 prompt",
        "a collator wrote the labels over",
        "prompt-bears-loss",
        labels_by(lambda tokens, documents, labels: np.where(documents[:, 1:] >= 0, tokens[:, 1:], labels)),
        EXAMPLES,
    ),
    PlantedFault(
        "T2 answer",
        "cut on the right: some answers are lost",
        "answer-not-learned",
        labels_by(lambda tokens, documents, labels: masked_where(np.arange(labels.shape[1]) >= 128, labels)),
        EXAMPLES,
    ),
    PlantedFault(
        "T1 all",
        "prompts masked that should be targets",
        "setting-ignored",
        labels_by(lambda tokens, documents, labels: masked_where(np.arange(labels.shape[1]) < 4, labels)),
        merged(EXAMPLES, {"data": {"loss_on": "all"}}),
    ),
    PlantedFault(
        "T2 right",
        "prompts too long: the end of the answer is cut",
        "answer-not-learned",
        truncated_on_the_right,
        LONG_PROMPTS,
    ),
    PlantedFault(
        "T1 late",
        "half of each prompt was a target",
        "prompt-bears-loss",
        labels_by(
            lambda tokens, documents, labels: np.where(
                (labels < 0)
                & (documents[:, 1:] >= 0)
                & (np.arange(labels.shape[1]) % 2 == 0)
                & (documents[:, 1:] == documents[:, :-1]),
                tokens[:, 1:],
                labels,
            )
        ),
        EXAMPLES,
    ),
    PlantedFault(
        "T3 padding",
        "padding was a target",
        "padding-bears-loss",
        labels_by(lambda tokens, documents, labels: np.where(documents[:, 1:] < 0, tokens[:, 1:], labels)),
        EXAMPLES,
    ),
    PlantedFault(
        "T4 end",
        "the end masked as if it were padding",
        "end-never-learned",
        labels_by(lambda tokens, documents, labels: masked_where(labels == EOS, labels)),
    ),
    PlantedFault(
        "T5 apart",
        "labels made apart from the inputs",
        "labels-not-next-token",
        labels_by(lambda tokens, documents, labels: np.where(labels >= 0, np.roll(labels, 1), labels)),
    ),
    PlantedFault(
        "T5 unshifted",
        "labels not shifted: the model copies",
        "labels-not-next-token",
        labels_by(lambda tokens, documents, labels: np.where(labels >= 0, tokens[:, :-1], labels)),
    ),
    PlantedFault(
        "T5 documents",
        "a document's end predicts the next one",
        "label-crosses-documents",
        labels_by(lambda tokens, documents, labels: np.where(documents[:, 1:] >= 0, tokens[:, 1:], labels)),
    ),
    PlantedFault(
        "T6 rows",
        "the mask hit rows, not tokens",
        "row-without-loss",
        labels_by(
            lambda tokens, documents, labels: masked_where(np.arange(len(labels))[:, None] % 2 == 0, labels)
        ),
    ),
    PlantedFault(
        "T7 marker",
        "the prompt in training has one marker more",
        "prompt-differs",
        encoded_by(lambda ids: np.insert(ids, 1, ids[-2])),
    ),
    PlantedFault(
        "T8 start",
        "decode then encode doubled the start",
        "start-doubled",
        encoded_by(lambda ids: np.insert(ids, 0, ids[0])),
    ),
    PlantedFault(
        "T9 ids",
        "`encode` invents ids",
        "outside its vocabulary",
        tokenizer_by(lambda ids: [*ids, 60_000]),
    ),
    PlantedFault(
        "T9 rows",
        "rows hold ids above the vocabulary",
        "id-outside-vocabulary",
        batches_by(lambda batch: batch._replace(tokens=batch.tokens + 60_000)),
    ),
    PlantedFault(
        "T10 text", "the tokenizer loses text", "the tokenizer loses text", tokenizer_by(lambda ids: ids[1:])
    ),
    PlantedFault(
        "E1 smoothing",
        "perplexity from the smoothed loss",
        "score-not-plain-loss",
        smoothing_in_the_score,
        {"optimizer": {"label_smoothing": 0.1}},
    ),
    PlantedFault(
        "E1 bf16",
        "the same in low precision",
        "score-not-plain-loss",
        smoothing_in_the_score,
        {"optimizer": {"label_smoothing": 0.1}, "train": {"precision": "bf16"}},
    ),
    PlantedFault(
        "M6 attention",
        "dropout of attention ignored",
        "dropout-ignored",
        lambda: attention_by(
            lambda q, k, v, mask, dropout: reference_attention(q, k, v, mask, False, Dropout(0.0))
        ),
    ),
    PlantedFault(
        "M2 window",
        "only the token before is seen",
        "past-invisible",
        lambda: attention_by(
            lambda q, k, v, mask, dropout: reference_attention(
                q, k, v, mask & torch.ones_like(mask).triu(k.size(-2) - q.size(-2) - 1), False, dropout
            )
        ),
    ),
    PlantedFault(
        "M10 moments",
        "resume dropped the optimizer's moments",
        "optimizers/0",
        moments_dropped,
        resumed=True,
    ),
    PlantedFault(
        "M10 random", "resume dropped the random states", "random/", random_states_dropped, resumed=True
    ),
    PlantedFault("M11 weights", "resumed from random weights", "is not what", weights_dropped, resumed=True),
    PlantedFault("M12 NaN", "recovery kept NaN moments", "optimizers/0", moments_not_finite, resumed=True),
    PlantedFault(
        "M13 bf16",
        "bf16 on a GPU without it",
        "precision bf16 was asked for, but GPU of 2018 has none",
        old_gpu,
        {"train": {"precision": "bf16"}},
    ),
    PlantedFault(
        "M7 targets",
        "adapters requested for modules that do not exist",
        "probably meant: c_attn, c_proj",
        settings=TUNED,
        wrong={"lora": {"targets": ("q_proj", "o_proj")}},
    ),
    PlantedFault("M7 unused", "what adapters add was dropped", "differs-from-reference", term_dropped, TUNED),
    PlantedFault(
        "M14 base", "went on with another base", "the base changed since", other_base, TUNED, resumed=True
    ),
    PlantedFault("M7 frozen", "the frozen base moved", "frozen-parameter-moved", base_moved, TUNED),
    PlantedFault(
        "M7 thawed", "the frozen base got gradients", "had a gradient by update 2", base_thawed, TUNED
    ),
    PlantedFault(
        "T11 tokens",
        "added tokens on rows that never train",
        "token-never-trained",
        settings=TUNED,
        wrong={"tokenizer": {"kind": "pretrained", "path": "more-tokens"}},
    ),
    PlantedFault(
        "M8 base", "a base whose ids mean other tokens", "worse-than-unigram", embedding_shuffled, TUNED
    ),
    PlantedFault("M15 scale", "scores were divided twice", "differs-from-reference", scores_divided_twice),
    PlantedFault("E5 echo", "the prompt stayed in the prediction", "prompt-in-prediction", prompt_kept),
    PlantedFault("E7 seed", "sampling without the seed", "sampling-not-repeatable", seed_forgotten),
    PlantedFault(
        "E8 beams", "beam scores were not log-probabilities", "beams-not-by-probability", beams_by_logits
    ),
    PlantedFault("E4 batch", "padded on the right", "batch-differs-from-single", padded_on_the_right),
]


# Faults that need no guard, since the place where they were made cannot make them any more.
PREVENTED = {
    "D5 cache": "data/prepare.py names a store by the content of the data, and compares its fingerprint too",
    "M14 merge": "export.py compares logits before and after, in the format that the base was trained in",
    "E2 best": "the best checkpoint is chosen by the loss that M9 guards",
    "D8 copies": "recipes/degradations.py refuses a way whose results are all another's",
    "D9 scope": "recipes/degradations.py holds a rewrite to its tree, and to the names it may use",
    "D10 licence": "scraping/stages/licences.py compares SPDX identifiers whole, never parts of words",
    "D11 lost": "scraping/ledger.py knows a file by repository and path, and its bytes change with its state",
    "E6 cleaned": "metrics.cleaned is the one cleaner, of predictions and references alike",
    "E9 copying": "suites/scoring.py makes no score without a baseline; beside examples copying stands",
    "E10 interval": "suites/scoring.py gives every score an interval, and each comparison a paired verdict",
    "E11 claim": "eval.py --rescore scores the saved predictions again and names each number that differs",
}
