"""One decoder for every family: norms, positions, attention, MLPs, blocks.

    tokens (B, T) -> embed (B, T, C) -> n_layer blocks -> norm -> hidden (B, T, C) -> head -> logits (B, T, V)

Which parts a model is made of is plain data (`ModelConfig`), looked up once in `__init__` in the small tables
below; `forward` reads straight down. The KV cache belongs to generation and is passed in.

Shapes: B rows, T tokens, C = n_embd, H heads (n_kv_head of them for keys and values), D = head_dim, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from modules.activations import GeGLUTanh, GeluTanh, ReluSquared, SwiGLU
from modules.attention import ATTENTIONS, QKV_SPLITS, attention_mask
from modules.dropout import Dropout
from modules.linear import Linear
from modules.positions import ABSOLUTE_POSITIONS, ROTATIONS, RotaryTables, refuse_too_long
from modules.products import Products
from modules.recompute import CheapRecompute, run_block, run_checkpointed_block


class Cache(Protocol):
    """Keys and values of the tokens already read, kept by whoever generates."""

    @property
    def length(self) -> int:
        """Tokens that were read before the call under way."""
        ...

    def extend_documents(self, document_ids: Tensor) -> Tensor | None:
        """Append this call's document ids (B, T); return all, (B, length + T), or None for one a row."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values (B, H_kv, T, D); return all, (B, H_kv, length + T, D)."""
        ...


# --- norms ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale if `weight` (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, weight: bool, bias: bool = False):
        super().__init__()
        assert not bias, "config.resolved() refuses this"
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose learned scale is 1 + weight, so that weights begin at 0 (Gemma, arXiv:2403.08295)."""

    def __init__(self, size: int, eps: float, weight: bool, bias: bool = False):
        super().__init__(size, eps, weight, bias)
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return super().forward(x)
        # Not in bf16: there a small weight is lost beside the 1.
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(exact), (self.size,), 1 + self.weight.to(exact), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std, with learned scale and shift where asked for (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, weight: bool, bias: bool):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None and self.bias is not None and self.bias.dtype != x.dtype:
            # A trap: torch tells mixed formats by the weight, and without one its backward pass fails.
            return F.layer_norm(x, (self.size,), eps=self.eps) + self.bias.to(x.dtype)
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "rms_offset": OffsetRMSNorm,
}


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    """Return a norm over the last dimension, which has `size` numbers, of the kind that the settings name."""
    return NORMS[config.norm](size, config.norm_eps, config.norm_weight, config.norm_bias)


# --- attention ------------------------------------------------------------------------------------


class Context(NamedTuple):
    """One forward pass, as every block needs it."""

    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_causal: bool
    cache: Cache | None
    window_mask: Tensor | None = None  # the mask of layers with a sliding window


class Attention(nn.Module):
    """Multi-head attention; fewer key-value heads give grouped-query (arXiv:2305.13245) and multi-query."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        assert config.attention_dropout is not None, "config.resolved() fills it in"
        self.dropout = Dropout(config.attention_dropout)
        self.rotary_dim = config.rotary_dim
        self.rotate = ROTATIONS[config.rotary_layout]
        self.is_rotated = layer not in config.unrotated_layers
        # `attend` divides scores by sqrt(head_dim).
        self.query_scale = config.attention_scale * math.sqrt(config.head_dim) or 1.0
        self.attend = ATTENTIONS[config.attention]
        self.has_window = config.sliding_window > 0 and layer in (config.window_layers or (layer,))
        widths = [self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim]
        if config.fused_qkv:
            self.qkv = Linear(config.n_embd, sum(widths), bias=config.qkv_bias)
        else:
            self.q = Linear(config.n_embd, widths[0], bias=config.qkv_bias)
            self.k = Linear(config.n_embd, widths[1], bias=config.qkv_bias)
            self.v = Linear(config.n_embd, widths[2], bias=config.qkv_bias)
        self.project = self._project_fused if config.fused_qkv else self._project_separate
        self.split = QKV_SPLITS[config.qkv_layout]
        self.out = Linear(widths[0], config.n_embd, bias=config.attention_bias)
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.project(x)
        q = self.q_norm(q.view(B, T, self.n_head, self.head_dim))
        k = self.k_norm(k.view(B, T, self.n_kv_head, self.head_dim))
        v = v.view(B, T, self.n_kv_head, self.head_dim)
        if context.rotary is not None and self.is_rotated:
            q, k = self._rotated(q, context.rotary), self._rotated(k, context.rotary)
        if self.query_scale != 1:
            q = q * self.query_scale
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        mask = context.window_mask if self.has_window else context.mask
        y = self.attend(q, k, v, mask, context.is_causal and mask is None, self.dropout)
        return self.out(y.transpose(1, 2).flatten(2))

    def _project_fused(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.split(self.qkv(x), self.n_head, self.n_kv_head, self.head_dim)

    def _project_separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def _rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.rotary_dim == self.head_dim:
            return self.rotate(x, *rotary)
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((self.rotate(turned, *rotary), rest), dim=-1)


# --- MLPs -----------------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, activation: nn.Module):
        super().__init__()
        self.up = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.activation = activation
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(activation(gate(x), up(x)))."""

    def __init__(self, config: ModelConfig, activation: nn.Module):
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.activation = activation
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x), self.up(x)))


class FusedGatedMLP(nn.Module):
    """down(activation(gate, up)), where gate and up are the halves of one projection."""

    def __init__(self, config: ModelConfig, activation: nn.Module):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.n_inner, bias=config.mlp_bias)
        self.activation = activation
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(*self.gate_up(x).chunk(2, dim=-1)))


MLPS: dict[str, tuple[type[MLP] | type[GatedMLP], type[nn.Module]]] = {
    "gelu": (MLP, nn.GELU),
    "gelu_tanh": (MLP, GeluTanh),
    "relu2": (MLP, ReluSquared),
    "swiglu": (GatedMLP, SwiGLU),
    "geglu_tanh": (GatedMLP, GeGLUTanh),
}


class Router(nn.Module):
    """The scores of experts for each token; their matrix is never stored in fewer bits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_chosen, self.sum_to_one = config.n_chosen, config.chosen_sum_to_one
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.n_embd))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares and the numbers of the experts that are chosen for x (N, C), both (N, K)."""
        scores = F.linear(x, self.weight)
        exact = torch.promote_types(scores.dtype, torch.float32)
        shares, chosen = scores.softmax(-1, dtype=exact).topk(self.n_chosen, dim=-1)
        if self.sum_to_one:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(scores.dtype), chosen


class Experts(nn.Module):
    """The sum of the chosen experts' outputs, each times its share (Shazeer et al. 2017, arXiv:1701.06538).

    Tokens are sorted by expert, so that each expert that is chosen at all is one product of its tokens.
    """

    def __init__(self, config: ModelConfig, activation: nn.Module):
        super().__init__()
        self.router = Router(config)
        self.activation = activation  # one for all
        self.experts = nn.ModuleList(GatedMLP(config, activation) for _ in range(config.n_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        shares, chosen = self.router(flat)
        expert, order = chosen.flatten().sort(stable=True)
        counts = expert.bincount(minlength=len(self.experts)).tolist()
        token = order.div(chosen.size(1), rounding_mode="floor")
        pairs = zip(self.experts, flat[token].split(counts), strict=True)
        found = torch.cat([mlp(part) for mlp, part in pairs if len(part)])
        found = found * shares.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, token, found.to(x.dtype)).view_as(x)


def build_mlp(config: ModelConfig) -> MLP | GatedMLP | FusedGatedMLP | Experts:
    """Return the MLP with the activation that the settings name, or the experts."""
    mlp, activation = MLPS[config.mlp]
    if config.n_experts:
        return Experts(config, activation())
    fuses = config.fused_gate and mlp is GatedMLP
    return (FusedGatedMLP if fuses else mlp)(config, activation())


# --- blocks ---------------------------------------------------------------------------------------


class SequentialBlock(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(.)): GPT-2, StarCoder, Llama."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = build_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp_norm = build_norm(config, config.n_embd)
        self.mlp = build_mlp(config)
        self.dropout = Dropout(config.dropout or 0.0)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, context: Context) -> Tensor:
        attended = self.dropout(self.attention(self.attention_norm(x), context))
        x = torch.add(x, attended, alpha=self.scale)
        return torch.add(x, self.dropout(self.mlp(self.mlp_norm(x))), alpha=self.scale)

    def cheap_modules(self) -> list[nn.Module]:
        """The modules whose outputs are cheap to recompute in backward."""
        return [self.attention_norm, self.mlp_norm, *self.mlp.activation.modules()]


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both: CodeGen, Phi."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm = build_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp = build_mlp(config)
        self.dropout = Dropout(config.dropout or 0.0)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.norm(x)
        attended, fed = self.dropout(self.attention(y, context)), self.dropout(self.mlp(y))
        return torch.add(torch.add(x, attended, alpha=self.scale), fed, alpha=self.scale)

    def cheap_modules(self) -> list[nn.Module]:
        """The modules whose outputs are cheap to recompute in backward."""
        return [self.norm, *self.mlp.activation.modules()]


class TwoNormsBlock(SequentialBlock):
    """x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own: GPT-NeoX."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        attended = self.dropout(self.attention(self.attention_norm(x), context))
        fed = self.dropout(self.mlp(self.mlp_norm(x)))
        return torch.add(torch.add(x, attended, alpha=self.scale), fed, alpha=self.scale)


BLOCKS: dict[str, type[SequentialBlock] | type[ParallelBlock]] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
    "parallel_norms": TwoNormsBlock,
}


# --- initialisation -------------------------------------------------------------------------------


def init_normal(model: Decoder) -> None:
    """N(0, 0.02), projections onto the residual stream divided by sqrt(2 n_layer) (GPT-2).

    That is at base_width; from there a matrix of a block falls with the square root of the width, and the
    head with the width.
    """
    wider = model.config.width_mult
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_residual = name.endswith(("attention.out.weight", ".down.weight"))
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if into_residual else 0.02
            if name.startswith("blocks."):
                std /= math.sqrt(wider)
            elif name.startswith("head."):
                std /= wider
            nn.init.normal_(parameter, std=std)


def init_xavier(model: Decoder) -> None:
    """Xavier uniform on every matrix (Glorot and Bengio 2010); embedding and head N(0, 1 / 4C).

    Logits then have variance 1/4 and the first loss is 1/8 above ln V; at variance 1 it would be 1/2 above.
    That is at base_width; from there the embedding stays as it is, and the head falls with the width.
    """
    wider = model.config.width_mult
    at_base = 0.5 * (model.config.n_embd / wider) ** -0.5
    for name, parameter in model.named_parameters():
        if name.startswith(("embed", "position", "head.weight")):
            nn.init.normal_(parameter, std=at_base / wider if name.startswith("head") else at_base)
        elif parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)


def init_zero_output(model: Decoder) -> None:
    """Every block starts as the identity and the head as uniform: their last matrices are zero.

    The first loss is then exactly ln V. The others are uniform with standard deviation
    1 / sqrt(fan in), and the embedding N(0, 1), since the first norm follows it at once. Where the embedding
    is also the head, a token's own logit is C times its standard deviation, which therefore falls with C:
    0.02 at C = 768 puts the first loss 7 above ln V. All of it is what maximal update parametrisation asks.
    """
    tied_std = min(0.02, 4 / model.config.n_embd)
    for name, parameter in model.named_parameters():
        if name.startswith(("embed", "position")):
            nn.init.normal_(parameter, std=tied_std if model.config.tie_embeddings else 1.0)
        elif name.endswith(("attention.out.weight", ".down.weight")) or name == "head.weight":
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            bound = math.sqrt(3 / parameter.size(1))
            nn.init.uniform_(parameter, -bound, bound)


INITS: dict[str, Callable[[Decoder], None]] = {
    "normal": init_normal,
    "xavier": init_xavier,
    "zero_output": init_zero_output,
}


# --- the model ------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A causal transformer over token ids.

    Args:
        config: The parts and sizes; `config.resolved()` is what `self.config` keeps.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config = config.resolved()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position: nn.Module | None = None
        if config.position in ABSOLUTE_POSITIONS:
            self.position = ABSOLUTE_POSITIONS[config.position](config.block_size, config.n_embd)
        self.rotary = RotaryTables(config) if config.position == "rotary" else None
        assert config.embed_dropout is not None, "config.resolved() fills it in"
        self.dropout = Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, layer) for layer in range(config.n_layer))
        self.norm = build_norm(config, config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.run_block: Callable[[nn.Module, Tensor, Context], Tensor] = run_block
        self.products: Products | None = None  # `speed_up` makes them where a model is opened to generate.
        self.grown = False  # True once a base's embedding and head have rows that no file of it holds.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        INITS[config.init](self)

    def recompute_in_backward(self, what: Literal["nothing", "cheap outputs", "blocks"]) -> None:
        """Choose what backward computes again instead of keeping it; adapters are added before.

        `cheap outputs` are those of norms and activations, and dropout's random numbers.
        """
        cheap = what == "cheap outputs"
        for module in self.modules():
            if isinstance(module, Dropout):
                module.recompute = cheap
        if cheap:
            blocks = [m for m in self.modules() if isinstance(m, SequentialBlock | ParallelBlock)]
            self.run_block = CheapRecompute(m for block in blocks for m in block.cheap_modules())
        else:
            self.run_block = run_checkpointed_block if what == "blocks" else run_block

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return logits (B, T, V); see `hidden` for the arguments."""
        return self.head(self.hidden(tokens, positions, document_ids, cache))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return what the head takes, (B, T, C): the residual stream after the last norm, by `logit_divisor`.

        Args:
            tokens: (B, T) ids.
            positions: (B, T) position of each token in its document; None counts from the cache's length.
            document_ids: (B, T); a token sees only its own document. None: one document a row.
            cache: Keys and values of earlier tokens; updated in place.

        Raises:
            ValueError: The text is longer than the positions that the model has.
        """
        B, T = tokens.shape
        if self.products is not None and not torch.is_grad_enabled():
            self.products.choose(B * T)
        past = cache.length if cache is not None else 0
        refuse_too_long(self.config, past + T, cache is not None)
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device).expand(B, T)
        mask, window_mask = self._masks(tokens, document_ids, cache, past)
        rotary = self.rotary(positions, self.embed.weight.dtype) if self.rotary is not None else None
        context = Context(rotary, mask, mask is None and T > 1, cache, window_mask)
        x = self.embed(tokens)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        if self.position is not None:
            x = x + self.position(positions)
        x = self.dropout(x)
        for block in self.blocks:
            x = self.run_block(block, x, context)
        return self.to_head(self.norm(x))

    def to_head(self, normed: Tensor) -> Tensor:
        """Divide what the head takes by `logit_divisor`, and so the logits: the head is linear."""
        return normed if self.config.logit_divisor == 1 else normed / self.config.logit_divisor

    def _masks(
        self, tokens: Tensor, document_ids: Tensor | None, cache: Cache | None, past: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the masks of full and of windowed layers, (B or 1, 1, T, past + T).

        None means that a query may look at all before it: the kernels are faster without a mask.
        """
        T, window = tokens.size(1), self.config.sliding_window
        documents = None  # ids of the queries and of the keys, where a row holds several documents
        if cache is not None:
            own = torch.zeros_like(tokens) if document_ids is None else document_ids
            known = cache.extend_documents(own)
            documents = None if known is None else (own, known)
        elif document_ids is not None and bool((document_ids != document_ids[:, :1]).any()):
            documents = document_ids, document_ids
        one_document = tokens.new_zeros(1, T), tokens.new_zeros(1, past + T)
        mask = window_mask = None
        if documents is not None or (past and T > 1):
            mask = window_mask = attention_mask(*(documents or one_document))
        if 0 < window < past + T:
            window_mask = attention_mask(*(documents or one_document), window)
        return mask, window_mask
