"""Guard: what is generated does not depend on how it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from architecture import Decoder
from decoding import generate_ids
from generate import GenerationConfig, generate
from guards.subject import Fault, Subject, awake, tokens_of_a_pass

PROMPT_TOKENS, NEW_TOKENS = 16, 4
BEAM_PROMPTS = 8
BEAM_IDS = 16  # of the vocabulary that the exhaustive search may use: 256 texts of two tokens


def generation(subject: Subject) -> Iterator[Fault | str]:
    """A batch continues as its rows do, a seed repeats, beams find the best, no prompt is in a prediction."""
    length = min(PROMPT_TOKENS, subject.config.model.block_size - NEW_TOKENS)
    row = subject.micro_batch(0).tokens[0].tolist()
    if length < 4 or subject.config.model.vocab_size < BEAM_IDS:
        yield "left out: the model's rows are too short to generate from"
        return
    prompts = [row[:length], row[length // 2 : length // 2 + 3]]
    with awake(subject.model):
        subject.model.eval()
        yield from batch_faults(subject.model, prompts)
        yield from seed_faults(subject.model, prompts)
        count = max(1, min(BEAM_PROMPTS, tokens_of_a_pass(subject.model) // BEAM_IDS))
        yield from beam_faults(subject.model, [row[i : i + 3] for i in range(min(count, len(row) - 3))])
        yield from echo_faults(subject, prompts[0])


def batch_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS)
    together = [g.ids for g in generate_ids(model, prompts, settings)]
    alone = [generate_ids(model, [prompt], settings)[0].ids for prompt in prompts]
    if together != alone:
        yield Fault(
            "batch-differs-from-single",
            f"two prompts continue with {together} in one batch and with {alone} alone",
            "pad on the left, give padding a document of its own, and count positions from the first token",
        )


def seed_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=1)
    first, second = ([g.ids for g in generate_ids(model, prompts, settings)] for _ in range(2))
    if first != second:
        yield Fault(
            "sampling-not-repeatable",
            f"one seed gave {first} and then {second}",
            "draw from a generator of the seed and the row, not from the global one",
        )


def beam_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    """As many beams as there are ids find the best two tokens of all."""
    settings = GenerationConfig(max_new_tokens=2, num_beams=BEAM_IDS)
    results = generate_ids(model, prompts, settings, vocab_size=BEAM_IDS)
    for prompt, result in zip(prompts, results, strict=True):
        texts = torch.tensor([[*prompt, id] for id in range(BEAM_IDS)], device=model.embed.weight.device)
        with torch.no_grad():
            log_probs = model(texts)[:, -2:, :BEAM_IDS].double().log_softmax(-1)
        totals = (log_probs[0, 0][:, None] + log_probs[:, 1]).cpu()
        first, second = result.ids
        if totals[first, second] < totals.max() - 1e-4:
            yield Fault(
                "beams-not-by-probability",
                f"beam search chose two tokens of log-probability {totals[first, second]:.4f} where the best "
                f"have {totals.max():.4f}",
                "rank beams by sums of log-probabilities, not of logits",
            )
            return


def echo_faults(subject: Subject, prompt: list[int]) -> Iterator[Fault]:
    text = subject.tokenizer.decode(prompt)
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS)
    (completion,) = generate(subject.model, subject.tokenizer, [text], settings)
    if text.strip() and completion.text.startswith(text):
        yield Fault(
            "prompt-in-prediction",
            f"a prediction of {NEW_TOKENS} tokens begins with its own prompt {text[:40]!r}",
            "return what was added only",
        )
