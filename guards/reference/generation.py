"""Comparison of generation with the reference, which reads every text anew for each of its tokens.

The engine continues prompts of unequal length together, in fewer places than there are prompts, so that rows
are padded, end, move and join. What it says of each token is compared with the reference's own reading of the
text that it gave back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from architecture import Decoder
from config import ModelConfig
from generation.engine import Generated, generate_ids
from generation.rows import rows_of
from generation.sampling import adjust_logits, row_generator, sample
from generation.settings import GenerationConfig
from guards.reference.comparison import Comparison
from guards.reference.forward import scrambled
from guards.reference.observed import run_weights
from guards.reference.prompts import compare_prompts
from guards.reference.reader import REMEDY, Reader
from guards.reference.served import compare_served
from guards.subject import GuardSubject, is_large
from modules.quantized_linear import n_weights
from reference.generation import Rules, beam_search, chances, draws, interval, penalised
from tokenization.healing import Prompt
from tokenizer import Tokenizer

NEW = 4  # Tokens of each continuation.
LENGTHS = (9, 4, 9, 6, 12)  # Of the prompts.
FEW = (6, 3, 6, 4)  # The same of a model whose every token costs much.
PLACES = 3  # Rows under way at a time.
MOST_PRODUCTS = 1e10  # Weights x tokens that the reference reads: some 2 s on two cores.
TOKENS = 1000  # That it reads for one run, about.
DRAWN = 2**21  # Numbers of the distributions from which many tokens are drawn.
FALSE_ALARM = 1e-12  # The probability that many draws are refused by chance.
PENALISED: dict[str, Any] = {"repetition_penalty": 1.4}
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.2, "repetition_penalty": 0.8},
)


@dataclass(frozen=True)
class Generating:
    """A model that generates, with the settings that the reference takes.

    Args:
        first_documents: Texts out of which prompts are cut.
        is_served: Compare what a server does with requests that come one after another.
    """

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    first_documents: Sequence[Any]
    is_served: bool = False


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare how the model that will train generates, with weights that hide nothing."""
    model = subject.model
    # A bare subject of a test has no documents.
    texts = () if subject.tokenizer is None else subject.first_documents
    generating = Generating(model, subject.config.model, subject.tokenizer, texts)
    with scrambled(subject, set(range(len(model.blocks)))), torch.no_grad():
        model.eval()
        compare_model(generating, comparison, lambda: dict(run_weights(subject)))


def compare_model(
    generating: Generating, comparison: Comparison, weights: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Compare greedy decoding, sampling, beams and the ends of prompts with the reference.

    Args:
        weights: Returns those of the model in fp64; only asked for where it is compared.
    """
    model, config = generating.model, generating.config
    room = config.block_size
    if config.rotates_by_length:
        room = min(room, config.rope_context)
    if room < 2 * NEW:
        comparison.leave_out("generation", f"texts of {room} tokens are too short")
        return
    if is_large(model):
        comparison.leave_out("generation", f"a model of {n_weights(model):,} weights takes too long")
        return
    is_small = n_weights(model) * TOKENS <= MOST_PRODUCTS
    reader = Reader(model, config, weights())
    compare_greedy(model, comparison, reader, prompts_of(config, room, LENGTHS if is_small else FEW))
    if is_small:
        compare_sampled(model, comparison, reader, prompts_of(config, room, LENGTHS))
    else:
        left = "generation but for greedy decoding"
        comparison.leave_out(left, f"a model of {n_weights(model):,} weights takes too long")
    if is_small and generating.is_served:
        words, greedy = words_of(model.config), GenerationConfig(max_new_tokens=NEW)
        runs = Continuations(comparison, reader, words)
        same = partial(runs.compare, settings=greedy)
        compare_served(model, comparison, words, room, same, greedy)
    if is_small and generating.tokenizer is not None:
        compare_prompts(generating, comparison, reader, room - NEW)
    if math.isinf(reader.off):
        comparison.leave_out("a part of generation", "rounding alone may change what is generated")


def words_of(config: ModelConfig) -> int:
    """Return the number of ids that may be chosen here: an embedding may have rows that no text has."""
    return max(2, config.vocab_size - 3)


def prompts_of(config: ModelConfig, room: int, lengths: Sequence[int]) -> list[list[int]]:
    """Return random prompts for texts of up to `room` tokens, of which the third is the first one."""
    found = [torch.randint(words_of(config), (min(n, room - NEW),)).tolist() for n in lengths]
    found[2] = found[0]
    return found


def compare_greedy(model: Decoder, comparison: Comparison, reader: Reader, prompts: list[list[int]]) -> None:
    """Compare greedy continuations with and without an end, and the chances of a token when sampled."""
    greedy, words = GenerationConfig(max_new_tokens=NEW), words_of(model.config)
    runs = Continuations(comparison, reader, words)
    found = generate_ids(model, prompts, greedy, None, words, most_rows=PLACES)
    runs.compare("greedy", prompts, found, greedy)
    ends = {found[0].ids[0], found[1].ids[1]}
    found = generate_ids(model, prompts, greedy, ends, words, most_rows=PLACES)
    runs.compare("greedy to an end", prompts, found, greedy, ends)
    compare_ties(comparison)
    for changes in (PENALISED, *SAMPLED):
        compare_chances(model, comparison, prompts[:3], GenerationConfig(**changes), words)


def compare_sampled(model: Decoder, comparison: Comparison, reader: Reader, prompts: list[list[int]]) -> None:
    """Compare sampled continuations and searches by beams, with ends that texts have."""
    words = words_of(model.config)
    ends = {int(reader.logits(prompt)[-1][:words].argmax()) for prompt in prompts[:2]}
    seed = int(torch.randint(2**31, ()))
    for changes in SAMPLED:
        settings = GenerationConfig(max_new_tokens=NEW, seed=seed, **changes)
        found = generate_ids(model, prompts, settings, ends, words, first_row=5, most_rows=PLACES)
        Continuations(comparison, reader, words).compare("sampled", prompts, found, settings, ends, 5)
    compare_beams(model, comparison, reader, prompts[:2], words, ends)


class Continuations:
    """Continuations of prompts against the reference's reading of them.

    Args:
        words: The ids that may be chosen are those below.
    """

    def __init__(self, comparison: Comparison, reader: Reader, words: int):
        self.comparison, self.reader, self.words = comparison, reader, words

    def compare(
        self,
        how: str,
        prompts: list[list[int]],
        found: list[Generated],
        settings: GenerationConfig,
        ends: Collection[int] = (),
        first_row: int = 0,
    ) -> None:
        """Compare every token, the log-probability of all, and why each text ends."""
        rules = rules_of(settings)
        for number, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
            stage = f"prompt {number + 1}, {how}"
            self.compare_end(stage, one, ends)
            after = self.reader.logits([*prompt, *one.ids])[len(prompt) - 1 : -1]
            numbers = draws(settings.seed, first_row + number)
            for place, (logits, id) in enumerate(zip(after, one.ids, strict=True)):
                seen = [*prompt, *one.ids[:place]]
                scores = penalised(logits[: self.words], seen, rules.repetition_penalty)
                where = f"{stage}, token {place + 1}"
                if settings.temperature == 0:
                    gap = float(scores.max() - scores[id])
                    right = int(scores.argmax())
                    self.comparison.exact(
                        where, id if not self.reader.explains(gap) else right, right, REMEDY
                    )
                else:
                    self.drawn(where, id, scores, rules, next(numbers))
            expected = log_prob_of(after, one.ids)
            self.reader.close(self.comparison, f"{stage}, log-probability", one.log_prob, expected, NEW)

    def compare_end(self, stage: str, one: Generated, ends: Collection[int]) -> None:
        """Compare why a text ended; an id that no text has, or an end inside of it, may not be there."""
        has_ended = one.ids[-1] in ends
        expected = ("eos" if has_ended else "length", 0, len(one.ids) if has_ended else NEW, True)
        inside = sum(id in ends for id in one.ids[:-1])
        found = (one.finish_reason, inside, len(one.ids), max(one.ids) < self.words)
        self.comparison.exact(
            f"{stage}, end", found, expected, "where texts end, and which ids may be chosen"
        )

    def drawn(self, stage: str, id: int, scores: Tensor, rules: Rules, number: float) -> None:
        """See that a random number draws this token, where rounding does not decide which ones are kept."""
        off = 2 * self.reader.off * max(rules.repetition_penalty, 1 / rules.repetition_penalty)
        if not keeps_the_same(scores, rules, off):
            return
        p = chances(scores, rules)
        low, high = interval(p, id)
        slack = 4 * off / rules.temperature
        fits = low - slack <= number <= high + slack and float(p[id]) > 0
        expected = int((p.cumsum(0) > number).int().argmax())
        self.comparison.exact(stage, expected if fits else id, expected, REMEDY)


def rules_of(settings: GenerationConfig) -> Rules:
    return Rules(*(getattr(settings, name) for name in Rules._fields))


def keeps_the_same(scores: Tensor, rules: Rules, off: float) -> bool:
    """Return whether the same tokens are kept when each score (V,) moves by `off`."""
    ordered = scores.sort(descending=True).values
    in_nucleus = int((chances(scores, rules._replace(min_p=0.0)) > 0).sum())
    # Which of two nearly equal tokens is the last one kept is a matter of rounding.
    for last in {rules.top_k, in_nucleus} - {0}:
        if last < len(ordered) and float(ordered[last - 1] - ordered[last]) <= 2 * off:
            return False
    share = 4 * off / rules.temperature
    near = [
        rules._replace(top_p=min(1.0, rules.top_p * (1 + s)), min_p=rules.min_p * (1 + s))
        for s in (-share, share)
    ]
    fewer, more = (chances(scores, rules) > 0 for rules in near)
    return share < 1 and torch.equal(fewer, more)


def log_prob_of(after: Tensor, ids: list[int]) -> float:
    """Return the sum of the log-probabilities of tokens, whose logits are (n, V)."""
    return float(after.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())


# --- the choice of a token --------------------------------------------------------------------------------


def compare_ties(comparison: Comparison) -> None:
    """Compare which of equally likely tokens are kept, as random logits have none."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 3.0]])
    cases: tuple[dict[str, Any], ...] = ({"top_k": 3}, {"top_k": 2, "top_p": 0.6}, {"top_p": 0.7})
    for changes in cases:
        settings = GenerationConfig(temperature=1.0, **changes)
        found = adjust_logits(logits, None, settings)[0].double().softmax(-1)
        expected = chances(logits[0].double(), rules_of(settings))
        comparison.close(f"chances of equal tokens, {_said(settings)}", found, expected, 1e-15, REMEDY)


def compare_chances(
    model: Decoder,
    comparison: Comparison,
    prompts: list[list[int]],
    settings: GenerationConfig,
    words: int,
) -> None:
    """Compare scores, or the chances of tokens and many draws from them, at the run's own logits."""
    whole = max(map(len, prompts))
    padded = [prompt + prompt[: whole - len(prompt)] for prompt in prompts]  # One pass, in their order.
    live = rows_of(model, [Prompt(ids) for ids in padded], settings, words)
    rules = rules_of(settings)
    for row, ids in enumerate(live.prompts):
        own = live.own_logits[row].double().cpu()[:words]
        scores = penalised(own, padded[ids], rules.repetition_penalty)
        share = 8 * torch.finfo(torch.float32).eps
        off = share * float(scores.abs().max())
        if settings.temperature == 0:
            found = live.logits[row].double().cpu()[:words]
            stage = f"scores of tokens, {_said(settings)}"
            comparison.close(stage, found, scores, share, REMEDY)
            continue
        if keeps_the_same(scores, rules, off):
            found = live.logits[row].double().cpu().softmax(-1)
            expected = torch.zeros_like(found)
            expected[:words] = chances(scores, rules)
            tolerance = 4 * off / rules.temperature + 8 * torch.finfo(torch.float64).eps
            comparison.close(f"chances of a token, {_said(settings)}", found, expected, tolerance, REMEDY)
    if settings.temperature == 0:
        return
    n = min(1000, DRAWN // live.logits.size(1))
    drawn = sample(live.logits[:1].expand(n, -1), [row_generator(settings.seed, row) for row in range(n)])
    p = live.logits[0].double().cpu().softmax(-1)
    share = torch.bincount(drawn.cpu(), minlength=len(p)).double() / n
    # The bound of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990).
    most = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * n))
    apart = float((share.cumsum(0) - p.cumsum(0)).abs().max())
    comparison.exact(f"{n} draws from them", apart if apart > most else True, True, REMEDY)


def _said(settings: GenerationConfig) -> str:
    plain = GenerationConfig()
    changed = {name: getattr(settings, name) for name in Rules._fields}
    return ", ".join(f"{name} {value}" for name, value in changed.items() if value != getattr(plain, name))


# --- beams ------------------------------------------------------------------------------------------------


def compare_beams(
    model: Decoder,
    comparison: Comparison,
    reader: Reader,
    prompts: list[list[int]],
    words: int,
    ends: Collection[int],
) -> None:
    """Compare the best texts of a search by beams, where rounding does not decide between texts."""
    settings = GenerationConfig(max_new_tokens=3, num_beams=3, length_penalty=0.5)
    for prompt, one in zip(prompts, generate_ids(model, prompts, settings, ends, words), strict=True):

        def log_probs(ids: tuple[int, ...], prompt: list[int] = prompt) -> Tensor:
            return reader.logits([*prompt, *ids])[-1][:words].log_softmax(-1)  # Given that all are words.

        texts, gap = beam_search(log_probs, settings.num_beams, settings.max_new_tokens, ends)
        best, *others = sorted((text.rank(settings.length_penalty) for text in texts), reverse=True)
        gap = min([gap, *(best - other for other in others)])
        if gap <= 4 * settings.max_new_tokens * reader.off:
            continue
        winner = max(texts, key=lambda text: text.rank(settings.length_penalty))
        comparison.exact("the best of 3 beams", tuple(one.ids), winner.ids, REMEDY)
        after = reader.logits([*prompt, *one.ids])[len(prompt) - 1 : -1]
        stage = "the best of 3 beams, log-probability"
        reader.close(comparison, stage, one.log_prob, log_prob_of(after, one.ids), len(one.ids))
