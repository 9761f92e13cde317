"""Guard: what is generated does not depend on how it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from architecture import Decoder
from generation.engine import generate_ids
from generation.settings import GenerationConfig
from generation.text import generate
from guards.faults import Fault
from guards.subject import Subject, awake, tokens_of_a_pass

PROMPT_TOKENS = 16
NEW_TOKENS = 4
FEWEST_TOKENS = 2  # of models of which each token takes a tenth of a second
ROUNDING = 1e-4  # of the largest logit: what the order of sums in fp32 may change
LOGITS_APART = 0.05  # of the largest: above what weights in 16 bits round
BEAM_PROMPTS = 8  # with their beams each is 16 rows; of two prompts the best texts may be found by chance
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
        starts = range(min(BEAM_PROMPTS, len(row) - 3))
        yield from beam_faults(subject.model, [row[i : i + 3] for i in starts])
        yield from echo_faults(subject, prompts[0])


def batch_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    """By the tokens chosen, and by their logits: the largest may stay it though padding is seen."""
    together, of_batch = continued(model, prompts)
    parted, apart = False, 0.0
    alone: list[list[int]] = []
    for ids_together, prompt in zip(together, prompts, strict=True):
        (ids,), steps = continued(model, [prompt])
        alone.append(ids)
        same = first_difference(ids, ids_together)  # up to there both have read the same
        # Rows are under way in an order of their own: each prompt's is the nearest.
        for rows, row in list(zip(of_batch, steps, strict=False))[: same + 1]:
            nearest = float((rows - row).abs().amax(-1).min())
            apart = max(apart, nearest / float(row.abs().max()))
        parted |= ids != ids_together and not tie(steps[min(same, len(steps) - 1)], model.embed.weight.dtype)
    if parted or apart > LOGITS_APART:
        yield Fault(
            "batch-differs-from-single",
            f"two prompts continue with {together} in one batch and with {alone} alone, and their "
            f"logits differ by {apart:.1%} of the largest",
            "pad on the left, give padding a document of its own, and count positions from the first token",
        )


def first_difference(a: list[int], b: list[int]) -> int:
    """The first index at which they differ, which is the shorter's length where it begins the longer."""
    both = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(both) if x != y), min(len(a), len(b)))


def tie(logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding decides which of the logits (1, V) is the largest, of weights in `dtype`."""
    largest, next_largest = logits[0].topk(2).values.tolist()
    return largest - next_largest <= rounding(logits, dtype)


def rounding(logits: Tensor, dtype: torch.dtype) -> float:
    """By how much two ways to compute the same logits may differ, of weights in `dtype`."""
    return max(ROUNDING, 4 * torch.finfo(dtype).eps) * float(logits.abs().max())


def continued(model: Decoder, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy continuations, and of each step the logits (B, V) of its rows, in their order."""
    logits: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda module, args, output: logits.append(output.float()))
    try:
        found = generate_ids(model, prompts, GenerationConfig(max_new_tokens=new_tokens(model)))
    finally:
        hook.remove()
    return [g.ids for g in found], [step.reshape(-1, step.size(-1)) for step in logits]


def new_tokens(model: Decoder) -> int:
    return max(FEWEST_TOKENS, min(NEW_TOKENS, tokens_of_a_pass(model) // 256))


def seed_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    settings = GenerationConfig(max_new_tokens=new_tokens(model), temperature=1.0, seed=1)
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
    texts = [[*prompt, id] for prompt in prompts for id in range(BEAM_IDS)]
    with torch.no_grad():  # in one pass, which reads the weights once
        hidden = model.hidden(torch.tensor(texts, device=model.embed.weight.device))
        # One matrix: a slice of three dimensions would be multiplied text by text, each with its own copy of
        # the head's weights. The texts of a prompt share all but their last token.
        logits = model.head(torch.cat((hidden[::BEAM_IDS, -2], hidden[:, -1])))[:, :BEAM_IDS]
        log_probs = logits.double().log_softmax(-1).cpu()
    slack = rounding(logits, model.embed.weight.dtype)  # beams read a token at a time, in other sums
    firsts, seconds = log_probs[: len(prompts)], log_probs[len(prompts) :].view(-1, BEAM_IDS, BEAM_IDS)
    for of_first, of_second, result in zip(firsts, seconds, results, strict=True):
        totals = of_first[:, None] + of_second
        first, second = result.ids
        if totals[first, second] < totals.max() - slack:
            yield Fault(
                "beams-not-by-probability",
                f"beam search chose two tokens of log-probability {totals[first, second]:.4f} where the best "
                f"have {totals.max():.4f}",
                "rank beams by sums of log-probabilities, not of logits",
            )
            return


def echo_faults(subject: Subject, prompt: list[int]) -> Iterator[Fault]:
    text = subject.tokenizer.decode(prompt)
    settings = GenerationConfig(max_new_tokens=new_tokens(subject.model))
    (completion,) = generate(subject.model, subject.tokenizer, [text], settings)
    if text.strip() and completion.text.startswith(text):
        yield Fault(
            "prompt-in-prediction",
            f"a prediction of {settings.max_new_tokens} tokens begins with its own prompt {text[:40]!r}",
            "return what was added only",
        )
