"""The command that generates text: it opens the model, reads the prompts and writes the completions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from architecture import Decoder
from config.console import printable
from generation.settings import CommandConfig, OpeningConfig, WeightsConfig
from generation.text import generate
from modules.precision import DTYPES, choose_device
from modules.products import speed_up
from modules.quantized_linear import INTEGERS, hold
from pretrained import load_pretrained
from tokenization.chat import Message, asked_ids
from tokenization.healing import Prompt
from tokenization.turn_end import end_turns
from tokenizer import Tokenizer
from training.run import TrainedRun, hold_run, load_run, open_adapted


class Opened(NamedTuple):
    """A model that was opened to write text, and the run that it is of, if it is of one."""

    model: Decoder
    tokenizer: Tokenizer
    run: TrainedRun | None = None


def open_model(settings: WeightsConfig) -> tuple[Decoder, Tokenizer]:
    """Return the model and tokenizer of `opened`."""
    return opened(settings)[:2]


def opened(settings: WeightsConfig) -> Opened:
    """Open the model and tokenizer of --model, on the requested device and in the requested dtype.

    On a CPU its products are measured, so that it generates fast (`modules/products.py`).

    Raises:
        ValueError: There is no such model, it cannot be read, or it has no tokenizer.
    """
    adapter = settings.adapter if isinstance(settings, OpeningConfig) else ""
    device = choose_device(settings.device)
    folder = Path(settings.model)
    if folder.is_dir() and not (folder / "config.json").exists():
        found = _open_run(settings, folder, device, adapter)
    else:
        found = _open_published(settings, device, adapter)
    if device.type == "cpu":
        speed_up(found.model)
    return found


def _dtype(settings: WeightsConfig) -> torch.dtype | None:
    """Return the dtype of products and of weights that are no matrices; None is that of the files."""
    if settings.dtype == "auto":
        return torch.bfloat16 if settings.held in INTEGERS else None
    return DTYPES[settings.dtype]


def _open_run(settings: WeightsConfig, folder: Path, device: torch.device, adapter: str) -> Opened:
    if adapter:
        raise ValueError(f"{folder} is a run; --adapter is for published models")
    run = load_run(folder, settings.which)
    hold_run(run, settings.held)
    return Opened(run.model.to(device, _dtype(settings)), run.tokenizer, run)


def _open_published(settings: WeightsConfig, device: torch.device, adapter: str) -> Opened:
    if settings.which != "best":
        raise ValueError(f"{settings.model} is a published model, and --which {settings.which} is for runs")
    if adapter:
        if settings.dtype != "auto":
            raise ValueError(
                "an adapter's folder says which weights it was trained on; "
                f"leave --dtype {settings.dtype} out, or --adapter"
            )
        if settings.held in INTEGERS:
            raise ValueError(
                f"an adapter was trained on fp32, bf16 or nf4 weights; leave --held {settings.held} out"
            )
        weight_format = "auto" if settings.held == "full" else settings.held
        found = open_adapted(settings.model, adapter, weight_format, device)
    else:
        weight_format = None if settings.held == "full" else settings.held
        # What is rounded to integers is not rounded to bf16 before.
        read_as = torch.float32 if settings.held in INTEGERS else _dtype(settings)
        found = load_pretrained(settings.model, read_as, device, weight_format=weight_format)
        hold(found.model, weight_format)
        found.model.to(_dtype(settings))
    if found.tokenizer is None:
        raise ValueError(
            f"{settings.model} has no tokenizer; put the tokenizer.json of the model beside its weights"
        )
    if found.model.embed.weight.dtype == torch.float16 and device.type == "cpu":
        found.model.float()  # A CPU has no fast fp16.
    return Opened(found.model, found.tokenizer)


def read_prompts(settings: CommandConfig) -> list[str]:
    """Return the prompts of the command line, then that of the file.

    Raises:
        ValueError: The file cannot be read, or is not UTF-8.
    """
    prompts = list(settings.prompt)
    if settings.prompt_file:
        try:
            here = settings.prompt_file == "-"
            data = sys.stdin.buffer.read() if here else Path(settings.prompt_file).read_bytes()
            prompts.append(data.decode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompt_file {settings.prompt_file} is not UTF-8: byte {error.start} cannot be read"
            ) from None
        except OSError as error:
            raise ValueError(
                f"--prompt_file {settings.prompt_file} cannot be read: {error.strerror}"
            ) from None
    return prompts


def asked_of(tokenizer: Tokenizer, text: str, system: str | None) -> Prompt:
    """Return the prompt that asks for the answer to what a user says.

    Raises:
        ValueError: As `asked_ids`.
    """
    before = () if system is None else (Message("system", system),)
    return Prompt(asked_ids(tokenizer, (*before, Message("user", text))))


def write_completions(
    settings: CommandConfig,
    examine: Callable[[CommandConfig, Decoder, Tokenizer, list[str]], None] = lambda *_: None,
) -> None:
    """Write the completions to the standard output, and how they ended to the standard error.

    Args:
        examine: Called with the settings, the opened model and the prompts, before it generates.
    """
    prompts: list[str] | list[Prompt] = (texts := read_prompts(settings))
    model, tokenizer = open_model(settings)
    examine(settings, model, tokenizer, texts)
    if settings.chat:
        end_turns(tokenizer)
        prompts = [asked_of(tokenizer, text, settings.system) for text in texts]
    shown = printable if sys.stdout.isatty() else str

    def write(text: str) -> None:
        sys.stdout.buffer.write(shown(text).encode("utf-8", "surrogatepass"))
        sys.stdout.buffer.flush()

    one = len(prompts) == 1
    started = time.perf_counter()
    completions = generate(model, tokenizer, prompts, settings, 0, settings.suffix, write if one else None)
    seconds = time.perf_counter() - started
    for number, completion in enumerate(completions, 1):
        if one:
            write("\n")
        else:
            write(f"--- completion {number}\n{completion.text}\n")
        if not one:
            print(f"{number}: {completion.finish_reason}, {len(completion.ids)} tokens", file=sys.stderr)
        if completion.speculation:
            print(completion.speculation, file=sys.stderr)
    n_tokens = sum(len(completion.ids) for completion in completions)
    reason = f"{completions[0].finish_reason}, " if one else ""
    rate = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s"
    print(f"{reason}{rate}", file=sys.stderr)
