"""One decoder for every family: norms, positions, attention, MLPs, blocks.

    tokens (B, T) -> embed (B, T, C) -> n_layer blocks -> norm -> hidden (B, T, C) -> head -> logits (B, T, V)

Which parts a model is made of is plain data (`ModelConfig`), looked up once in `__init__` in the small tables
below; `forward` reads straight down. The KV cache belongs to generation and is passed in.

Shapes: B rows, T tokens, C = n_embd, H heads (n_kv_head of them for keys and values), D = head_dim, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from modules.attention import blocked_attention
from modules.dropout import Dropout
from modules.linear import Linear


class Cache(Protocol):
    """Keys and values of the tokens already read, kept by whoever generates."""

    @property
    def length(self) -> int:
        """Tokens held so far, before the call under way."""
        ...

    def extend_documents(self, document_ids: Tensor) -> Tensor | None:
        """Append (B, T) document ids of this call; returns (B, length + T), or None: one document a row."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values (B, H_kv, T, D); returns all, (B, H_kv, length + T, D)."""
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


class LayerNorm(nn.Module):
    """(x - mean) / std, with learned scale and shift where asked for (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, weight: bool, bias: bool):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    return NORMS[config.norm](size, config.norm_eps, config.norm_weight, config.norm_bias)


# --- positions ------------------------------------------------------------------------------------


class SinusoidalPosition(nn.Module):
    """Fixed sines and cosines (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    table: Tensor

    def __init__(self, n_positions: int, size: int):
        super().__init__()
        frequency = torch.exp(torch.arange(0, size, 2).float() * (-math.log(10_000.0) / size))
        angle = torch.arange(n_positions).float()[:, None] * frequency
        table = torch.zeros(n_positions, size)
        table[:, 0::2] = angle.sin()
        table[:, 1::2] = angle.cos()[:, : size // 2]
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]


ABSOLUTE_POSITIONS: dict[str, type[nn.Embedding] | type[SinusoidalPosition]] = {
    "learned": nn.Embedding,
    "sinusoidal": SinusoidalPosition,
}


def rotary_frequency(rotary_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians a position, (rotary_dim / 2), from 1 down to nearly 1 / theta (RoFormer, arXiv:2104.09864)."""
    exponent = torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim
    return 1 / theta**exponent  # rounded as published models were trained with; theta**-exponent differs


def rotary_tables(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, 1, N), of positions (B, T) x frequency (N) or (B, 1, N).

    Always computed in fp32: a bf16 angle is off by whole turns after some hundred positions.
    """
    angle = positions[..., None].float() * frequency
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def scale_none(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    return frequency


def scale_linear(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Positions squeezed together (Chen et al. 2023, arXiv:2306.15595)."""
    return frequency / config.rope_factor


def scale_dynamic(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """NTK scaling by the length of each row's text, (B, 1) -> (B, 1, N) (arXiv:2309.00071, appendix B.2).

    The lowest frequency is divided by `ratio`, the highest kept: a base grown by ratio^(2N / (2N - 2)).
    """
    factor, context = config.rope_factor, config.rope_context
    ratio = factor * longest.clamp(min=context).float() / context - (factor - 1)
    exponent = torch.linspace(0, 1, frequency.numel(), device=frequency.device)
    return frequency * ratio[..., None] ** -exponent


def scale_llama3(frequency: Tensor, config: ModelConfig, longest: Tensor) -> Tensor:
    """Only frequencies with few turns in the first context are divided, with a ramp (arXiv:2407.21783)."""
    turns = config.rope_context * frequency / (2 * math.pi)
    kept = ((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)


ROPE_SCALINGS: dict[str, Callable[[Tensor, ModelConfig, Tensor], Tensor]] = {
    "none": scale_none,
    "linear": scale_linear,
    "dynamic": scale_dynamic,
    "llama3": scale_llama3,
}


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + n/2]) of x (B, T, H, n), as Llama lays them out."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of x (B, T, H, n), as CodeGen lays them out.

    On a CPU as complex numbers, which lie so: every second element by itself takes 2.3 times as long.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # which knows no complex numbers
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
        turned = pairs * torch.complex(cos.to(exact.dtype), sin.to(exact.dtype))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


ROTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "half": rotate_half,
    "interleaved": rotate_interleaved,
}


# --- memory ---------------------------------------------------------------------------------------


NOTHING = nullcontext()


def made_again(
    y: Tensor, thin: bool, function: Callable[..., Tensor], *inputs: Tensor
) -> AbstractContextManager[None]:
    """Inside, and if `thin`, what autograd would keep of y is made again in backward: y = function(*inputs).

    A norm or an activation keeps its input, and a linear that trains or has an adapter keeps its own, which
    is the output of the former. Both are needed in backward, but one is cheap to make of the other.
    """
    return _made_again(y, function, *inputs) if thin and y.requires_grad else NOTHING


@contextmanager
def _made_again(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    device, address, size = y.device.type, y.data_ptr(), y.numel()  # not y: autograd keeps the hooks
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_y = saved.data_ptr() == address and saved.numel() == size and saved.is_contiguous()
        return saved.shape if is_y else saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad(), torch.autocast(device, autocast[1], enabled=autocast[0]):
            return function(*inputs).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# --- attention ------------------------------------------------------------------------------------


def attention_mask(query_documents: Tensor, key_documents: Tensor, window: int = 0) -> Tensor:
    """True where a query may look, (B, 1, T_query, T_key): its own document, at or before itself.

    With a window it sees at most that many tokens, itself included (Longformer, arXiv:2004.05150).

    The queries are the last T_query of the T_key tokens. Padding is a document of its own (-1), so that every
    row of the mask has at least one True and no softmax is taken over nothing.
    """
    n_query, n_key = query_documents.size(1), key_documents.size(1)
    same = query_documents[:, :, None] == key_documents[:, None, :]
    if n_query == 1 and not window:
        return same.unsqueeze(1)
    causal = torch.ones(n_query, n_key, dtype=torch.bool, device=query_documents.device).tril(n_key - n_query)
    if window:
        causal = causal.triu(n_key - n_query - window + 1)
    return (same & causal).unsqueeze(1)


def of_every_head(x: Tensor, n_head: int) -> Tensor:
    """Keys or values (B, K, S, D), each repeated for the n_head / K query heads that share it."""
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: Dropout
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v written out: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
    k, v = (of_every_head(x, q.size(1)) for x in (k, v))
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # A large negative number would make a fully masked row uniform; -inf makes it NaN, seen at once.
        # Added, since all heads share it: to fill the scores takes 5 times as long, and again in backward.
        scores += torch.zeros(mask.shape, dtype=scores.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    weights = F.softmax(scores.float(), dim=-1).to(v.dtype)
    return dropout(weights) @ v


def fast_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: Dropout
) -> Tensor:
    """The same by fused kernels: PyTorch's, or in training on a CPU `blocked_attention`."""
    p = dropout.p if dropout.training else 0.0
    tokens = q.size(-2) if mask is None else mask.size(-2)  # of one token, q holds the heads of a group
    if dropout.training and q.device.type == "cpu" and tokens > 1 and (is_causal or mask is not None):
        return blocked_attention(q, k, v, mask, p)
    k, v = (of_every_head(x, q.size(1)) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=p)


ATTENTIONS = {"reference": reference_attention, "fast": fast_attention}


def split_blocks(qkv: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, ...]:
    """All queries, all keys, all values."""
    widths = [n_head * head_dim, n_kv_head * head_dim, n_kv_head * head_dim]
    return qkv.split(widths, dim=-1)


def split_heads(qkv: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, ...]:
    """Query, key and value of the first head, then of the next: GPTBigCode without multi-query."""
    return qkv.unflatten(-1, (n_head, 3, head_dim)).unbind(-2)


def split_shards(qkv: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, ...]:
    """Four shards, each query, value and key of a quarter of the heads: CodeGen, trained on four cores."""
    shards = qkv.unflatten(-1, (4, 3, n_head // 4, head_dim))
    q, v, k = (part.flatten(-3, -2) for part in shards.unbind(-3))  # the value comes second
    return q, k, v


# The rows of a fused projection stay as published; its output (B, T, 3C) is split to q, k, v, each (B, T, HD)
# or (B, T, H, D). So a weight is loaded byte for byte, and an adapter on it means what it does elsewhere.
QKV_SPLITS: dict[str, Callable[[Tensor, int, int, int], tuple[Tensor, ...]]] = {
    "blocks": split_blocks,
    "heads": split_heads,
    "shards": split_shards,
}


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_causal: bool
    cache: Cache | None
    window_mask: Tensor | None = None  # of layers with a sliding window


class Attention(nn.Module):
    """Multi-head attention; fewer key-value heads give grouped-query (arXiv:2305.13245) and multi-query."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        assert config.attention_dropout is not None, "config.resolved() fills it in"
        self.dropout = Dropout(config.attention_dropout)
        self.rotary_dim = config.rotary_dim
        self.attend = ATTENTIONS[config.attention]
        self.rotate = ROTATIONS[config.rotary_layout]
        widths = [self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim]
        self.split = QKV_SPLITS[config.qkv_layout]
        self.has_window = config.sliding_window > 0 and layer in (config.window_layers or (layer,))
        if config.fused_qkv:
            self.qkv = Linear(config.n_embd, sum(widths), bias=config.qkv_bias)
        else:
            self.q = Linear(config.n_embd, widths[0], bias=config.qkv_bias)
            self.k = Linear(config.n_embd, widths[1], bias=config.qkv_bias)
            self.v = Linear(config.n_embd, widths[2], bias=config.qkv_bias)
        self.project = self._project_fused if config.fused_qkv else self._project_separate
        self.out = Linear(widths[0], config.n_embd, bias=config.attention_bias)
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def _project_fused(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.split(self.qkv(x), self.n_head, self.n_kv_head, self.head_dim)

    def _project_separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.project(x)
        q = self.q_norm(q.view(B, T, self.n_head, self.head_dim))
        k = self.k_norm(k.view(B, T, self.n_kv_head, self.head_dim))
        v = v.view(B, T, self.n_kv_head, self.head_dim)
        if context.rotary is not None:
            q, k = self._rotated(q, context.rotary), self._rotated(k, context.rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        if self.n_kv_head != self.n_head and T == 1:
            # The queries of a group become rows of one head; copies of all keys took 3 ms a step of 8 rows.
            q = q.reshape(B, self.n_kv_head, -1, self.head_dim)
        mask = context.window_mask if self.has_window else context.mask
        y = self.attend(q, k, v, mask, context.is_causal and mask is None, self.dropout)
        y = y.transpose(1, 2) if T > 1 else y  # of one token the heads follow each other already
        return self.out(y.reshape(B, T, self.n_head * self.head_dim))

    def _rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.rotary_dim == self.head_dim:
            return self.rotate(x, *rotary)
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((self.rotate(turned, *rotary), rest), dim=-1)


# --- MLPs -----------------------------------------------------------------------------------------


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (grads[0] * y).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668).

    Its gradient is written out: on a CPU relu(x).square() takes 7 times as long, x * relu(x) 1.6 times.
    """
    return _ReluSquared.apply(x)


GELU_ELEMENTS = 2**18  # at a time: 2 MB in fp32, which stay in the cache


class _GeluTanh(torch.autograd.Function):
    """In bf16 on a CPU, as x * sigmoid(1.6 x + 0.07 x^3) in fp32: half the time of torch's tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        inner, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        flat, y = x.reshape(-1), torch.empty(x.numel(), dtype=x.dtype)
        buffers = torch.empty(2, min(GELU_ELEMENTS, x.numel()), dtype=torch.float32)
        constant = torch.tensor(inner, dtype=torch.float32)
        for start in range(0, x.numel(), GELU_ELEMENTS):
            part = flat[start : start + GELU_ELEMENTS]
            exact, share = buffers[:, : part.numel()]
            exact.copy_(part)
            torch.addcmul(constant, exact, exact, value=inner * cubic, out=share)
            y[start : start + GELU_ELEMENTS] = share.mul_(exact).sigmoid_().mul_(exact)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grads[0], x, approximate="tanh")


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU that GPT-2, StarCoder and CodeGen were trained with."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _GeluTanh.apply(x)
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.activation = activation
        self.thin = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        y = self.activation(x)
        with made_again(y, self.thin, self.activation, x):
            return self.down(y)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), SwiGLU with SiLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.activation = activation
        self.thin = False

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.gate(x), self.up(x)
        opened = self.activation(gate)
        with made_again(opened, self.thin, self.activation, gate):
            y = opened * x
        with made_again(y, self.thin, lambda gate, x: self.activation(gate) * x, gate, x):
            return self.down(y)


MLPS: dict[str, tuple[type[MLP] | type[GatedMLP], Callable[[Tensor], Tensor]]] = {
    "gelu": (MLP, F.gelu),
    "gelu_tanh": (MLP, gelu_tanh),
    "relu2": (MLP, relu_squared),
    "swiglu": (GatedMLP, F.silu),
}


# --- blocks ---------------------------------------------------------------------------------------


class SequentialBlock(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(.)): GPT-2, StarCoder, Llama."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        mlp, activation = MLPS[config.mlp]
        self.attention_norm = build_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp_norm = build_norm(config, config.n_embd)
        self.mlp = mlp(config, activation)
        self.dropout = Dropout(config.dropout or 0.0)
        self.thin = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.attention_norm(x)
        with made_again(y, self.thin, self.attention_norm, x):
            y = self.attention(y, context)
        x = x + self.dropout(y)
        y = self.mlp_norm(x)
        with made_again(y, self.thin, self.mlp_norm, x):
            y = self.mlp(y)
        return x + self.dropout(y)


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both: CodeGen, Phi."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        mlp, activation = MLPS[config.mlp]
        self.norm = build_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp = mlp(config, activation)
        self.dropout = Dropout(config.dropout or 0.0)
        self.thin = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.norm(x)
        with made_again(y, self.thin, self.norm, x):
            attended, fed = self.attention(y, context), self.mlp(y)
        return x + self.dropout(attended) + self.dropout(fed)


BLOCKS: dict[str, type[SequentialBlock] | type[ParallelBlock]] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
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
            into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
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
        elif name.endswith(("attention.out.weight", "mlp.down.weight")) or name == "head.weight":
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
        if config.position in ABSOLUTE_POSITIONS:
            self.position = ABSOLUTE_POSITIONS[config.position](config.block_size, config.n_embd)
        assert config.embed_dropout is not None, "config.resolved() fills it in"
        self.dropout = Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, layer) for layer in range(config.n_layer))
        self.norm = build_norm(config, config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.scale = ROPE_SCALINGS[config.rope_scaling]
        self.checkpoint_activations = False
        self.grown = False  # whether embedding and head of a base got rows more, which no file of it holds
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        INITS[config.init](self)

    def keep_less(self) -> None:
        """Make cheap things again in backward: outputs of norms and activations, dropout's random numbers.

        For a frozen base with adapters it is a third of what backward keeps, at 3% of a step; where weights
        train, their gradients need the inputs of all linears, and whole blocks are made again instead.
        """
        for module in self.modules():
            if isinstance(module, Dropout | MLP | GatedMLP | SequentialBlock | ParallelBlock):
                module.thin = True

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); see `hidden` for the arguments."""
        return self.head(self.hidden(tokens, positions, document_ids, cache))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The residual stream after the last norm, (B, T, C).

        Args:
            tokens: (B, T) ids.
            positions: (B, T) position of each token in its document; None counts from the cache's length.
            document_ids: (B, T); a token sees only its own document. None: one document a row.
            cache: Keys and values of earlier tokens; updated in place.
        """
        B, T = tokens.shape
        past = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device).expand(B, T)
        documents = None  # of the queries and of the keys; None where each row holds one document
        if cache is not None:
            own = torch.zeros_like(tokens) if document_ids is None else document_ids
            seen = cache.extend_documents(own)
            documents = None if seen is None else (own, seen)
        elif document_ids is not None and not torch.equal(document_ids, document_ids[:, :1].expand(B, T)):
            documents = document_ids, document_ids
        config = self.config
        one_document = tokens.new_zeros(1, T), tokens.new_zeros(1, past + T)
        mask = window_mask = None  # the kernels are faster without one
        if documents is not None or (past and T > 1):
            mask = window_mask = attention_mask(*(documents or one_document))
        if 0 < config.sliding_window < past + T:
            window_mask = attention_mask(*(documents or one_document), config.sliding_window)
        x = self.embed(tokens)
        if config.position in ABSOLUTE_POSITIONS:
            if past + T > config.block_size:
                raise ValueError(
                    f"{past + T} tokens do not fit the model's {config.block_size} positions; "
                    "shorten the text or train with a larger model.block_size"
                )
            x = x + self.position(positions)
        x = self.dropout(x)
        rotary = None
        if config.position == "rotary":
            if config.rope_scaling == "dynamic" and cache is not None and past + T > config.rope_context:
                raise ValueError(
                    f"{past + T} tokens pass the context of {config.rope_context}, where dynamic scaling has "
                    "to read each length anew; shorten the text or read it without a cache"
                )
            frequency = rotary_frequency(config.rotary_dim, config.rope_theta, tokens.device)
            frequency = self.scale(frequency, config, positions.amax(dim=1, keepdim=True) + 1)
            rotary = rotary_tables(positions, frequency)
        context = Context(rotary, mask, mask is None and T > 1, cache, window_mask)
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.norm(x)
