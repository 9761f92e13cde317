"""Compare a LoRA step at published shapes with transformers and PEFT: tokens a second, and peak memory.

    python benchmarks/adapters.py starcoder-small --rows 2
    python benchmarks/adapters.py starcoder --held bf16
    python benchmarks/adapters.py starcoder --held nf4 --recompute      # QLoRA in the least memory
    python benchmarks/adapters.py starcoder-small --curve 100           # its losses beside those of bf16

The weights are random, at the published sizes; rows have 512 random tokens, the first half of each masked
like a prompt. A step is forward, backward, clip and AdamW. Each side runs in a process of its own, and the
two take turns. The output has tokens/s (the median of the steps without the first two) and the peak memory of
each process. Both multiply in bf16 where the machine does so natively, and else in fp32, which is then the
faster one for both: --precision bf16 shows by how much.

The last lines are the limit. The floating-point operations of each side's matrix products are counted in one
more step and divided by the best rate of a product of 2048 x 2048. If the rest of our step took no time, its
rate would be that many times the peer's.

The peer is not padded, and its frozen weights have the precision of its products. Ours is set up as
`python trainingmanager.py --base` does it, with --recompute as by --activation_checkpointing true.

With --curve ours alone trains on the bytes of Python's standard library, from one base: twice with the base
in bf16, from two seeds of the adapters and their dropout, and once with it in nf4 and the first seed, on the
same rows. The output has the losses, and the mean distance of the seeds beside that of the formats.

Figures: docs/figures.md, on two cores with native bf16.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modules.precision import choose_device, choose_precision, keep_freed_memory

STARCODER = {"vocab_size": 49152, "n_positions": 8192, "multi_query": True}
STARCODER |= {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
PHI_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
# Shape -> family, config.json, and rank, alpha, dropout and targets of the adapters.
SHAPES: dict[str, tuple[str, dict[str, Any], tuple[int, int, float, tuple[str, ...]]]] = {
    "starcoder-small": (
        "gpt_bigcode",
        STARCODER | {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072},
        (16, 32, 0.08, ("c_attn", "c_proj")),
    ),
    "starcoder": (
        "gpt_bigcode",
        STARCODER | {"n_embd": 2048, "n_layer": 24, "n_head": 16, "n_inner": 8192},
        (16, 32, 0.08, ("c_attn", "c_proj")),
    ),
    "codegen": (
        "codegen",
        {"vocab_size": 51200, "n_positions": 2048, "n_embd": 1024, "n_layer": 20, "n_head": 16,
         "rotary_dim": 32},
        (8, 32, 0.0, ("wte", "qkv_proj", "out_proj", "fc_in", "fc_out")),
    ),
    "phi": (
        "phi",
        {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
         "num_attention_heads": 32,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
        (16, 32, 0.0, PHI_TARGETS),
    ),
    "llama": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
        (16, 32, 0.05, ("q_proj", "k_proj", "v_proj", "o_proj")),
    ),
}  # fmt: skip


LAYERS = {
    "gpt_bigcode": "n_layer",
    "codegen": "n_layer",
    "phi": "num_hidden_layers",
    "llama": "num_hidden_layers",
}


def peer(shape: str, dtype: torch.dtype) -> tuple[Callable[[torch.Tensor, torch.Tensor], Any], Any, int]:
    """Return the loss of transformers with PEFT, its trained parameters, and its vocabulary size."""
    import peft
    import transformers

    family, values, (r, alpha, dropout, targets) = SHAPES[shape]
    config: Any = transformers.CONFIG_MAPPING[family](**values)
    torch.set_default_dtype(dtype)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    settings = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # transformers shifts the labels itself; ours are shifted already.
        unshifted = torch.cat((labels.new_full((len(labels), 1), -100), labels[:, :-1]), 1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(input_ids=tokens, labels=unshifted, use_cache=False).loss

    return loss, trained, config.vocab_size


def random_model(config: Any, dtype: torch.dtype, weight_format: str | None) -> Any:
    """Return a model with weights of N(0, 0.02), filled tensor by tensor as a loader does it."""
    from torch import nn

    from architecture import Decoder, LayerNorm, RMSNorm
    from modules.quantized_linear import replace_linear

    with torch.device("meta"):
        model = Decoder(replace(config, init="normal"))
    for name, module in list(model.named_modules()):
        for part, p in list(module.named_parameters(recurse=False)):
            value = torch.empty(p.shape, dtype=dtype).normal_(std=0.02)
            if isinstance(module, LayerNorm | RMSNorm) and part == "weight":
                value += 1  # norms around 0 would let no signal through
            if weight_format and part == "weight" and isinstance(module, nn.Linear) and "blocks." in name:
                module = replace_linear(model, name, weight_format, value)
            elif not (name == "head" and part == "weight" and config.tie_embeddings):
                module.register_parameter(part, nn.Parameter(value))
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model


def ours(
    shape: str, dtype: torch.dtype, weight_format: str, recompute: bool = False, seed: int = 0
) -> tuple[Callable[..., Any], Any, int]:
    """Return ours like `peer`; the base is sampled from the current random state, the rest from `seed`."""
    from config import LoraConfig
    from dataset import Batch
    from lora import add_adapter
    from pretrained import FAMILIES
    from pretrained.family import to_model
    from training.loss import token_loss

    family, values, (r, alpha, dropout, targets) = SHAPES[shape]
    config = to_model(FAMILIES[family], values)
    model = random_model(config, dtype, None if weight_format == "auto" else weight_format)
    torch.manual_seed(seed)
    add_adapter(model, LoraConfig(r, alpha, dropout, targets), FAMILIES[family].key)
    model.recompute_in_backward("blocks" if recompute else "cheap outputs")
    model.train()
    keep_freed_memory()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        batch = Batch(tokens, labels, torch.zeros_like(tokens), positions)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = token_loss(model, batch)
        return found.objective / found.tokens

    return loss, [p for p in model.parameters() if p.requires_grad], config.vocab_size


def curve(shape: str, rows: int, length: int, steps: int, weight_format: str, seed: int) -> list[float]:
    """Return our loss of each step."""
    library = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    dtype = choose_precision(choose_device("cpu"), "auto").dtype
    loss, trained, _ = ours(shape, dtype, weight_format, seed=seed)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(stream) - length - 1, (rows,), generator=draw).tolist()
        tokens = torch.stack([stream[start : start + length + 1] for start in starts])
        objective = loss(tokens[:, :-1].contiguous(), tokens[:, 1:].clone())
        objective.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(objective.item())
    return losses


def show_curves(shape: str, rows: int, length: int, steps: int) -> None:
    runs = {"bf16": ("bf16", 1), "bf16, another seed": ("bf16", 2), "nf4": ("nf4", 1)}
    losses = {name: torch.tensor(curve(shape, rows, length, steps, *run)) for name, run in runs.items()}
    print(f"{shape}, {rows} x {length}, losses by step")
    print("  step  " + "  ".join(f"{name:>8}" for name in losses))
    for step in sorted({0, *range(9, steps, 10), steps - 1}):
        print(
            f"{step + 1:6}  " + "  ".join(f"{v[step]:{max(8, len(name))}.4f}" for name, v in losses.items())
        )
    for name, other in list(losses.items())[1:]:
        gap = other - losses["bf16"]
        print(f"{name} less bf16: mean {gap.mean():+.4f}, mean distance {gap.abs().mean():.4f}")


def product_operations(step: Callable[[], object]) -> int:
    """Return the floating-point operations of a step's matrix products, without savings by a causal mask."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def added(_total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten: Any = torch.ops.aten
    on_cpu = aten._scaled_dot_product_flash_attention_for_cpu
    also = {
        aten.addmm_: added,
        on_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=also) as counter:
        step()
    return counter.get_total_flops()


def product_rate(dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of the fastest of some products of 2048 x 2048."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


def worker(
    side: str, shape: str, rows: int, length: int, steps: int, weight_format: str, recompute: bool, asked: str
) -> dict[str, Any]:
    """Return what one side took. Eight parameters: they are the flags of the process that is measured."""
    torch.manual_seed(0)
    dtype = choose_precision(choose_device("cpu"), asked).dtype
    if side == "peer":
        loss, trained, vocabulary = peer(shape, dtype)
    else:
        loss, trained, vocabulary = ours(shape, dtype, weight_format, recompute)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(1)

    def step() -> float:
        tokens = torch.randint(vocabulary, (rows, length + 1), generator=draw)
        tokens, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
        labels[:, : length // 2 - 1] = -100
        started = time.perf_counter()
        loss(tokens, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    for _ in range(2):  # the second still gets much of its memory from the kernel
        step()
    seconds = [step() for _ in range(steps)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "side": side,
        "trained": sum(p.numel() for p in trained),
        "tokens_per_second": rows * length / median(seconds),
        "peak_gb": peak / 2**20,
        "product_gflop": product_operations(step) / 1e9,
        "gflops": product_rate(dtype) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--held", default="auto", choices=("auto", "bf16", "nf4"), help="how ours stores frozen weights"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of both sides")
    parser.add_argument("--side", choices=("peer", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help="ours makes each block again in backward")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the published number, of both")
    parser.add_argument("--curve", type=int, default=0, help="steps of loss curves of ours, in bf16 and nf4")
    asked = parser.parse_args()
    if asked.layers:
        family, values, _ = SHAPES[asked.shape]
        values[LAYERS[family]] = asked.layers
    if asked.curve:
        show_curves(asked.shape, asked.rows, asked.length, asked.curve)
        return
    if asked.side:
        result = worker(
            asked.side, asked.shape, asked.rows, asked.length, asked.steps, asked.held, asked.recompute,
            asked.precision,
        )  # fmt: skip
        print(json.dumps(result))
        return
    results: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
    for turn in range(asked.turns):
        for side in ("peer", "ours") if turn % 2 == 0 else ("ours", "peer"):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(results[side][-1], flush=True)
    assert len({result["trained"] for side in results.values() for result in side}) == 1
    middle = {
        side: {key: median(r[key] for r in found) for key in found[0] if key != "side"}
        for side, found in results.items()
    }
    rate = {side: found["tokens_per_second"] for side, found in middle.items()}
    peak = {side: found["peak_gb"] for side, found in middle.items()}
    print(
        f"{asked.shape}, {asked.rows} x {asked.length}, half masked, frozen weights of ours: {asked.held}"
        + (", blocks recomputed in backward" if asked.recompute else "")
    )
    print(f"transformers + PEFT  {rate['peer']:8.1f} tokens/s  {peak['peer']:5.2f} GB")
    print(f"ours                 {rate['ours']:8.1f} tokens/s  {peak['ours']:5.2f} GB")
    faster, smaller = rate["ours"] / rate["peer"], peak["ours"] / peak["peer"]
    print(f"ratio                {faster:8.2f}           {smaller:5.2f}")
    fastest = max(result["gflops"] for side in results.values() for result in side)
    tokens, least = asked.rows * asked.length, {}
    for side, found in middle.items():
        least[side] = found["product_gflop"] / fastest
        print(
            f"a step of {side}: {found['product_gflop']:,.0f} GFLOP of matrix products, {least[side]:.2f} s "
            f"at {fastest:,.0f} GFLOP/s, {least[side] * rate[side] / tokens:.0%} of its time"
        )
    print(f"the limit of the ratio, ours with nothing but them: {tokens / least['ours'] / rate['peer']:.2f}")


if __name__ == "__main__":
    main()
