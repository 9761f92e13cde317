"""Patches of the product, each as a fault had it; `selftest/planted_faults.py` says what each is for."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import architecture
import dataset
import lora
import tokenizer
from adapters import layers
from architecture import Decoder
from config import Config
from data import prepare, tokenstore
from dataset import IGNORE_INDEX
from generation import engine, reading, text
from generation import rows as live_rows
from modules import precision
from modules.attention import reference_attention
from modules.dropout import Dropout
from modules.positions import ROPE_SCALINGS, scale_none
from training import beforehand, begin, loop

Patch = Callable[[], contextlib.AbstractContextManager]


# --- model -------------------------------------------------------------------------------------------


def swapped_axes() -> contextlib.AbstractContextManager:
    hidden = Decoder.hidden

    def wrong(self: Decoder, *args: Any, **options: Any) -> Tensor:
        x = hidden(self, *args, **options)
        return x.transpose(0, 1).reshape(x.shape)  # A flatten hides the swap.

    return patch.object(Decoder, "hidden", wrong)


def scores_divided_twice() -> contextlib.AbstractContextManager:
    attend = architecture.ATTENTIONS["fast"]

    def wrong(q: Tensor, *rest: Any) -> Tensor:
        return attend(q / q.size(-1) ** 0.5, *rest)

    return patch.dict(architecture.ATTENTIONS, fast=wrong)


def attention_by(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor, Dropout], Tensor],
) -> contextlib.AbstractContextManager:
    """Patch attention by a function of (q, k, v, mask, dropout), whose mask is always written out."""

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: Dropout
    ) -> Tensor:
        if mask is None:
            mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril()
        return compute(q, k, v, mask, dropout)

    return patch.dict(architecture.ATTENTIONS, fast=wrong)


def inverted_mask() -> contextlib.AbstractContextManager:
    return attention_by(
        lambda q, k, v, mask, dropout: reference_attention(q, k, v, mask.transpose(-1, -2), False, dropout)
    )


def mask_as_numbers() -> contextlib.AbstractContextManager:
    return attention_by(
        lambda q, k, v, mask, dropout: (
            dropout((q @ k.transpose(-2, -1) / q.size(-1) ** 0.5 + mask.float()).softmax(-1)) @ v
        )
    )


def blind() -> contextlib.AbstractContextManager:
    return attention_by(lambda q, k, v, mask, dropout: v.clone())


def documents_joined() -> contextlib.AbstractContextManager:
    mask = architecture.attention_mask

    def wrong(query_documents: Tensor, key_documents: Tensor) -> Tensor:
        return mask(torch.zeros_like(query_documents), torch.zeros_like(key_documents))

    return patch.object(architecture, "attention_mask", wrong)


def attention_to_nothing() -> contextlib.AbstractContextManager:
    """Hide each token from itself, which leaves the first one nothing to see: NaN."""
    return attention_by(
        lambda q, k, v, mask, dropout: reference_attention(
            q, k, v, mask & torch.ones_like(mask).tril(-1), False, dropout
        )
    )


def padding_seen() -> contextlib.AbstractContextManager:
    mask = architecture.attention_mask

    def wrong(query_documents: Tensor, key_documents: Tensor, *rest: Any) -> Tensor:
        return mask(query_documents, key_documents, *rest) | (key_documents < 0)[:, None, None]

    return patch.object(architecture, "attention_mask", wrong)


def one_token_late() -> contextlib.AbstractContextManager:
    hidden = Decoder.hidden

    def wrong(self: Decoder, *args: Any, **options: Any) -> Tensor:
        x = hidden(self, *args, **options)
        return torch.cat((0 * x[:, :1], x[:, :-1]), 1)

    return patch.object(Decoder, "hidden", wrong)


def positions_unread() -> contextlib.AbstractContextManager:
    """Let the model count the tokens of a row by itself, over the ends of documents."""
    hidden = Decoder.hidden

    def wrong(self: Decoder, tokens: Tensor, positions: Tensor | None = None, *args: Any) -> Tensor:
        return hidden(self, tokens, None, *args)

    return patch.object(Decoder, "hidden", wrong)


def rotation_dropped() -> contextlib.AbstractContextManager:
    return patch.object(architecture.Attention, "_rotated", lambda self, x, tables: x)


def keys_not_rotated() -> contextlib.AbstractContextManager:
    """Rotate queries only: every second call of one attention is for its keys."""
    right, calls = architecture.Attention._rotated, itertools.count()

    def wrong(self: architecture.Attention, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return x if next(calls) % 2 else right(self, x, tables)

    return patch.object(architecture.Attention, "_rotated", wrong)


def one_residual_undropped() -> contextlib.AbstractContextManager:
    """Leave out the dropout of what the MLP adds, in every block but the first."""

    def wrong(self: architecture.SequentialBlock, x: Tensor, context: architecture.Context) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.attention.layer else self.dropout(y))

    return patch.object(architecture.SequentialBlock, "forward", wrong)


def tie_broken() -> contextlib.AbstractContextManager:
    right = Decoder.__init__

    def wrong(self: Decoder, config: Any) -> None:
        right(self, config)
        if config.tie_embeddings:
            self.head.weight = torch.nn.Parameter(self.embed.weight.detach().clone())

    return patch.object(Decoder, "__init__", wrong)


def giant_weights() -> contextlib.AbstractContextManager:
    def wrong(model: Decoder) -> None:
        for p in model.parameters():
            torch.nn.init.normal_(p)

    return patch.dict(architecture.INITS, zero_output=wrong)


# --- training ----------------------------------------------------------------------------------------


def clip_stored_only() -> contextlib.AbstractContextManager:
    clip = torch.nn.utils.clip_grad_norm_
    return patch.object(torch.nn.utils, "clip_grad_norm_", lambda p, limit: clip(p, float("inf")))


def dropout_argument_ignored() -> contextlib.AbstractContextManager:
    return patch.object(Dropout, "forward", lambda self, x: x)


def dropout_in_evaluation() -> contextlib.AbstractContextManager:
    def wrong(self: Dropout, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.p)

    return patch.object(Dropout, "forward", wrong)


def schedule_ignored() -> contextlib.AbstractContextManager:
    return patch.object(loop, "learning_rate_factor", lambda *args: 1.0)


def window_ignored() -> contextlib.AbstractContextManager:
    right = architecture.attention_mask
    return patch.object(architecture, "attention_mask", lambda queries, keys, window=0: right(queries, keys))


def scaling_ignored() -> contextlib.AbstractContextManager:
    return patch.dict(ROPE_SCALINGS, dynamic=scale_none)


def decay_ignored() -> contextlib.AbstractContextManager:
    right = loop.learning_rate_factor
    return patch.object(loop, "learning_rate_factor", lambda c, step, progress: right(c, step, 0.0))


def rates_ignored(**same: float) -> Patch:
    """Return a patch by which the optimizers get these settings in place of the run's."""

    def plant() -> contextlib.AbstractContextManager:
        right = loop.build_optimizers

        def wrong(model: Decoder, config: Any, *args: Any) -> list[torch.optim.Optimizer]:
            return right(model, dataclasses.replace(config, **same), *args)

        return patch.object(loop, "build_optimizers", wrong)

    return plant


def width_forgotten() -> contextlib.AbstractContextManager:
    right = loop.build_optimizers
    return patch.object(loop, "build_optimizers", lambda *args: right(*args[:3]))


def schedule_stopped() -> contextlib.AbstractContextManager:
    right = loop.learning_rate_factor
    return patch.object(
        loop,
        "learning_rate_factor",
        lambda config, step, progress: right(config, min(step, 2), progress),
    )


def gradients_kept() -> contextlib.AbstractContextManager:
    return patch.object(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)


def gradients_summed() -> contextlib.AbstractContextManager:
    """Divide each of two passes by about its own tokens, not by those of both."""
    right = torch.amp.GradScaler.scale
    return patch.object(torch.amp.GradScaler, "scale", lambda self, loss: right(self, loss) * 2)


def optimizers_idle() -> contextlib.AbstractContextManager:
    return patch.object(torch.amp.GradScaler, "step", lambda self, optimizer: None)


def replaced_after_build() -> contextlib.AbstractContextManager:
    right = loop.build_optimizers

    def wrong(model: Decoder, *args: Any) -> list[torch.optim.Optimizer]:
        optimizers = right(model, *args)
        model.embed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
        return optimizers

    return patch.object(loop, "build_optimizers", wrong)


def trained_in_evaluation() -> contextlib.AbstractContextManager:
    right = loop.TrainingManager.update

    def update(self: Any) -> dict[str, float]:
        self.model.eval()  # A validation left it so.
        with patch.object(Decoder, "train", lambda self, mode=True: self):
            return right(self)

    return patch.object(loop.TrainingManager, "update", update)


def one_batch_only() -> contextlib.AbstractContextManager:
    right = dataset.Batches.batch
    return patch.object(dataset.Batches, "batch", lambda self, step: right(self, 0))


def micro_batches_by(number: Callable[[Any, int], int]) -> Patch:
    """Return a patch by which the loop reads batch `number(manager, index)` in the place of each index."""

    def plant() -> contextlib.AbstractContextManager:
        manager = loop.TrainingManager
        right = manager.micro_batch
        return patch.object(manager, "micro_batch", lambda self, index: right(self, number(self, index)))

    return plant


def order_unread() -> contextlib.AbstractContextManager:
    return patch.object(dataset, "order_of", lambda difficulty, kind, draw: draw.permutation(len(difficulty)))


def rarity_inverted() -> contextlib.AbstractContextManager:
    right = loop.difficulties
    return patch.object(loop, "difficulties", lambda store, kind: -right(store, kind))


def half_the_micro_batches() -> contextlib.AbstractContextManager:
    def update(self: Any) -> dict[str, float]:
        first = self.state.step * self.batches.per_update
        return self.update_on([self.micro_batch(first)], self.progress())

    return patch.object(loop.TrainingManager, "update", update)


def part_detached() -> contextlib.AbstractContextManager:
    forward = architecture.MLP.forward
    return patch.object(architecture.MLP, "forward", lambda self, x: forward(self, x).detach())


def validation_of_its_own() -> contextlib.AbstractContextManager:
    sums = loop.sums_of_batches

    def wrong(model: Decoder, batches: Any, precision: Any) -> Any:
        return sums(model, (b._replace(labels=b.labels.roll(1, 1)) for b in batches), precision)

    return patch.object(loop, "sums_of_batches", wrong)


def score_times(factor: float) -> Patch:
    """Return a patch by which validation's sum of nats is wrong by a factor."""

    def plant() -> contextlib.AbstractContextManager:
        right = loop.sums_of_batches

        def wrong(*args: Any) -> Any:
            return [sums._replace(nats=sums.nats * factor) for sums in right(*args)]

        return patch.object(loop, "sums_of_batches", wrong)

    return plant


def smoothing_unread() -> contextlib.AbstractContextManager:
    right = loop.token_loss
    return patch.object(
        loop,
        "token_loss",
        lambda model, batch, smoothing, z_loss: right(model, batch, 0.0, z_loss),
    )


def smoothing_in_the_score() -> contextlib.AbstractContextManager:
    token_loss = loop.token_loss

    def wrong(*args: Any, **options: Any) -> Any:
        result = token_loss(*args, **options)
        return result._replace(cross_entropy=result.objective.detach())

    return patch.object(loop, "token_loss", wrong)


# --- labels and tokens -------------------------------------------------------------------------------


def labels_by(change: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Patch:
    """Return a patch that changes labels (B, T), by their tokens and document ids, each (B, T + 1)."""

    def plant() -> contextlib.AbstractContextManager:
        right = dataset.next_token_labels

        def wrong(tokens: np.ndarray, document_ids: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
            return change(tokens, document_ids, right(tokens, document_ids, *args, **options))

        return patch.object(dataset, "next_token_labels", wrong)

    return plant


def batches_by(change: Callable[[dataset.Batch], dataset.Batch]) -> Patch:
    """Return a patch that changes the batches of training."""

    def plant() -> contextlib.AbstractContextManager:
        right = dataset.Batches.batch
        return patch.object(dataset.Batches, "batch", lambda self, step: change(right(self, step)))

    return plant


def masked_where(chosen: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.where(chosen, IGNORE_INDEX, labels)


EOS = 2  # The id of the end in tokenizers that are trained here.


def encoded_by(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """Return a patch that changes the stored ids of a document, start and end included."""

    def plant() -> contextlib.AbstractContextManager:
        right = tokenstore._encode

        def wrong(*args: Any) -> Any:
            return [one._replace(ids=change(one.ids)) for one in right(*args)]

        return patch.object(tokenstore, "_encode", wrong)

    return plant


def tokenizer_by(change: Callable[[list[int]], list[int]]) -> Patch:
    def plant() -> contextlib.AbstractContextManager:
        right = tokenizer.CodeTokenizer.encode
        return patch.object(tokenizer.CodeTokenizer, "encode", lambda self, text: change(right(self, text)))

    return plant


def padded_on_the_right() -> contextlib.AbstractContextManager:
    right = reading.pad_left

    def wrong(*args: Any, **options: Any) -> Any:
        return tuple(t.flip(1) if isinstance(t, Tensor) else t for t in right(*args, **options))

    return patch.object(reading, "pad_left", wrong)


def seed_forgotten() -> contextlib.AbstractContextManager:
    def wrong(seed: int, row: int) -> torch.Generator:
        generator = torch.Generator()
        generator.seed()
        return generator

    return patch.object(engine, "row_generator", wrong)


def beams_by_logits() -> contextlib.AbstractContextManager:
    def wrong(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        return logits.double()

    functional = types.SimpleNamespace(**vars(torch.nn.functional) | {"log_softmax": wrong})
    return patch.object(live_rows, "F", functional)


def prompt_kept() -> contextlib.AbstractContextManager:
    return patch.object(text, "added_text", lambda tokenizer, before, ids: tokenizer.decode(before + ids))


def moments_dropped() -> contextlib.AbstractContextManager:
    return patch.object(torch.optim.Optimizer, "load_state_dict", lambda self, values: None)


def random_states_dropped() -> contextlib.AbstractContextManager:
    return patch.object(loop, "set_random_states", lambda states, device: None)


def weights_dropped() -> contextlib.AbstractContextManager:
    return patch.object(loop, "load_weights", lambda model, manifest: None)


def moments_not_finite() -> contextlib.AbstractContextManager:
    right = torch.optim.Optimizer.load_state_dict

    def wrong(self: torch.optim.Optimizer, values: dict[str, Any]) -> None:
        right(self, values)
        for state in self.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim():
                    value.fill_(float("nan"))

    return patch.object(torch.optim.Optimizer, "load_state_dict", wrong)


def old_gpu() -> contextlib.AbstractContextManager:
    """Claim a GPU that does not multiply bf16; nothing is computed on it."""
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(beforehand, "choose_device", lambda name: torch.device("cuda")))
    stack.enter_context(patch.object(precision, "has_native_bf16", lambda device: False))
    stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda device: "GPU of 2018"))
    return stack


# --- a base and its adapters -------------------------------------------------------------------------


def adapters_not_dropped() -> contextlib.AbstractContextManager:
    return patch.object(layers.LowRank, "sample_mask", lambda self: None)


def term_dropped() -> contextlib.AbstractContextManager:
    """Drop what the MLP's adapters add, and no others: without any, autograd itself would complain."""
    right = lora.linear_with_term

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if weight.size(1) > weight.size(0):
            return torch.nn.functional.linear(x, weight, bias)
        return right(x, weight, bias, *rest)

    return patch.object(lora, "linear_with_term", wrong)


def other_base() -> contextlib.AbstractContextManager:
    right = begin.open_base

    def wrong(config: Config, *args: Any) -> Any:
        base = str(Path(str(config.train.base)).with_name("other-base"))
        return right(dataclasses.replace(config, train=dataclasses.replace(config.train, base=base)), *args)

    return patch.object(begin, "open_base", wrong)


def base_moved(sound: int = 0) -> contextlib.AbstractContextManager:
    """Move a frozen weight in every update after the first `sound`."""
    right = loop.build_optimizers

    def wrong(model: Decoder, *args: Any) -> list[torch.optim.Optimizer]:
        updates = itertools.count()

        def move(*args: Any) -> None:
            if next(updates) < sound:
                return
            # Weight decay of frozen parameters does so; 0.999 would be rounded away in bf16.
            model.embed.weight.data.mul_(0.99)

        optimizers = right(model, *args)
        optimizers[0].register_step_post_hook(move)
        return optimizers

    return patch.object(loop, "build_optimizers", wrong)


def base_thawed() -> contextlib.AbstractContextManager:
    right = loop.build_optimizers

    def wrong(model: Decoder, *args: Any) -> list[torch.optim.Optimizer]:
        optimizers = right(model, *args)

        def thaw(*args: Any) -> None:
            model.blocks.requires_grad_(True)

        optimizers[0].register_step_post_hook(thaw)
        return optimizers

    return patch.object(loop, "build_optimizers", wrong)


def embedding_shuffled() -> contextlib.AbstractContextManager:
    right = begin.starting_model

    def wrong(*args: Any) -> Decoder:
        model = right(*args)
        weight = model.embed.weight.data
        weight.copy_(weight.flip(0))
        return model

    return patch.object(begin, "starting_model", wrong)


def splits_read(*splits: str) -> Patch:
    """Return a patch by which these splits are opened as train, validation and test."""

    def plant() -> contextlib.AbstractContextManager:
        def wrong(folder: Path) -> Any:
            return tuple(tokenstore.TokenStore(folder, split) for split in splits)

        return patch.object(prepare, "open_store", wrong)

    return plant


def truncated_on_the_right() -> contextlib.AbstractContextManager:
    right = dataset.shown

    def wrong(store: tokenstore.TokenStore, block_size: int) -> dataset.Shown:
        rows = right(store, block_size)
        return rows._replace(prompt_length=store.prompt_lengths, left=np.zeros_like(rows.left))

    return patch.object(dataset, "shown", wrong)
