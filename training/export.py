"""A run's model as a folder or a file that other tools open.

    a model from scratch, or a base trained whole    a Hugging Face folder
    adapters                                         a PEFT folder, for the base that they were trained on
    adapters, with --merge                           a Hugging Face folder with the adapters in its weights
    each but the second, with --gguf                 a file that llama.cpp opens

Merged weights are judged by real text before they are written: the largest gap of a logit between the
adapters beside their base and the merged weights must stay below a tolerance. They are put into the weights
that the adapters were trained on, in the format that those had: a 4-bit base is dequantised.

With --requantise the merged matrices of a 4-bit base are quantised once more, as when PEFT merges into a
4-bit layer, and what is written are the values of that grid, in bf16: every tool opens them, in half the
room, and one that quantises to NF4 what it loads finds the same grid but for rounding. The gap is that of
the very values written. It may be large, since a change below half a step of the grid is lost: --tolerance
accepts it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from architecture import Decoder
from config import refuse_unwritable
from guards.faults import refuse_unknown_faults
from guards.reference.exported import refuse_other_adapter, refuse_other_model
from lora import adapters_disabled, wrappers
from modules.quantized_linear import Linear4bit, dequantize_linears
from pretrained import load_pretrained, save_pretrained
from pretrained.merging import MergeReport, merge, merge_checked, merge_report
from pretrained.save import choose_family, refuse_full
from pretrained.save_gguf import library, save_gguf
from tokenizer import Tokenizer
from training.export_config import ExportConfig
from training.model_card import Exported, metadata_of, write_card
from training.push import push, refuse_push
from training.run import TrainedRun, export_adapter, load_run, open_adapted

PROMPTS, PROMPT_TOKENS = 8, 128
# Real code that is on every machine: the interpreter's own argparse, as it lies beside os.py.
DEFAULT_TEXT = str(Path(os.__file__).with_name("argparse.py"))


def export(settings: ExportConfig) -> str:
    """Write the folder; return what was done, in a sentence or two.

    What was written is opened again by the reference, and gets its name only if it gives the model's logits.

    Raises:
        Fault: It does not, and the difference is not allowed.
        ValueError: The run, base or adapter cannot be opened or do not belong together, no family has the
            model's parts, the merge is not what was trained, or the folder is not empty.
    """
    refuse_unknown_faults(settings.allow)
    refuse_place(settings)
    if settings.merge or settings.gguf:
        judging_text(settings)
    run = None if settings.run is None else load_run(settings.run, settings.which)
    if run is not None:
        model, tokenizer, family = run.model, run.tokenizer, run.family
    else:
        assert settings.base is not None, "parse_settings asks for it"
        if settings.adapter is None:
            found = load_pretrained(settings.base)
        else:
            found = open_adapted(settings.base, settings.adapter, settings.base_format)
        model, tokenizer, family = found.model, found.tokenizer, found.family
    report = ""
    if settings.merge:
        if family is None or (run is None and settings.adapter is None):
            raise ValueError(f"{settings.run or settings.base} has no adapters; leave --merge out")
        if tokenizer is None:
            raise ValueError(f"{settings.base} has no tokenizer, which judging the merge takes")
        report = merged(model, tokenizer, settings)
    elif run is not None and family is not None:
        if settings.gguf:
            raise ValueError(
                f"{settings.run} has adapters, which a GGUF file does not hold; give --merge too"
            )
        return _pushed(_adapter(run, settings), settings)
    model_type = None if family is None else family.model_type
    if settings.gguf:
        return _pushed(report + _gguf(model, tokenizer, model_type, settings), settings)
    assert settings.out is not None, "parse_settings asks for one of both"
    base = settings.base if run is None else run.config.train.base
    kind = choose_family(model.config, model_type).model_type

    def complete(folder: Path) -> None:
        write_card(folder, Exported(model, tokenizer, kind, run, base, report))
        refuse_other_model(folder, model, settings.allow)

    metadata = None if run is None else metadata_of(run)
    save_pretrained(model, tokenizer, settings.out, kind, complete=complete, metadata=metadata)
    return _pushed(f"{report}{kind} model in {settings.out}", settings)


def _pushed(done: str, settings: ExportConfig) -> str:
    """Send what was written to the hub, if that is wanted, and return what was done."""
    if settings.push is None:
        return done
    return f"{done}; it is at {push(Path(str(settings.out or settings.gguf)), settings.push)}"


def refuse_place(settings: ExportConfig) -> None:
    """Refuse a folder that is not empty, a file that is there, and a place out of reach."""
    if settings.push is not None:
        refuse_push(settings.push)
    if settings.gguf:
        if os.path.lexists(settings.gguf):
            raise ValueError(f"{settings.gguf} is there already; name a new file")
        refuse_unwritable(Path(settings.gguf).parent, "--gguf")
        library()
    if settings.out:
        refuse_full(Path(settings.out))
        refuse_unwritable(settings.out, "--out")


def _adapter(run: TrainedRun, settings: ExportConfig) -> str:
    """Write the run's adapter, and return what was done."""
    assert settings.out is not None

    def complete(folder: Path) -> None:
        write_card(folder, Exported(run.model, run.tokenizer, "peft", run, run.config.train.base))
        refuse_other_adapter(folder, run, settings.allow)

    export_adapter(run, settings.out, complete)
    stored_as = run.config.train.base_format
    note = (
        ""
        if stored_as == "fp32"
        else f", stored as {stored_as}: on other weights, as PEFT loads, it is another model"
    )
    return f"the adapter is in {settings.out}; it belongs to {run.config.train.base}{note}"


def _gguf(model: Decoder, tokenizer: Tokenizer | None, model_type: str | None, settings: ExportConfig) -> str:
    """Write a file for llama.cpp, and return what was done, and what rounding did to the loss."""
    assert settings.gguf is not None
    if tokenizer is None:
        raise ValueError(f"{settings.base} has no tokenizer, without which no program can use a GGUF file")

    prompts, losses = prompts_of(model, tokenizer, settings), []

    def complete(path: Path) -> None:
        from guards.llama_server import as_written, refuse_other_answers  # They take gguf, which is optional.
        from guards.reference.exported_gguf import OpenedGguf, refuse_other_gguf

        refuse_other_gguf(path, model, tokenizer, settings.allow)
        losses.append(loss_of(model, prompts))
        losses.append(loss_of(as_written(model, OpenedGguf(path)), prompts))
        refuse_other_answers(path, model, tokenizer, settings.allow)

    written = save_gguf(model, tokenizer, settings.gguf, settings.type, model_type, complete)
    size = Path(settings.gguf).stat().st_size / 2**20
    (before, after), n = losses, sum(len(ids) - 1 for ids in prompts)
    return (
        f"{written.model_type} model in {settings.gguf}, {settings.type}, {size:.1f} MB; its loss is "
        f"{after:.4f} nats a token, {after - before:+.4f} by rounding ({n:,} tokens of "
        f"{judging_text(settings)[0].name})"
    )


def prompts_of(model: Decoder, tokenizer: Tokenizer, settings: ExportConfig) -> list[list[int]]:
    """Return the ids of the text that judges a merge and a rounding, as prompts of equal length."""
    ids = tokenizer.encode(judging_text(settings)[1])
    length = min(PROMPT_TOKENS, model.config.block_size)
    return [ids[start : start + length] for start in range(0, len(ids), length)][:PROMPTS]


@torch.no_grad()
def loss_of(model: Decoder, prompts: list[list[int]]) -> float:
    """Return the mean negative log-likelihood of a prompt's token after its first, in nats."""
    device, total, n = next(model.parameters()).device, 0.0, 0
    for ids in prompts:
        tokens = torch.tensor([ids], device=device)
        logits = model(tokens)[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        n += len(ids) - 1
    return total / max(n, 1)


def judging_text(settings: ExportConfig) -> tuple[Path, str]:
    """Return the file that judges a merge, and its text; ValueError if it cannot be read."""
    path = Path(settings.text or DEFAULT_TEXT)
    try:
        return path, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, whose text should judge the merge, cannot be read: {error}") from None


def merged(model: Decoder, tokenizer: Tokenizer, settings: ExportConfig) -> str:
    """Merge in place, judged by text; return how it went."""
    path, prompts = judging_text(settings)[0], prompts_of(model, tokenizer, settings)
    if settings.requantise:
        report, effect = _requantised(model, prompts, settings.tolerance)
        return f"{report} of {path.name}; the adapter itself moves a logit by up to {effect:.2e}; "
    report = merge_checked(model, prompts, settings.tolerance, keep=False)
    dequantize_linears(model)  # The merge did so with those that have an adapter.
    return f"{report} of {path.name}; "


def _requantised(model: Decoder, prompts: list[list[int]], tolerance: float) -> tuple[MergeReport, float]:
    """Merge in place onto the grid of 4 bits, rounded to bf16, and judge the values that remain.

    Returns:
        The report, and how far the adapter itself moves a logit: a gap as large loses all that it learned.
    """
    if not any(isinstance(module, Linear4bit) for module in model.modules()):
        raise ValueError("the base was not stored in nf4, so that nothing is to be requantised; leave it out")

    def base(tokens: Tensor) -> Tensor:
        with adapters_disabled(model):
            return model(tokens)

    def written(tokens: Tensor) -> Tensor:
        if wrappers(model):
            merge(model, keep=False, requantise=True)
            dequantize_linears(model)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16).float()
        return model(tokens)

    effect = merge_report(model, base, prompts, math.inf).gap
    try:
        report = merge_report(model, written, prompts, tolerance)
    except ValueError as error:
        raise ValueError(
            f"{error}: leave --requantise out, or set --tolerance; the adapter itself moves a logit by up to "
            f"{effect:.3g}"
        ) from None
    model.to(torch.bfloat16)
    return report, effect
