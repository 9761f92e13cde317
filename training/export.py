"""A run's model as a folder that other tools open.

    a model from scratch, or a base trained whole    a Hugging Face folder
    adapters                                         a PEFT folder, for the base that they were trained on
    adapters, with --merge                           a Hugging Face folder with the adapters in its weights

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
from pretrained import save_pretrained
from pretrained.merging import MergeReport, merge, merge_checked, merge_report
from pretrained.save import refuse_full
from tokenizer import Tokenizer
from training.export_config import ExportConfig
from training.run import export_adapter, load_run, open_adapted

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
    refuse_full(Path(settings.out))
    refuse_unwritable(settings.out, "--out")
    if settings.merge:
        judging_text(settings)
    if settings.run is not None:
        run = load_run(settings.run, settings.which)
        model, tokenizer, family = run.model, run.tokenizer, run.family
    else:
        assert settings.base is not None and settings.adapter is not None, "parse_settings asks for them"
        found = open_adapted(settings.base, settings.adapter, settings.base_format)
        run, model, tokenizer, family = None, found.model, found.tokenizer, found.family
    if settings.merge:
        if family is None:
            raise ValueError(f"{settings.run} has no adapters; leave --merge out")
        if tokenizer is None:
            raise ValueError(f"{settings.base} has no tokenizer, which judging the merge takes")
        report = merged(model, tokenizer, settings)
    elif run is not None and family is not None:
        export_adapter(run, settings.out, lambda folder: refuse_other_adapter(folder, run, settings.allow))
        stored_as = run.config.train.base_format
        note = (
            ""
            if stored_as == "fp32"
            else f", stored as {stored_as}: on other weights, as PEFT loads, it is another model"
        )
        return f"the adapter is in {settings.out}; it belongs to {run.config.train.base}{note}"
    else:
        report = ""
    written = save_pretrained(
        model,
        tokenizer,
        settings.out,
        None if family is None else family.model_type,
        complete=lambda folder: refuse_other_model(folder, model, settings.allow),
    )
    return f"{report}{written.model_type} model in {settings.out}"


def judging_text(settings: ExportConfig) -> tuple[Path, str]:
    """Return the file that judges a merge, and its text; ValueError if it cannot be read."""
    path = Path(settings.text or DEFAULT_TEXT)
    try:
        return path, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, whose text should judge the merge, cannot be read: {error}") from None


def merged(model: Decoder, tokenizer: Tokenizer, settings: ExportConfig) -> str:
    """Merge in place, judged by text; return how it went."""
    path, text = judging_text(settings)
    ids = tokenizer.encode(text)
    length = min(PROMPT_TOKENS, model.config.block_size)
    prompts = [ids[start : start + length] for start in range(0, len(ids), length)][:PROMPTS]
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
