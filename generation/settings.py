"""Settings of generation: how tokens are chosen, and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from config import option


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen. The default is greedy.

    The penalty comes first, then temperature, top-k, top-p and min-p, each on what the one before left.

    Args:
        max_new_tokens: Most tokens to generate, besides those in the place of a healed prompt's end.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample only among the k most likely tokens, and those as likely as the last; 0 means all.
        top_p: Sample only from the nucleus, the fewest likeliest tokens that together have at least this much
            probability; 1 means all.
        min_p: Sample only tokens at least this fraction as likely as the most likely one; 0 means all.
        repetition_penalty: Divides the logits of tokens in the prompt and in the text so far, and multiplies
            negative ones: above 1 makes them less likely.
        num_beams: Width of the beam search; 1 means none. A text that has ended keeps its place.
        length_penalty: Beams are ranked by log-probability / length ** length_penalty. 0 ranks by plain
            log-probability, which favours short texts; 1 by the mean of a token.
        stop: Strings that end the text; they are not part of it.
        seed: Seed of the sampling; each prompt has random numbers of its own.
        heal: Choose the first tokens among those that begin with the prompt's last ones, which they replace
            (tokenization/healing.py). Not given, it is done unless the run was trained on prompts cut where
            they end.
        speculate: Verify several proposed tokens in one pass, which changes no text but by rounding: `lookup`
            proposes what followed the last tokens where they stood before; or `none`.

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
    stop: tuple[str, ...] = option((), is_text=True)
    seed: int = 0
    heal: bool | None = None
    speculate: Literal["none", "lookup"] = "none"

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
        if self.num_beams > 1 and self.speculate != "none":
            raise ValueError(
                f"num_beams is {self.num_beams} but speculate {self.speculate} is of single texts; "
                "set speculate to none or num_beams to 1"
            )
        if self.num_beams == 1 and self.length_penalty != 0:
            raise ValueError(
                f"length_penalty is {self.length_penalty} but num_beams 1 ranks nothing; "
                "set num_beams above 1 or length_penalty to 0"
            )

    @property
    def choosing(self) -> tuple[float, ...]:
        """The settings that change logits: texts that share them are looked at together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Which model writes, and how its weights are opened.

    Args:
        model: A model folder or a hub id such as `bigcode/starcoder2-3b`, or a run folder or checkpoint.
        held: Format that the matrices are stored in: `full`, or with fewer bits, `int8`, `int4` or `nf4`. The
            first two are the fast ones on a CPU; they are computed in bf16 where `dtype` is `auto`.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        dtype: Type of the weights: `auto` (that of the files), `bf16` or `fp32`. An adapter's folder sets it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    model: str = option(also=("run",))
    held: Literal["full", "int8", "int4", "nf4"] = "full"
    which: Literal["best", "last"] = "best"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class OpeningConfig(WeightsConfig):
    """A model, with an adapter on it or none.

    Args:
        adapter: A PEFT folder for `model`, which is then a published one.
    """

    adapter: str = ""


@dataclass(frozen=True, kw_only=True)
class ExaminedConfig(WeightsConfig):
    """A model that is examined at its first use.

    Args:
        allow: Names of faults that may pass, of those that a model's first use is examined for.
        cache: Folder in which a model that was examined is remembered.
    """

    allow: tuple[str, ...] = ()
    cache: str = "cache"


@dataclass(frozen=True, kw_only=True)
class CommandConfig(GenerationConfig, ExaminedConfig, OpeningConfig):
    """The command line of generation.

    Args:
        prompt: Text to go on from; several may be given.
        prompt_file: A file that holds one more prompt; `-` is the standard input.
        suffix: The text after a gap: the model fills in the text between prompt and suffix.
        chat: Whether each prompt is what a user says: the model answers it, asked by the template of its
            tokenizer.
        system: What the system says before the user does.
    """

    prompt: tuple[str, ...] = option((), is_text=True)
    prompt_file: str = ""
    suffix: str | None = option(None, is_text=True)
    chat: bool = False
    system: str | None = option(None, is_text=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        n_prompts = len(self.prompt) + bool(self.prompt_file)
        if not n_prompts:
            raise ValueError("there is no prompt; give --prompt TEXT or --prompt_file FILE (- is stdin)")
        if self.suffix is not None and n_prompts > 1:
            raise ValueError(f"--suffix belongs to one prompt, and there are {n_prompts}; give one")
        if self.suffix is not None and self.chat:
            raise ValueError("--chat asks for an answer, and --suffix for the text of a gap; leave one out")
        if self.heal and self.chat:
            raise ValueError(
                "--chat asks for an answer, and --heal true for more of the prompt; leave one out"
            )
        if self.system is not None and not self.chat:
            raise ValueError("--system is a part of a conversation; give --chat true too, or leave it out")
