"""The command that generates text: it opens the model, reads the prompts and writes the completions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from architecture import Decoder
from config.console import printable
from generation.settings import CommandConfig, OpeningConfig
from generation.text import generate
from modules.precision import choose_device
from pretrained import load_pretrained
from tokenization.chat import Message, asked_ids
from tokenization.healing import Prompt
from tokenizer import Tokenizer
from training.run import load_run, open_adapted


def open_model(settings: OpeningConfig) -> tuple[Decoder, Tokenizer]:
    """Open the model and tokenizer of --model, on the requested device and in the requested dtype.

    Raises:
        ValueError: There is no such model, it cannot be read, or it has no tokenizer.
    """
    device = choose_device(settings.device)
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[settings.dtype]
    folder = Path(settings.model)
    if folder.is_dir() and not (folder / "config.json").exists():
        if settings.adapter or settings.held != "full":
            raise ValueError(f"{folder} is a run; --adapter and --held are for published models")
        run = load_run(folder, settings.which)
        return run.model.to(device, dtype), run.tokenizer
    if settings.which != "best":
        raise ValueError(f"{settings.model} is a published model, and --which {settings.which} is for runs")
    if settings.adapter:
        if settings.dtype != "auto":
            raise ValueError(
                "an adapter's folder says which weights it was trained on; "
                f"leave --dtype {settings.dtype} out, or --adapter"
            )
        if settings.held == "int8":
            raise ValueError("an adapter was trained on fp32, bf16 or nf4 weights; leave --held int8 out")
        weight_format = "auto" if settings.held == "full" else settings.held
        found = open_adapted(settings.model, settings.adapter, weight_format, device)
    else:
        weight_format = None if settings.held == "full" else settings.held
        found = load_pretrained(settings.model, dtype, device, weight_format=weight_format)
    if found.tokenizer is None:
        raise ValueError(
            f"{settings.model} has no tokenizer; put the tokenizer.json of the model beside its weights"
        )
    if found.model.embed.weight.dtype == torch.float16 and device.type == "cpu":
        found.model.float()  # A CPU has no fast fp16.
    return found.model, found.tokenizer


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
    n_tokens = sum(len(completion.ids) for completion in completions)
    reason = f"{completions[0].finish_reason}, " if one else ""
    rate = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s"
    print(f"{reason}{rate}", file=sys.stderr)
