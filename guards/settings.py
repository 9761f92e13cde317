"""Guard of the settings: each does what it says."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.layers import LowRank
from architecture import Decoder
from config import ModelConfig
from config.setting import settings_of
from dataset import IGNORE_INDEX, Batch
from guards.faults import Fault
from guards.subject import GuardSubject, affordable, through, tolerance_of, with_nonzero_weights
from modules.dropout import Dropout
from training.random_state import seed_torch

WIDE = 512  # Twins of a model with a larger n_embd have a few of its heads.
LEAST_DROPPED = 20  # Elements of a pass: that two passes drop none has a chance of e^-40.
PART = 0.25  # Share of the tokens of a pass.
LATER = 7  # Positions by which all are raised.
TWIN_WINDOW, TWIN_CONTEXT = 3, 4  # Tokens, in twins that read 8.


def settings(subject: GuardSubject) -> Iterator[Fault | str]:
    """See that dropout drops, evaluation repeats, smoothing smooths, and each key of the model changes it."""
    yield from dropout_faults(subject)
    yield from position_faults(subject)
    yield from smoothing_faults(subject)
    for key in ignored_keys(subject.config.model):
        yield Fault(
            "setting-ignored",
            f"model.{key} was set to {getattr(subject.config.model, key)!r} and changes nothing",
            "it is stored and never read: look for where the model should use it",
        )
    model = subject.model
    tied = subject.config.model.tie_embeddings and not subject.config.lora.r
    if tied and model.head.weight is not model.embed.weight:
        yield Fault(
            "setting-ignored",
            "model.tie_embeddings is true, and embedding and head are two matrices",
            "nothing after the model is made may replace one of them: they train apart from then on",
        )
    yield from group_faults(subject)
    yield from rate_faults(subject)


def group_faults(subject: GuardSubject) -> Iterator[Fault]:
    """See that every parameter that trains and every setting of the optimizer is in a parameter group."""
    config = subject.config.optimizer.resolved()
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    listed = [id(p) for group in groups for p in group["params"]]
    left_out = [
        n for n, p in subject.model.named_parameters() if p.requires_grad and listed.count(id(p)) != 1
    ]
    if left_out:
        yield Fault(
            "parameter-not-updated",
            f"{left_out[0]}, of {len(left_out)} such parameters, is in no group of an optimizer, or in two",
            "build the optimizers last: what replaces a parameter afterwards is never updated",
        )
    adam = [group for group in groups if "betas" in group]
    wrong = {
        "weight_decay": {g["weight_decay"] for g in groups} - {0.0, config.weight_decay},
        "weight_decay of matrices": {config.weight_decay} - {g["weight_decay"] for g in groups},
        "beta1, beta2": {tuple(g["betas"]) for g in adam} - {(config.beta1, config.beta2)},
        "eps": {g["eps"] for g in adam} - {config.eps},
    }
    for key, values in wrong.items():
        if values:
            yield Fault(
                "setting-ignored",
                f"optimizer.{key} differs between the settings and the parameter groups: {values}",
                "hand the settings to the groups",
            )


def rate_faults(subject: GuardSubject) -> Iterator[Fault]:
    """See that each parameter has the learning rate that is set for its kind."""
    config, lora = subject.config.optimizer.resolved(), subject.config.lora
    lr = config.lr or 0.0
    wider = subject.config.model.width_mult
    of_matrices = "muon_lr" if config.name == "muon" else "lr / model.width_mult"
    rates = {
        "lr": lr,
        "muon_lr": config.muon_lr,
        "embedding_lr": config.embedding_lr or lr,
        "lr / model.width_mult": lr / wider,
        "head_lr": (config.head_lr or lr) / wider,
        "lr times lora.lr_ratio": lr * lora.lr_ratio,
    }
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    given = {p: group["initial_lr"] for group in groups for p in group["params"]}
    for name, p in subject.model.named_parameters():
        if p not in given:
            continue
        if p.dim() < 2 or (".adapters." in name and name.endswith(".a")):
            key = "lr"
        elif ".adapters." in name and name.endswith(".b"):
            key = "lr times lora.lr_ratio"
        elif name.startswith("blocks."):
            key = of_matrices
        else:
            key = "head_lr" if name.startswith("head.") else "embedding_lr"
        if given[p] != rates[key]:
            yield Fault(
                "setting-ignored",
                f"optimizer.{key} is {rates[key]} and {name} has the learning rate {given[p]}",
                "hand the settings to the groups",
            )
            return


def smoothing_faults(subject: GuardSubject) -> Iterator[Fault]:
    """Compare the loss of one row with the textbook's, both what is minimised and what is reported."""
    batch = Batch(*(t[:1] for t in affordable(subject, subject.micro_batch(0), PART)))
    smoothing, z_loss = subject.config.optimizer.label_smoothing, subject.config.optimizer.z_loss
    with with_nonzero_weights(subject.model), torch.no_grad():
        subject.model.eval()
        with subject.precision.autocast():
            logits = subject.model(batch.tokens, batch.positions, batch.document_ids).flatten(0, 1).float()
        # The likeliest words as labels, for which smoothing costs most: on others it is lost in rounding.
        likely = logits.argmax(-1).view(batch.labels.shape)
        batch = batch._replace(labels=torch.where(batch.labels == IGNORE_INDEX, batch.labels, likely))
        loss = subject.loss(batch)

    def textbook(smoothing: float) -> float:
        return F.cross_entropy(
            logits,
            batch.labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=smoothing,
        ).item()

    is_target = batch.labels.flatten() != IGNORE_INDEX
    tolerance = tolerance_of(subject.precision)
    # Each target may be off by what rounding does to its logits; such errors add as squares.
    off = 3 * torch.finfo(subject.precision.dtype).eps * float(logits.abs().max())
    slack = off * math.sqrt(int(is_target.sum()))
    reported, minimised, plain = loss.cross_entropy.item(), loss.objective.item(), textbook(0.0)
    if not math.isclose(reported, plain, rel_tol=tolerance, abs_tol=slack):
        yield Fault(
            "score-not-plain-loss",
            f"the loss reported for a row is {reported:.4f} nats, and its plain cross-entropy {plain:.4f}",
            "perplexity and bits per byte come from the loss without label smoothing",
        )
    expected = textbook(smoothing) + z_loss * logits[is_target].logsumexp(-1).square().sum().item()
    if not math.isclose(minimised, expected, rel_tol=tolerance, abs_tol=slack):
        yield Fault(
            "objective-not-the-loss",
            f"with label_smoothing {smoothing} and z_loss {z_loss} a row's loss is {expected:.4f} nats, and "
            f"what is minimised is {minimised:.4f}",
            "smooth by the setting, over the targets only",
        )


def dropout_faults(subject: GuardSubject) -> Iterator[Fault]:
    """See that each kind of dropout drops, in every block and at its own rate, and in training only."""
    batch, model = affordable(subject, subject.micro_batch(0), PART), subject.config.model

    def twice(training: bool) -> bool:
        with with_nonzero_weights(subject.model), torch.no_grad():
            subject.model.train(training)
            # Hidden states, not the loss: a head of next to nothing hides all before it.
            with subject.precision.autocast():
                first, second = (
                    subject.model.hidden(batch.tokens, batch.positions, batch.document_ids) for _ in range(2)
                )
        return torch.equal(first, second)

    elements = batch.tokens.numel() * subject.model.config.n_embd
    for name, p, block, kept in dropout_sites(subject):
        with kept, through(subject.model, {block}):
            # A p that drops next to nothing of this batch leaves two passes equal by chance.
            if p * elements > LEAST_DROPPED and twice(training=True):
                yield Fault(
                    "dropout-ignored",
                    f"dropout of {name} is {p} and two passes with it alone are equal",
                    "two arms of a sweep over dropout would be one: apply it",
                )
                return
    requested = {model.dropout, model.embed_dropout, model.attention_dropout}
    wrong = {m.p for m in subject.model.modules() if isinstance(m, Dropout)} - requested
    if wrong:
        yield Fault(
            "dropout-ignored",
            f"the settings ask for dropout of {requested} and the model was built with {wrong}",
            "hand the setting to every part",
        )
    if model.dropout and (whole := undropped_blocks(subject, batch)):
        yield Fault(
            "dropout-ignored",
            f"{len(whole)} of {len(subject.model.blocks)} blocks, such as {whole[0]}, add what their dropout "
            "never sees",
            "drop what attention adds and what the MLP adds, in every block",
        )
    if not twice(training=False):
        yield Fault(
            "evaluation-not-repeatable",
            "two passes over one batch in evaluation mode differ",
            "switch dropout off in evaluation mode, and use no random number there",
        )


def undropped_blocks(subject: GuardSubject, batch: Batch) -> list[int]:
    """Return the numbers of blocks that are not the identity when their dropout drops everything."""
    blocks = subject.model.blocks
    different: list[int] = []

    def compare(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        if not torch.equal(args[0], output):
            different.append(list(blocks).index(module))

    hooks = [b.register_forward_hook(compare) for b in blocks]
    sites = [b.get_submodule("dropout") for b in blocks]
    hooks += [site.register_forward_hook(lambda module, args, output: 0 * args[0]) for site in sites]
    try:
        with with_nonzero_weights(subject.model), torch.no_grad():
            subject.model.train()
            with subject.precision.autocast():
                subject.model.hidden(batch.tokens, batch.positions, batch.document_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return different


def position_faults(subject: GuardSubject) -> Iterator[Fault]:
    """See that positions counted backwards change outputs, and raising all rotary positions does not."""
    config = subject.config.model
    batch = affordable(subject, subject.micro_batch(0), PART)
    T = batch.tokens.size(1)
    if config.position == "none" or T < 3:
        return
    forwards = torch.arange(T, device=batch.tokens.device).expand_as(batch.tokens)
    requested = [forwards, forwards.flip(1)]
    if config.position == "rotary" and not config.rotates_by_length:
        requested.append(forwards + LATER)
    # Without autocast where the weights allow it: rounding to 16 bits may change as much as a fault does.
    exact = all(p.dtype == torch.float32 for p in subject.model.parameters())
    least, share = (1e-3, 0.25) if exact else (0.02, 0.5)
    precision = contextlib.nullcontext() if exact else subject.precision.autocast()
    with with_nonzero_weights(subject.model), torch.no_grad(), precision:
        subject.model.eval()
        hidden, backwards, *later = (subject.model.hidden(batch.tokens, p).float() for p in requested)
    change, *moved = (float((other - hidden).norm() / hidden.norm()) for other in (backwards, *later))
    if moved and moved[0] > max(least, share * change):
        yield Fault(
            "positions-not-relative",
            f"outputs change by {moved[0]:.1%} when all rotary positions are {LATER} more, and by "
            f"{change:.1%} when they are counted backwards",
            "rotate queries and keys alike: only the distance between two tokens may matter",
        )
    if torch.equal(hidden, backwards):
        yield Fault(
            "positions-ignored",
            f"position is {config.position}, and positions counted backwards change nothing",
            "hand the positions of the batch to the model, which may not count its own",
        )


def dropout_sites(
    subject: GuardSubject,
) -> Iterator[tuple[str, float, int, contextlib.AbstractContextManager]]:
    """Yield one dropout of each kind: its name, rate, block, and a context in which it is the only one.

    Only that block need be run. An adapter that starts at the base's largest parts (PiSSA) adds
    nothing yet, so that its dropout cannot be seen.
    """
    model, config = subject.model, subject.model.config
    modules = dict(model.named_modules())
    sites: list[tuple[str, float | None, int, torch.nn.Module]] = [
        ("the embedding", config.embed_dropout, 0, modules["dropout"]),
        ("a block", config.dropout, 0, modules["blocks.0.dropout"]),
        ("attention", config.attention_dropout, 0, modules["blocks.0.attention.dropout"]),
    ]
    adapters = (
        (i, m) for i, block in enumerate(model.blocks) for m in block.modules() if isinstance(m, LowRank)
    )
    for i, adapter in itertools.islice(adapters, subject.config.lora.init != "pissa"):
        sites.append(("an adapter", subject.config.lora.dropout, i, adapter))

    @contextlib.contextmanager
    def alone(site: torch.nn.Module) -> Iterator[None]:
        rates = {m: m.p for m in model.modules() if isinstance(m, Dropout | LowRank) and m is not site}
        try:
            for module in rates:
                module.p = 0.0
            yield
        finally:
            for module, rate in rates.items():
                module.p = rate

    for name, p, block, site in sites:
        yield name, p or 0.0, block, alone(site)


def ignored_keys(config: ModelConfig) -> Iterator[str]:
    """Yield keys that are not the default although a model without them has the same weights and outputs.

    Small twins are compared, of at most two layers and 64 words, whose weights are sampled from one seed.
    """
    default = ModelConfig()
    small = replace(
        config,
        vocab_size=64,
        n_layer=min(config.n_layer, 2),
        block_size=8,
        sliding_window=min(config.sliding_window, TWIN_WINDOW),
        window_layers=(),
        unrotated_layers=(),
        rope_context=TWIN_CONTEXT if config.rope_context else 0,
    )
    if config.n_embd > WIDE:  # The same parts in a few heads: the true width would take seconds a key.
        heads, shared = {1: (2, 1), config.n_head: (2, 2)}.get(config.n_kv_head, (4, 2))
        width = heads * config.head_dim
        small = replace(small, n_head=heads, n_kv_head=shared, n_embd=width, n_inner=2 * width)
    own, known = None, settings_of(ModelConfig)
    for key, value in vars(ModelConfig()).items():
        if not known[key].compared or getattr(config, key) == value:
            continue
        if key == "rope_theta" and config.rotary_dim <= 2:  # Its one frequency is theta^0.
            continue
        if key == "rope_scaling" and config.rope_factor == 1:  # It leaves most frequencies as they are.
            continue
        other = replace(small, **{key: 1 if key == "n_layer" else getattr(default, key)})
        with contextlib.suppress(ValueError):  # The default may not go with the other keys.
            if other.resolved() != small.resolved():
                own = own or twin(small)
                if same_twins(own, twin(other.resolved())):
                    yield key


def twin(config: ModelConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Return the initial weights of a small model from one seed, and its logits in training with others."""
    seed_torch(0, torch.device("cpu"))
    model = Decoder(config)
    initial = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():  # Biases that start at zero and scales that start at one hide much.
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    seed_torch(1, torch.device("cpu"))
    with torch.no_grad():
        return initial, model(torch.arange(16).view(2, 8))


def same_twins(one: tuple[dict[str, Tensor], Tensor], other: tuple[dict[str, Tensor], Tensor]) -> bool:
    """Return whether two results of `twin` have the same initial weights and the same logits."""
    (weights, logits), (other_weights, other_logits) = one, other
    same = weights.keys() == other_weights.keys() and all(
        torch.equal(p, other_weights[name]) for name, p in weights.items()
    )
    return same and torch.equal(logits, other_logits)
