"""The decoder's shape and parts as plain values, and the check that they can be built."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin

from config.setting import REFUSED, refuse_out_of_range, setting
from config.typed import field_types
from config.uses import (
    CONTEXT_SCALINGS,
    FROM_SCRATCH,
    FUSED_QKV,
    GATED,
    ROPE_BY_CONTEXT,
    ROPE_LLAMA3,
    ROPE_LONG,
    ROPE_SCALED,
    ROPE_SHARPENED,
    ROPE_YARN,
    ROTARY,
    ROUTED,
    WINDOWED,
)

# Where one of these is not given, the first stands for it.
DROPOUTS = ("dropout", "embed_dropout", "attention_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and parts. `resolved()` fills in what is 0 and refuses what cannot be built.

    Args:
        vocab_size: Rows of the embedding; 0 takes the tokenizer's.
        block_size: Tokens in a training row, and the most positions a learned or sinusoidal table holds.
        n_layer: Blocks.
        n_head: Query heads.
        n_kv_head: Key and value heads, a divisor of n_head; 0 means n_head, 1 is multi-query.
        n_embd: Width of the residual stream.
        head_dim: Width of a head; 0 means n_embd / n_head.
        n_inner: Width of the MLP, or of each expert; 0 means 4 n_embd.
        block: `sequential`, `parallel` (one norm for attention and MLP) or `parallel_norms` (a norm each).
        norm: `rms`, `layer`, or `rms_offset`, whose learned scale is 1 + weight (Gemma).
        norm_eps: Number added to the variance.
        norm_weight: Norms have a learned scale.
        norm_bias: Norms have a learned shift.
        position: `rotary`, `learned`, `sinusoidal` or `none`.
        rotary_dim: Leading dimensions of a head that are rotated; 0 means all.
        rotary_layout: `half` (Llama) or `interleaved` (CodeGen) pairs.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How rotary frequencies reach past `rope_context`: `none`, `linear` (arXiv:2306.15595),
            `dynamic` (by the last position of a row, arXiv:2309.00071 appendix B.2), `llama3`
            (arXiv:2407.21783), `yarn` (arXiv:2309.00071) or `longrope` (by the last position of a row,
            arXiv:2402.13753).
        rope_factor: How many times as far as `rope_context`, at least 1.
        rope_context: Tokens of the context the model was first trained on; 0 means block_size.
        rope_low_freq: `llama3` divides frequencies with fewer turns than this in the first context.
        rope_high_freq: `llama3` leaves frequencies with more turns than this as they are.
        rope_beta_fast: `yarn` leaves frequencies with more turns than this in the first context as they are.
        rope_beta_slow: `yarn` divides frequencies with fewer turns than this.
        rope_truncate: `yarn` rounds the numbers of these two frequencies outwards.
        rope_attention: Factor of rotated queries and of rotated keys; 0 takes that of the scaling's paper:
            0.1 ln(rope_factor) + 1, or with `longrope` sqrt(1 + ln(block_size / rope_context) /
            ln(rope_context)).
        rope_short: `longrope` divides each frequency by its number here in rows of up to rope_context tokens.
        rope_long: By these it divides in longer rows.
        unrotated_layers: Layers without rotation (NoPE, arXiv:2501.18795), counted from 0.
        sliding_window: A token sees itself and the sliding_window - 1 tokens before it; 0 means all before.
        window_layers: Layers with the sliding window, counted from 0; none named means all.
        mlp: `gelu`, `gelu_tanh`, `relu2`, or with a gate `swiglu` or `geglu_tanh`.
        fused_gate: One projection for the gate and what it multiplies.
        n_experts: MLPs in a block, of which a router chooses some for each token (arXiv:1701.06538); 0 means
            one MLP for all. Only a base brings experts: nothing here balances those that are trained anew.
        n_chosen: How many experts are chosen for a token.
        chosen_sum_to_one: The shares of the chosen experts are divided by their sum.
        qk_norm: Normalise the queries and keys of each head by a `norm`, before they are rotated
            (arXiv:2010.04245).
        fused_qkv: One projection for query, key and value.
        qkv_layout: Order of the fused projection's rows: `blocks` (all queries, keys, values), `heads`
            (query, key, value of each head in turn: GPTBigCode), `shards` (query, value and key of a
            quarter of the heads at a time: CodeGen) or `shards8` (of an eighth: CodeGen2).
        qkv_bias: Bias in the query, key and value projections.
        attention_bias: Bias in attention's output projection.
        mlp_bias: Bias in the MLP.
        head_bias: Bias in the head.
        embed_scale: Factor of the embedding's rows.
        residual_scale: Factor of what attention and MLP add to the residual stream.
        attention_scale: Factor of the scores of attention; 0 means 1 / sqrt(head_dim).
        logit_divisor: The logits are divided by this.
        tie_embeddings: The head shares the embedding's weight.
        dropout: Dropout after the embedding, on attention weights, and on each block's outputs; none given
            means 0, or that of `base`.
        embed_dropout: Dropout after the embedding alone; none given means `dropout`.
        attention_dropout: Dropout on attention weights alone; none given means `dropout`.
        attention: `fast` (fused kernels) or `reference` (written out).
        init: First weights; biases begin at 0, and norms at 1. `normal`: all N(0, 0.02), a number being the
            standard deviation; the matrices whose output is added to the residual stream are divided by
            sqrt(2 n_layer). `xavier`: uniform up to sqrt(6 / (inputs + outputs)); embedding, positions and
            head N(0, 1 / (2 sqrt(n_embd))). `zero_output`: head, and what is added to the residual stream,
            0; embedding and positions N(0, 1), with a tied head N(0, min(0.02, 4 / n_embd)); others uniform
            up to sqrt(3 / inputs).
        base_width: The n_embd at which the learning rates and the initialisation were found, which are then
            carried over to this n_embd by maximal update parametrisation (arXiv:2203.03466): AdamW's rates
            for blocks' matrices and the head fall with the width, initial weights of the head too, and those
            of blocks' matrices with its square root. Raise n_head with n_embd, so that head_dim stays, and
            n_inner if set.
            0 takes them as they are.
    """

    vocab_size: int = setting(0, at_least=0, at_most=2**24, compared=False, on_resume=REFUSED)
    block_size: int = setting(256, at_least=2, at_most=2**24, compared=False, on_resume=REFUSED)
    n_layer: int = setting(4, at_least=1, at_most=10_000, on_resume=REFUSED)
    n_head: int = setting(3, at_least=1, at_most=2**20, on_resume=REFUSED)
    n_kv_head: int = setting(0, at_least=1, or_zero=True, on_resume=REFUSED)
    n_embd: int = setting(192, at_least=1, at_most=2**20, on_resume=REFUSED)
    head_dim: int = setting(0, at_least=1, at_most=2**20, or_zero=True, on_resume=REFUSED)
    n_inner: int = setting(0, at_least=1, at_most=2**22, or_zero=True, on_resume=REFUSED)
    block: Literal["sequential", "parallel", "parallel_norms"] = setting("sequential", on_resume=REFUSED)
    norm: Literal["rms", "layer", "rms_offset"] = setting("layer", on_resume=REFUSED)
    norm_eps: float = setting(1e-6, above=0, on_resume=REFUSED)
    norm_weight: bool = setting(False, on_resume=REFUSED)
    norm_bias: bool = setting(False, on_resume=REFUSED)
    position: Literal["rotary", "learned", "sinusoidal", "none"] = setting("rotary", on_resume=REFUSED)
    rotary_dim: int = setting(0, at_least=1, or_zero=True, used=(ROTARY,), on_resume=REFUSED)
    rotary_layout: Literal["half", "interleaved"] = setting("half", used=(ROTARY,), on_resume=REFUSED)
    rope_theta: float = setting(10_000.0, above=0, used=(ROTARY,), on_resume=REFUSED)
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = setting(
        "none", used=(ROTARY,), on_resume=REFUSED
    )
    rope_factor: float = setting(1.0, at_least=1, used=(ROPE_SCALED,), on_resume=REFUSED)
    rope_context: int = setting(
        0, at_least=1, at_most=2**32, or_zero=True, used=(ROPE_BY_CONTEXT,), compared=False, on_resume=REFUSED
    )
    rope_low_freq: float = setting(1.0, above=0, used=(ROPE_LLAMA3,), compared=False, on_resume=REFUSED)
    rope_high_freq: float = setting(4.0, above=0, used=(ROPE_LLAMA3,), compared=False, on_resume=REFUSED)
    rope_beta_fast: float = setting(
        32.0, above=0, used=(ROPE_YARN,), before=32.0, compared=False, on_resume=REFUSED
    )
    rope_beta_slow: float = setting(
        1.0, above=0, used=(ROPE_YARN,), before=1.0, compared=False, on_resume=REFUSED
    )
    rope_truncate: bool = setting(True, used=(ROPE_YARN,), before=True, compared=False, on_resume=REFUSED)
    rope_attention: float = setting(
        0.0, above=0, or_zero=True, used=(ROPE_SHARPENED,), before=0.0, compared=False, on_resume=REFUSED
    )
    rope_short: tuple[float, ...] = setting(
        (), used=(ROPE_LONG,), before=(), compared=False, on_resume=REFUSED
    )
    rope_long: tuple[float, ...] = setting(
        (), used=(ROPE_LONG,), before=(), compared=False, on_resume=REFUSED
    )
    unrotated_layers: tuple[int, ...] = setting(
        (), used=(ROTARY,), before=(), compared=False, on_resume=REFUSED
    )
    sliding_window: int = setting(0, at_least=1, at_most=2**32, or_zero=True, on_resume=REFUSED)
    window_layers: tuple[int, ...] = setting((), used=(WINDOWED,), compared=False, on_resume=REFUSED)
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu_tanh"] = setting("gelu", on_resume=REFUSED)
    fused_gate: bool = setting(False, used=(GATED,), before=False, on_resume=REFUSED)
    n_experts: int = setting(
        0, at_least=2, at_most=2**12, or_zero=True, before=0, compared=False, on_resume=REFUSED
    )
    n_chosen: int = setting(
        1, at_least=1, at_most=2**12, used=(ROUTED,), before=1, compared=False, on_resume=REFUSED
    )
    chosen_sum_to_one: bool = setting(False, used=(ROUTED,), before=False, compared=False, on_resume=REFUSED)
    qk_norm: bool = setting(True, on_resume=REFUSED)
    fused_qkv: bool = setting(False, on_resume=REFUSED)
    qkv_layout: Literal["blocks", "heads", "shards", "shards8"] = setting(
        "blocks", used=(FUSED_QKV,), on_resume=REFUSED
    )
    qkv_bias: bool = setting(False, on_resume=REFUSED)
    attention_bias: bool = setting(False, on_resume=REFUSED)
    mlp_bias: bool = setting(False, on_resume=REFUSED)
    head_bias: bool = setting(False, on_resume=REFUSED)
    embed_scale: float = setting(1.0, above=0, before=1.0, on_resume=REFUSED)
    residual_scale: float = setting(1.0, above=0, before=1.0, on_resume=REFUSED)
    attention_scale: float = setting(0.0, above=0, or_zero=True, before=0.0, on_resume=REFUSED)
    logit_divisor: float = setting(1.0, above=0, before=1.0, on_resume=REFUSED)
    tie_embeddings: bool = setting(False, on_resume=REFUSED)
    dropout: float | None = setting(None, at_least=0, below=1, on_resume=REFUSED)
    embed_dropout: float | None = setting(None, at_least=0, below=1, on_resume=REFUSED)
    attention_dropout: float | None = setting(None, at_least=0, below=1, on_resume=REFUSED)
    attention: Literal["fast", "reference"] = setting("fast", compared=False, on_resume=REFUSED)
    init: Literal["normal", "xavier", "zero_output"] = setting("zero_output", on_resume=REFUSED)
    base_width: int = setting(
        0, at_least=1, or_zero=True, used=(FROM_SCRATCH,), before=0, compared=False, on_resume=REFUSED
    )

    @property
    def width_mult(self) -> float:
        """How many times as wide as base_width the model is (muP's width multiplier, arXiv:2203.03466)."""
        return self.n_embd / self.base_width if self.base_width else 1.0

    @property
    def rotates_by_length(self) -> bool:
        """Whether the rotation of a token depends on the length of its row, so that keys cannot be kept."""
        return self.position == "rotary" and self.rope_scaling in ("dynamic", "longrope")

    def resolved(self) -> ModelConfig:
        """Return the config with every 0 filled in.

        Raises:
            ValueError: The shape cannot be built; the sentence says why and what to change.
        """
        self._refuse_values()
        head_dim = self.head_dim or self.n_embd // self.n_head
        n_kv_head = self.n_kv_head or self.n_head
        rotary_dim = self.rotary_dim or head_dim
        self._refuse_heads(head_dim, n_kv_head, rotary_dim)
        if self.base_width and self.tie_embeddings:
            raise ValueError(
                f"model.base_width is {self.base_width} and model.tie_embeddings true: across widths an "
                "embedding and a head learn at other rates; set model.tie_embeddings to false"
            )
        self._refuse_positions(rotary_dim)
        self._refuse_experts()
        self._refuse_qkv_layout(n_kv_head)
        # Where nothing reads rope_context it stays 0: a run whose config sets what nothing reads is refused.
        context = self.rope_context or (self.rope_scaling in CONTEXT_SCALINGS) * self.block_size
        return replace(
            self,
            head_dim=head_dim,
            n_kv_head=n_kv_head,
            # One spelling: of two settings that mean the same, one would pass for a key that nothing reads.
            attention_scale=self.attention_scale if self.attention_scale != head_dim**-0.5 else 0.0,
            rotary_dim=rotary_dim if self.position == "rotary" else 0,
            n_inner=self.n_inner or 4 * self.n_embd,
            rope_context=context,
            rope_attention=self.rope_attention or self._rope_attention(context),
            **self._dropouts(),
        )

    def _refuse_values(self) -> None:
        """Raise ValueError for a value out of range, or a shift of a norm that has none."""
        if self.vocab_size < 1:  # As a setting it may be 0, until there is a tokenizer.
            raise ValueError(f"model.vocab_size is {self.vocab_size}; it must be at least 1")
        refuse_out_of_range("model", self)
        for name, kind in field_types(ModelConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}; it must be one of {get_args(kind)}"
                )
        if self.norm != "layer" and self.norm_bias:
            raise ValueError(
                f"model.norm {self.norm} has no shift; set model.norm_bias to false or model.norm to layer"
            )

    def _refuse_heads(self, head_dim: int, n_kv_head: int, rotary_dim: int) -> None:
        """Raise ValueError for heads that do not divide the width or each other, or cannot be rotated."""
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}; "
                "change one of them or set model.head_dim"
            )
        if self.n_head % n_kv_head:
            raise ValueError(f"model.n_head {self.n_head} is not a multiple of model.n_kv_head {n_kv_head}")
        if self.position == "rotary" and not self.rotary_dim and head_dim % 2:
            whence = (
                "" if self.head_dim else f", which is model.n_embd {self.n_embd} / model.n_head {self.n_head}"
            )
            raise ValueError(
                f"a head has {head_dim} dimensions{whence}, and rotary positions turn them in pairs: make "
                "that even, or set model.rotary_dim"
            )
        if self.position == "rotary" and (rotary_dim > head_dim or rotary_dim % 2):
            raise ValueError(
                f"model.rotary_dim {rotary_dim} must be even and at most the head's {head_dim} dimensions"
            )

    def _refuse_positions(self, rotary_dim: int) -> None:
        """Raise ValueError for a scaling of rotary frequencies, or a window, that has no meaning."""
        if self.rope_scaling == "dynamic" and rotary_dim < 4:
            raise ValueError(
                f"model.rope_scaling dynamic needs at least 4 rotated dimensions, not {rotary_dim}; "
                "set model.rotary_dim or another scaling"
            )
        if self.rope_scaling == "llama3" and self.rope_low_freq >= self.rope_high_freq:
            raise ValueError(
                f"model.rope_low_freq {self.rope_low_freq} must be above 0 and below "
                f"model.rope_high_freq {self.rope_high_freq}"
            )
        if self.rope_scaling == "yarn" and (
            self.rope_beta_slow >= self.rope_beta_fast or self.rope_theta <= 1
        ):
            raise ValueError(
                f"model.rope_scaling yarn needs a model.rope_theta above 1, not {self.rope_theta}, and a "
                f"model.rope_beta_slow below model.rope_beta_fast, not {self.rope_beta_slow} and "
                f"{self.rope_beta_fast}"
            )
        if self.rope_scaling == "longrope":
            self._refuse_long_factors(rotary_dim)
        for key in ("window_layers", "unrotated_layers"):
            layers: tuple[int, ...] = getattr(self, key)
            if any(not 0 <= layer < self.n_layer for layer in layers):
                raise ValueError(
                    f"model.{key} {list(layers)} must be among the {self.n_layer} layers "
                    f"0 to {self.n_layer - 1}"
                )

    def _refuse_experts(self) -> None:
        """Raise ValueError for experts that cannot be chosen, or are not MLPs with a gate of their own."""
        if not self.n_experts:
            return
        if self.n_chosen > self.n_experts:
            raise ValueError(
                f"model.n_chosen is {self.n_chosen}, and there are {self.n_experts} experts; lower it"
            )
        if self.mlp not in ("swiglu", "geglu_tanh") or self.fused_gate or self.mlp_bias:
            raise ValueError(
                f"model.n_experts is {self.n_experts}; experts have model.mlp swiglu or geglu_tanh, and "
                "neither model.fused_gate nor model.mlp_bias"
            )

    def _refuse_long_factors(self, rotary_dim: int) -> None:
        """Raise ValueError for factors of `longrope` that are not one positive number for each frequency."""
        for key in ("rope_short", "rope_long"):
            factors: tuple[float, ...] = getattr(self, key)
            if len(factors) != rotary_dim // 2 or not all(0 < number < math.inf for number in factors):
                raise ValueError(
                    f"model.{key} has {len(factors)} numbers; with {rotary_dim} rotated dimensions it must "
                    f"have {rotary_dim // 2}, each above 0"
                )
        if (self.rope_context or self.block_size) < 2:
            raise ValueError("model.rope_context is 1; model.rope_scaling longrope needs at least 2")

    def _rope_attention(self, context: int) -> float:
        """Return the factor that the paper of a scaling gives; 0 where the scaling has none."""
        if self.rope_scaling == "yarn":
            return 0.1 * math.log(self.rope_factor) + 1
        if self.rope_scaling == "longrope":
            reached = max(1.0, self.block_size / context)
            return math.sqrt(1 + math.log(reached) / math.log(context))
        return 0.0

    def _refuse_qkv_layout(self, n_kv_head: int) -> None:
        """Raise ValueError for heads that the layout of a fused projection cannot hold."""
        if self.fused_qkv and self.qkv_layout != "blocks" and n_kv_head != self.n_head:
            raise ValueError(
                f"model.qkv_layout {self.qkv_layout} has as many key heads as query heads, not {n_kv_head} "
                f"and {self.n_head}; set model.qkv_layout to blocks"
            )
        shards = {"shards": 4, "shards8": 8}.get(self.qkv_layout, 1)
        if self.fused_qkv and self.n_head % shards:
            raise ValueError(
                f"model.qkv_layout {self.qkv_layout} needs a model.n_head that {shards} divides, "
                f"not {self.n_head}; "
                "set model.qkv_layout to blocks"
            )

    def _dropouts(self) -> dict[str, float]:
        """Return every dropout probability; one that is not given is `dropout`, or 0."""
        return {
            name: (self.dropout or 0.0) if getattr(self, name) is None else getattr(self, name)
            for name in DROPOUTS
        }
