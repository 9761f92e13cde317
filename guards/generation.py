"""Guard of generation: a completion does not depend on the batch that it is made in, nor on chance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from architecture import Decoder
from generation.engine import generate_ids
from generation.settings import GenerationConfig
from generation.text import generate, requested_prompt
from guards.faults import Fault
from guards.subject import GuardSubject, tokens_of_a_pass, with_nonzero_weights

PROMPT_TOKENS = 16
NEW_TOKENS = 4
FEWEST_TOKENS = 2  # For models that take a tenth of a second for a token.
ROUNDING = 1e-4  # What the order of sums in fp32 may change, as a share of the largest logit.
LOGITS_APART = 0.05  # More than rounding to 16 bits changes, as a share of the largest logit.
BEAM_PROMPTS = 8  # Each is 16 rows with its beams; for two prompts chance may find the best texts.
BEAM_IDS = 16  # The vocabulary of the exhaustive search: 256 texts of two tokens.


def generation(subject: GuardSubject) -> Iterator[Fault | str]:
    """See that a batch goes on as its rows do, a seed repeats, beams find the best, and no prompt returns."""
    length = min(PROMPT_TOKENS, subject.config.model.block_size - NEW_TOKENS)
    row = subject.micro_batch(0).tokens[0].tolist()
    if length < 4 or subject.config.model.vocab_size < BEAM_IDS:
        yield "left out: the model's rows are too short to generate from"
        return
    prompts = [row[:length], row[length // 2 : length // 2 + 3]]
    with with_nonzero_weights(subject.model):
        subject.model.eval()
        yield from batch_faults(subject.model, prompts)
        yield from seed_faults(subject.model, prompts)
        starts = range(min(BEAM_PROMPTS, len(row) - 3))
        yield from beam_faults(subject.model, [row[i : i + 3] for i in starts])
        yield from echo_faults(subject, prompts[0])


def batch_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    """Compare prompts in one batch with each alone, by the tokens chosen and by their logits.

    The largest logit may stay the largest though padding is seen.
    """
    together, of_batch = continued(model, prompts)
    parted, apart = False, 0.0
    alone: list[list[int]] = []
    for ids_together, prompt in zip(together, prompts, strict=True):
        (ids,), steps = continued(model, [prompt])
        alone.append(ids)
        same = first_difference(ids, ids_together)  # Up to there both have read the same.
        # The engine orders rows in its own way: the row of this prompt is the nearest one.
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
    """Return the first index at which two lists differ; the shorter's length where it begins the longer."""
    both = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(both) if x != y), min(len(a), len(b)))


def tie(logits: Tensor, dtype: torch.dtype) -> bool:
    """Return whether rounding of weights in `dtype` decides which of the logits (1, V) is the largest."""
    largest, next_largest = logits[0].topk(2).values.tolist()
    return largest - next_largest <= rounding(logits, dtype)


def rounding(logits: Tensor, dtype: torch.dtype) -> float:
    """Return by how much two ways to compute the same logits may differ for weights in `dtype`."""
    return max(ROUNDING, 4 * torch.finfo(dtype).eps) * float(logits.abs().max())


def continued(model: Decoder, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """Return greedy continuations, and the logits (B, V) of each step, in the engine's order of rows."""
    logits: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda module, args, output: logits.append(output.float()))
    try:
        found = generate_ids(model, prompts, GenerationConfig(max_new_tokens=new_tokens(model)))
    finally:
        hook.remove()
    return [g.ids for g in found], [step.reshape(-1, step.size(-1)) for step in logits]


def new_tokens(model: Decoder) -> int:
    """Return how many tokens a completion has: fewer for a large model."""
    return max(FEWEST_TOKENS, min(NEW_TOKENS, tokens_of_a_pass(model) // 256))


def seed_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    """Sample twice from one seed."""
    settings = GenerationConfig(max_new_tokens=new_tokens(model), temperature=1.0, seed=1)
    first, second = ([g.ids for g in generate_ids(model, prompts, settings)] for _ in range(2))
    if first != second:
        yield Fault(
            "sampling-not-repeatable",
            f"one seed gave {first} and then {second}",
            "sample from a generator of the seed and the row, not from the global one",
        )


def beam_faults(model: Decoder, prompts: list[list[int]]) -> Iterator[Fault]:
    """Compare beam search with all texts of two tokens: with a beam for each id it finds the best."""
    settings = GenerationConfig(max_new_tokens=2, num_beams=BEAM_IDS)
    results = generate_ids(model, prompts, settings, vocab_size=BEAM_IDS)
    texts = [[*prompt, id] for prompt in prompts for id in range(BEAM_IDS)]
    with torch.no_grad():  # One pass reads the weights once.
        hidden = model.hidden(torch.tensor(texts, device=model.embed.weight.device))
        # One matrix: a slice of three dimensions would be multiplied text by text, each with its own copy of
        # the head's weights. The texts of a prompt share all but their last token.
        logits = model.head(torch.cat((hidden[::BEAM_IDS, -2], hidden[:, -1])))[:, :BEAM_IDS]
        log_probs = logits.double().log_softmax(-1).cpu()
    slack = rounding(logits, model.embed.weight.dtype)  # Beams sum in another order.
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


def echo_faults(subject: GuardSubject, prompt: list[int]) -> Iterator[Fault]:
    """See that a completion does not begin with its prompt, nor with it less as much as was healed."""
    text = subject.tokenizer.decode(prompt)
    settings = GenerationConfig(max_new_tokens=new_tokens(subject.model))
    asked = requested_prompt(subject.tokenizer, text, None, settings.heal)
    healed = len(text) - len(subject.tokenizer.decode(asked.ids))
    (completion,) = generate(subject.model, subject.tokenizer, [asked], settings)
    if text[healed:].strip() and completion.text.startswith((text, text[healed:])):
        yield Fault(
            "prompt-in-prediction",
            f"a prediction of {settings.max_new_tokens} tokens begins with its own prompt {text[:40]!r}",
            "return what was added only",
        )
