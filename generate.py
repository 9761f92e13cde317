"""Text from a model: `python generate.py --model FOLDER --prompt "def fib(n):"`.

    tokenizer.prompt_ids(prompt) -> healing.healed -> decoding.generate_ids -> text without the prompt, cut
    before a stop string

With a suffix the prompt is that of fill-in-the-middle (`data/fim.py`). The command writes the completion to
the standard output while it is made, and how it went to the standard error.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import make_parser, one_sentence


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen. The default is greedy.

    Args:
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample only among the k most likely tokens; 0 means all.
        top_p: Sample only from the nucleus that holds this much probability; 1 means all.
        min_p: Sample only tokens at least this fraction as likely as the most likely one; 0 means all.
        repetition_penalty: Above 1 makes tokens of the prompt and of the text so far less likely.
        num_beams: Width of the beam search; 1 means none.
        length_penalty: Beams are ranked by log-probability / length ** length_penalty. 0 ranks by plain
            log-probability, which favours short texts; 1 by the mean of a token.
        stop: Strings that end the text; they are not part of it.
        seed: Of the sampling.
        heal: Choose the first tokens among those that begin with the prompt's last ones, which they replace
            (tokenization/healing.py). Not given, it is done unless the run was trained on prompts cut where
            they end.

    Raises:
        ValueError: A setting is out of range, or would silently do nothing beside the others.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    heal: bool | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be finite and at least 0 (greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 (all tokens) and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be finite and above 0, 1 for none"
            )
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; it must be at least 1 (no beam search)")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be finite, 0 for none")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of strings that are not empty")
        if self.temperature == 0:
            for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but temperature 0 samples nothing; "
                        f"set temperature above 0 or {name} to {off}"
                    )
        elif self.num_beams > 1:
            raise ValueError(
                f"num_beams is {self.num_beams} but temperature {self.temperature} samples; "
                "set temperature to 0 or num_beams to 1"
            )
        if self.num_beams == 1 and self.length_penalty != 0:
            raise ValueError(
                f"length_penalty is {self.length_penalty} but num_beams 1 ranks nothing; "
                "set num_beams above 1 or length_penalty to 0"
            )


@dataclass(frozen=True, kw_only=True)
class CommandConfig(GenerationConfig):
    """The command line of generation.

    Args:
        model: A model folder or a hub id such as `bigcode/starcoder2-3b`, or a run folder or checkpoint.
        prompt: Text to go on from; several may be given.
        prompt_file: A file that holds one more prompt; `-` is the standard input.
        suffix: What follows the gap: the model fills in what stands between prompt and suffix.
        adapter: A PEFT folder for `model`, which is then a published one.
        held: How the matrices of a published model are held: `full`, or in fewer bits, `int8` or `nf4`.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        dtype: Of the weights: `auto` (that of the files), `bf16` or `fp32`. An adapter says it itself.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    model: str
    prompt: tuple[str, ...] = ()
    prompt_file: str = ""
    suffix: str | None = None
    adapter: str = ""
    held: Literal["full", "int8", "nf4"] = "full"
    which: Literal["best", "last"] = "best"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        n_prompts = len(self.prompt) + bool(self.prompt_file)
        if not n_prompts:
            raise ValueError("there is no prompt; give --prompt TEXT or --prompt_file FILE (- is stdin)")
        if self.suffix is not None and n_prompts > 1:
            raise ValueError(f"--suffix belongs to one prompt, and there are {n_prompts}; give one")


def parse_settings(argv: list[str]) -> CommandConfig:
    """The CommandConfig of a command line; a mistake prints one sentence and exits with 2.

    Texts are taken as they are, where the parser would read them as YAML.
    """
    texts: dict[str, list[str]] = {"--prompt": [], "--stop": [], "--suffix": []}
    words, rest = [], iter(argv)
    for word in rest:
        flag, given, value = word.partition("=")
        text = value if given else next(rest, None) if flag in texts else None
        if flag in texts and text is not None:
            texts[flag].append(text)
        else:
            words.append(word)
    parser = make_parser({"": CommandConfig}, "Continue a prompt, or fill the gap before a suffix.")
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    if len(texts["--suffix"]) > 1:
        parser.error(f"--suffix is given {len(texts['--suffix'])} times; give one")
    values |= {flag[2:]: tuple(found) for flag, found in texts.items() if found and flag != "--suffix"}
    if texts["--suffix"]:
        values["suffix"] = texts["--suffix"][0]
    try:
        return CommandConfig(**values | {key: tuple(values[key]) for key in ("prompt", "stop")})
    except ValueError as error:
        return parser.error(str(error))  # exits


if __name__ == "__main__" and any(word.split("=")[0] == "--recipe" for word in sys.argv[1:]):
    from recipes.refactoring import main as refactor  # a use of its own, with flags of its own

    refactor(sys.argv[1:])
    sys.exit()

# Before torch is imported, so that --help and a typo answer at once.
SETTINGS = parse_settings(sys.argv[1:]) if __name__ == "__main__" else None

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from architecture import Decoder
from config.console import printable
from data.fim import fim_end_ids, fim_prompt_ids
from generation.engine import Stopped, generate_ids
from modules.precision import choose_device
from tokenization.healing import Prompt, healed
from tokenizer import Tokenizer
from training.run import load_run, open_adapted


class Completion(NamedTuple):
    """A `Generated` with its text: without the prompt, without eos, cut before the stop string."""

    text: str
    ids: list[int]
    log_prob: float
    finish_reason: str


# --- prompts --------------------------------------------------------------------------------------


def asked_prompt(tokenizer: Tokenizer, ids: list[int], heal: bool | None = None) -> Prompt:
    """What a model reads of a prompt's ids: all, or all but an end that is healed (tokenization/healing.py).

    Args:
        heal: As of GenerationConfig.
    """
    return healed(tokenizer, ids) if (tokenizer.heals if heal is None else heal) else Prompt(ids)


def trim_prompt(ids: list[int], length: int, bos_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt; where it starts with bos, bos and the last `length` - 1.

    Raises:
        ValueError: `length` is below 1: `max_new_tokens` leaves no room for a prompt.
    """
    if length < 1:
        raise ValueError(f"a prompt cannot be trimmed to {length} tokens; lower max_new_tokens")
    if len(ids) <= length:
        return ids
    before = [bos_id] if bos_id is not None and ids[0] == bos_id else []
    return before + ids[len(ids) - length + len(before) :]


CONTEXT = 16  # tokens that are decoded before others whose text depends on what they follow
SETTLED_EVERY = 32  # tokens


# --- text -----------------------------------------------------------------------------------------


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    first_row: int = 0,
    suffix: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continue each prompt, in one batch.

    Args:
        model: Its mode is left as it was found.
        tokenizer: The one the model was trained with.
        prompts: Texts, which the completions do not repeat.
        settings: How to choose tokens.
        first_row: The seed's row of the first prompt. Who calls for some prompts at a time counts on, and
            gets the same samples in batches of any size.
        suffix: What follows the gap that each completion fills.
        on_text: Called with the parts of the completion of a single prompt while it is made, as soon as
            nothing that follows can change them; together they are its text. A beam search gives one part.

    Raises:
        ValueError: A prompt is empty and there is no bos, does not fit the model's positions, or the
            tokenizer has more words than the model or lacks what a suffix needs.
    """
    if on_text is not None and len(prompts) != 1:
        raise ValueError(f"{len(prompts)} completions cannot be streamed as one text; give one prompt")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocab_size} words do not fit the model's vocabulary of "
            f"{model.config.vocab_size}; use the tokenizer the model was trained with"
        )
    if suffix is None:
        ids = [tokenizer.prompt_ids(text) for text in prompts]
        ends = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    else:
        ids = [fim_prompt_ids(tokenizer, text, suffix) for text in prompts]
        ends = fim_end_ids(tokenizer)
    ends |= frozenset(tokenizer.eos_ids)
    asked = [asked_prompt(tokenizer, one, settings.heal) for one in ids]
    found = stop_finder(tokenizer, asked, settings.stop) if settings.stop else None
    stream = None if on_text is None else _Stream(tokenizer, asked[0], settings.stop, on_text)

    def stopped(prompt: int, new: list[int]) -> bool:
        if found is not None and found(prompt, new):
            return True
        if stream is not None and settings.num_beams == 1:
            stream.read(new)
        return False

    completions = []
    results = generate_ids(model, asked, settings, ends, tokenizer.vocab_size, stopped, first_row)
    for prompt, result in zip(asked, results, strict=True):
        new = result.ids[:-1] if result.finish_reason == "eos" else result.ids
        text = completed_text(tokenizer, prompt, new)
        cuts = [cut for cut in (text.find(string) for string in settings.stop) if cut >= 0]
        reason = "stop" if cuts else result.finish_reason
        completions.append(Completion(text[: min(cuts, default=None)], result.ids, result.log_prob, reason))
    if stream is not None:
        stream.end(completions[0].text)
    return completions


def added_text(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """The text that `ids` add after `before`: decoded alone they could lack a space that stands between."""
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def completed_text(tokenizer: Tokenizer, prompt: Prompt, ids: list[int], context: int | None = None) -> str:
    """The text that the tokens generated after a prompt add to it.

    Args:
        context: Tokens of the prompt that are decoded with them; all if None.
    """
    before = prompt.ids if context is None else prompt.ids[-context:]
    text = added_text(tokenizer, before, ids)
    if not prompt.dropped:
        return text
    # What was dropped comes first in the text of the new tokens.
    return text[len(tokenizer.decode([*before, *prompt.dropped])) - len(tokenizer.decode(before)) :]


def stop_finder(tokenizer: Tokenizer, prompts: list[Prompt], stop: Sequence[str]) -> Stopped:
    """Whether a completion holds one of the strings, at a cost that does not grow with its length.

    Only the last tokens are decoded, after a few more that set their context. A character takes at most a
    token a byte, and CodeTokenizer's case markers, which have no text, stand singly; hence twice the bytes.
    """
    window = 2 * max(len(string.encode("utf-8", "surrogatepass")) for string in stop) + CONTEXT

    def stopped(prompt: int, ids: list[int]) -> bool:
        if len(ids) <= window:
            tail = completed_text(tokenizer, prompts[prompt], ids, CONTEXT)
        else:
            tail = added_text(tokenizer, ids[-window - CONTEXT : -window], ids[-window:])
        if not any(string in tail for string in stop):
            return False
        # The window may start inside a character or a name whose capitals were set before it.
        text = completed_text(tokenizer, prompts[prompt], ids)
        return any(string in text for string in stop)

    return stopped


class _Stream:
    """Gives out a text that grows by tokens, never what a later token may change.

    Kept back are a character whose bytes have not all come, which decodes to U+FFFD; the beginning of a stop
    string; and text that one more byte would change: some tokenizers decode a run of bytes to U+FFFD
    altogether as long as its last character is not whole.

    Only what follows a settled line break is decoded at each token, after a few tokens that set its context.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str], on_text: Callable[[str], None]
    ):
        self.tokenizer, self.before, self.stop, self.on_text = tokenizer, prompt.ids, stop, on_text
        self.given = ""
        rare = tokenizer.encode("\U00013000")  # in no vocabulary, so that its ids are bytes
        self.byte = [id for id in rare if "\ufffd" in tokenizer.decode([id])][:1]
        self.start = 0  # of the ids that are decoded anew
        self.settled = ""  # of the completion, before them
        self.skipped = len(tokenizer.decode(prompt.whole))  # characters of the prompt after them
        self._settle(prompt.ids)

    def read(self, ids: list[int]) -> None:
        """Give out what is certain after these ids, all so far."""
        ids = self.before + ids
        text, changed = (self._since(self.start, ids + more)[self.skipped :] for more in ([], self.byte))
        same = (i for i, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b)
        certain = text[: next(same, min(len(text), len(changed)))].rstrip("\ufffd")
        begun = [n for string in self.stop for n in range(1, len(string)) if certain.endswith(string[:n])]
        self._give(self.settled + certain[: len(certain) - max(begun, default=0)])
        if certain == text and not begun and len(ids) >= self.next_settled:
            self._settle(ids)

    def end(self, text: str) -> None:
        """Give out the rest of the finished text."""
        self._give(text)

    def _since(self, start: int, ids: list[int]) -> str:
        return added_text(self.tokenizer, ids[max(start - CONTEXT, 0) : start], ids[start:])

    def _settle(self, ids: list[int]) -> None:
        """Start after the last line break from which on the text is the same without what came before.

        Such a token ends every name, whose capitals an earlier piece may have set. It is never the last one,
        so that a run of bytes that it may belong to has ended, and the comparison sees where it began.
        """
        self.next_settled = len(ids) + SETTLED_EVERY
        whole = self._since(self.start, ids)
        for start in range(len(ids) - 1, self.start, -1):
            piece = self.tokenizer.decode([ids[start - 1]])
            if "\n" not in piece or piece.strip():
                continue
            tail = self._since(start, ids)
            head = self._since(self.start, ids[:start])
            if head + tail == whole:
                self.settled += head[self.skipped :]
                self.skipped = max(self.skipped - len(head), 0)
                self.start = start
                return

    def _give(self, text: str) -> None:
        if text.startswith(self.given) and text != self.given:
            self.on_text(text[len(self.given) :])
            self.given = text


# --- the command ----------------------------------------------------------------------------------


def open_model(settings: CommandConfig) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer that --model names, on the device and in the dtype that were asked for.

    Raises:
        ValueError: There is no such model, it cannot be read, or it has no tokenizer.
    """
    from pretrained import load_pretrained  # six families, which a run folder does not need

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
        asked = "auto" if settings.held == "full" else settings.held
        found = open_adapted(settings.model, settings.adapter, asked, device)
    else:
        held = None if settings.held == "full" else settings.held
        found = load_pretrained(settings.model, dtype, device, held=held)
    if found.tokenizer is None:
        raise ValueError(
            f"{settings.model} has no tokenizer; put the tokenizer.json of the model beside its weights"
        )
    if found.model.embed.weight.dtype == torch.float16 and device.type == "cpu":
        found.model.float()  # a CPU has no fast fp16
    return found.model, found.tokenizer


def read_prompts(settings: CommandConfig) -> list[str]:
    """The prompts of the command line, then that of the file.

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


def main(settings: CommandConfig) -> None:
    """Write the completions to the standard output, and how they ended to the standard error."""
    prompts = read_prompts(settings)
    model, tokenizer = open_model(settings)
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


if SETTINGS is not None:
    with one_sentence():
        try:
            main(SETTINGS)
        except BrokenPipeError:  # as of `| head`: who reads has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
