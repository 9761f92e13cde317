"""The training loop: `TrainingManager.fit`, and `update`, the one step that it repeats.

One step: Batches.batch(number) -> token_loss -> backward -> unscale -> clip -> step -> schedule -> log.
Several processes may share it; training/distributed.py says who does what.
`training/begin.py` makes a manager from settings, and hands it to the guards before it trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

from architecture import Decoder
from config import Config
from data.curriculum import difficulties
from dataset import IGNORE_INDEX, Batch, Batches, PreparedData, validation_batches
from guards.preflight import record_overrides
from guards.reference.live import DerivedSteps
from guards.subject import GuardSubject
from modules.precision import Precision, evaluation_precision, release_freed_memory
from modules.tensorfiles import save_tensors
from tokenizer import Tokenizer
from training.checkpoint import (
    Manifest,
    changed_weight,
    first_difference,
    load_state,
    load_weights,
    newest_whole,
    not_finite,
    read_manifest,
    remove_superseded,
    save_checkpoint,
)
from training.distributed import ALONE, World, in_turns, shared_rows
from training.log import Log, say, show_progress, training_bar
from training.loss import BatchSums, TokenLoss, TokenScores, sums_of_batches, token_loss, total
from training.optim import Muon, build_optimizers, learning_rate_factor, orthogonalise
from training.random_state import gpu_state, random_states, seed_pass, set_random_states
from training.reduction import Reduction
from training.runfolder import config_fingerprint
from training.signals import leave, signals_noted
from training.state import RunState, budget_used, still_falling

NOT_FINITE_IN_A_ROW = 3  # Updates that are skipped before the run ends.
NOT_FINITE_IN_FP16 = 20  # The same in fp16, whose scaler finds its scale by skipping updates.


class BudgetUsed(ValueError):
    """A run is resumed whose budget is used up: there is nothing left to train."""

    def __init__(self, manager: TrainingManager):
        self.manager = manager
        super().__init__(
            f"the budget of {manager.folder} is used up at step {manager.state.step}; to go on, raise what "
            "ended it: --max_steps, --max_epochs and --max_seconds count from the run's beginning"
        )


@dataclass(frozen=True)
class Observer:
    """Functions that the loop calls.

    Attributes:
        on_step: Takes the manager and what was logged of a step, with its validation if there was one; True
            ends the run.
        on_save: Takes the manifest of a checkpoint, which is whole on the disk.
        on_second_signal: Takes the number of a signal that comes while the first one is heeded.
    """

    on_step: Callable[[TrainingManager, dict[str, float]], bool] = lambda manager, values: False
    on_save: Callable[[Manifest], None] = lambda manifest: None
    on_second_signal: Callable[[int], NoReturn] = leave


UNOBSERVED = Observer()


class TrainingManager:
    """One run: its model, optimizers, data order, logs and checkpoints.

    Args:
        config: The resolved settings.
        model: The model, on its device.
        data: Token stores of the splits.
        precision: The device, and the number format of its products.
        folder: The run's folder.
        observer: Functions to call after each step and each save, in the first of several processes.
        world: The processes that share the run.
    """

    def __init__(
        self,
        config: Config,
        model: Decoder,
        data: PreparedData,
        precision: Precision,
        folder: Path,
        observer: Observer = UNOBSERVED,
        world: World = ALONE,
    ):
        config = config.with_optimizer_defaults()
        self.config, self.model, self.data, self.folder = config, model, data, folder
        self.observer, self.precision, self.device = observer, precision, precision.device
        self.world = world
        train, stored_as = config.train, model.embed.weight.dtype
        self.eval_precision = evaluation_precision(precision, train.eval_precision, stored_as)
        self.state = RunState()
        by_difficulty = config.data.order not in ("shuffled", "sequential")
        self.batches = Batches(
            data.train,
            train.batch_size,
            config.row_length,
            train.seed,
            world.rank,
            world.size,
            loss_on_prompts=config.data.loss_on == "all",
            order=config.data.order,
            difficulty=difficulties(data.train, config.data.difficulty) if by_difficulty else None,
            accumulation=train.accumulation,
        )
        self.optimizers = build_optimizers(
            model, config.optimizer, config.lora.lr_ratio, config.model.width_mult
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.dtype == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.reduction = Reduction(world, self.parameters) if world.size > 1 else None
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon) and world.size > 1:
                optimizer.orthogonalise = self.orthogonalised
        # The average of all held-out files: a validation on the way reads a part of them only.
        self.targets_per_byte = data.validation.n_targets / data.validation.n_bytes
        self.stop_signal: int | None = None
        self.agreed_signal: int | None = None  # That of any process, once all of them know of it.
        self.saved_step: int | None = None
        self.began = 0.0  # On the clock, as if all stretches of the run had been one.
        self.resumed_from: Manifest | None = None
        self.failed_loggers: frozenset[str] = frozenset()
        if train.activation_checkpointing:
            model.recompute_in_backward("blocks")
        elif config.lora.r:
            model.recompute_in_backward("cheap outputs")

    def subject(
        self, tokenizer: Tokenizer, start: str, known_ids: int | None, base_folder: Path | None = None
    ) -> GuardSubject:
        """Return what the guards look at: the very objects that train. `GuardSubject` has the arguments."""
        return GuardSubject(
            config=self.config,
            model=self.model,
            tokenizer=tokenizer,
            train=self.data.train,
            validation=self.data.validation,
            test=self.data.test,
            first_documents=self.data.first_documents,
            micro_batch=self.micro_batch,
            batches=self.batches,
            validation_batches=lambda n: self.validation_batches(n * self.config.train.batch_size),
            loss=self.loss,
            score=self.score,
            precision=self.precision,
            eval_precision=self.eval_precision,
            optimizers=self.optimizers,
            scaler=self.scaler,
            start=start,
            targets_per_byte=self.targets_per_byte,
            known_ids=known_ids,
            base_folder=base_folder,
            state=self.state,
            set_rates=self.set_rates,
            progress=self.progress,
            update=self.update,
            update_on=self.update_on,
            folder=self.folder,
            checkpoint=None if self.resumed_from is None else self.resumed_from.folder,
            world=self.world,
        )

    # --- the loop ------------------------------------------------------------------------------------

    def fit(self, subject: GuardSubject, warn: bool = True) -> None:
        """Train until the budget is used, patience ends, or a signal or the observer ends the run; then save.

        Args:
            subject: What the guards of the first updates look at.
            warn: Whether to warn of a budget that ended while the loss still fell steeply.

        Raises:
            ValueError: A guard refuses an update, or what would be saved is not finite.
        """
        train = self.config.train
        self.began = time.perf_counter() - self.state.seconds
        tokens_before, seconds_before = self.state.tokens, self.state.seconds
        if train.compile:  # After the guards, for whose many shapes it would compile again and again.
            compile_blocks(self.model)
        losses: list[float] = []  # The training loss of each step of this stretch, in nats a token.
        first_steps = DerivedSteps(subject, train.allow, self.state.step, self.progress())
        self.refuse_difference()  # Once more: since the checkpoint was restored nothing may have changed.
        with (
            Log(self.folder, self.state.step, self.config, self.world.is_first) as log,
            contextlib.closing(first_steps),
            signals_noted(self, self.observer.on_second_signal, self.world.is_first),
            training_bar() as bar,
        ):
            ended = False
            while self.goes_on(ended):
                values = self.update()
                step, self.state.seconds = self.state.step, self.world.of_first(self.elapsed())
                losses.append(values["train/loss"])
                is_finite = math.isfinite(losses[-1]) and math.isfinite(values["train/grad_norm"])
                if first_steps.after(self.progress(), skipped=not is_finite):
                    self.record(first_steps)  # Now: a killed run keeps it too.
                rate = (self.state.tokens - tokens_before) / (self.state.seconds - seconds_before)
                text = f"step {step}  loss {losses[-1]:.3f}  {rate:,.0f} tokens/s"
                show_progress(bar, text, self.progress(), self.state.seconds)
                if step == 1 or step % train.log_every == 0:
                    log.write(step, values | {"train/tokens_per_second": rate})
                due = bool(train.validate_every) and step % train.validate_every == 0
                if due or (train.save_every and step % train.save_every == 0):
                    values |= self.validate_save_and_compare(log, first_steps)
                # A proof of resume trains all its steps, however soon the model knows its files.
                if train.overfit and not train.prove_resume and due and self.knows_by_heart(self.validate()):
                    break
                ended = self.world.is_first and self.observer.on_step(self, values)
            if first_steps.finish():
                self.record(first_steps)
            if self.out_of_patience():
                say(f"stopped early: {train.patience} validations without a better loss")
            if self.saved_step != self.state.step and self.agreed_signal is not None and self.progress() < 1:
                self.save(None)  # Without a validation, which a run that is not stopped would not have here.
            elif self.saved_step != self.state.step:
                self.validate_save_and_compare(log, first_steps)
        self.stop_signal = self.stop_signal or self.agreed_signal
        self.failed_loggers = log.failed_loggers()
        ended = self.resumed_from is None and self.progress() >= 1
        if warn and ended and (warning := still_falling(losses)):
            print(f"warning: {warning}", file=sys.stderr)

    def goes_on(self, ended: bool) -> bool:
        """Return whether another update is made, which all processes decide alike.

        Args:
            ended: Whether the observer ends the run.
        """
        signal, ends = self.world.largest(self.stop_signal or 0, ended)
        self.agreed_signal = int(signal) or None
        return not (ends or signal or self.progress() >= 1 or self.out_of_patience())

    def elapsed(self) -> float:
        """Return the seconds of training by this process's clock, all stretches of the run together."""
        return time.perf_counter() - self.began

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process compute without the others, which do something else or wait."""
        world, self.world = self.world, ALONE
        try:
            yield
        finally:
            self.world = world

    def orthogonalised(self, matrices: torch.Tensor) -> torch.Tensor:
        """Return Muon's updates of matrices, of which each process computes its share."""
        return shared_rows(self.world, matrices, orthogonalise)

    def record(self, first_steps: DerivedSteps) -> None:
        """Write down which faults of the first updates were let pass."""
        if self.world.is_first:
            record_overrides(self.folder, first_steps.passed)

    def update(self) -> dict[str, float]:
        """Take the next optimizer step, over its micro-batches; return what is logged of it."""
        first = self.state.step * self.batches.per_update
        micro_batches = [self.micro_batch(first + i) for i in range(self.batches.per_update)]
        return self.update_on(micro_batches, self.progress())

    def update_on(self, micro_batches: list[Batch], progress: float) -> dict[str, float]:
        """Take one optimizer step over micro-batches, as of a share of the budget."""
        # The gradient is that of the mean over the targets of the whole step, as if it were one batch.
        own_targets = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in micro_batches)
        targets = int(self.world.sum(own_targets)[0])
        if targets == 0:
            raise ValueError(f"no token of step {self.state.step + 1} is a target; check the data's labels")
        self.model.train()
        reduction = self.reduction if self.world.size > 1 else None
        nll = 0.0
        for number, batch in enumerate(micro_batches):
            if self.batches.version > 1:  # Before, the state of the generators went on from pass to pass.
                seed_pass(
                    self.config.train.seed, self.state.step, self.batches.first_row(number), self.device
                )
            loss = self.loss(batch)
            if reduction is not None and number == len(micro_batches) - 1:
                reduction.begin()
            self.scaler.scale(loss.objective / targets).backward()
            nll += loss.cross_entropy.item()
            del loss  # With its graph, whose memory the next forward pass needs.
        if reduction is not None:
            reduction.finish()
        (nll,) = self.world.sum(nll)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_clip = self.config.optimizer.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, grad_clip).item()
        self.set_rates(progress)
        is_finite = math.isfinite(norm) and math.isfinite(nll)
        for optimizer in self.optimizers:
            if is_finite:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += targets
        self.count_skipped(is_finite, micro_batches)
        return {
            "train/loss": nll / targets,
            "train/learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": norm,
            "train/epoch": self.epoch(),
        }

    def set_rates(self, progress: float) -> None:
        """Set the learning rate of every group to what the schedule says of the next step."""
        factor = learning_rate_factor(self.config.optimizer, self.state.step, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def micro_batch(self, number: int) -> Batch:
        """Return a batch of training by its number since the run began, on the device."""
        return Batch(*(t.to(self.device, non_blocking=True) for t in self.batches.batch(number)))

    def loss(self, batch: Batch) -> TokenLoss:
        """Compute the loss of training in its precision, label smoothing and z-loss included."""
        with self.precision.autocast():
            optimizer = self.config.optimizer
            return token_loss(self.model, batch, optimizer.label_smoothing, optimizer.z_loss)

    def count_skipped(self, is_finite: bool, micro_batches: list[Batch]) -> None:
        """Count an update that was skipped since it was not finite; ValueError after too many in a row."""
        state = self.state
        state.skipped_in_a_row = 0 if is_finite else state.skipped_in_a_row + 1
        if is_finite:
            return
        state.skipped_updates += 1
        limit = NOT_FINITE_IN_FP16 if self.scaler.is_enabled() else NOT_FINITE_IN_A_ROW
        if state.skipped_in_a_row >= limit:
            rank = f"-process-{self.world.rank}" if self.world.size > 1 else ""  # Each has rows of its own.
            name = f"not-finite-step-{state.step}{rank}.safetensors"
            where = save_batches(self.folder / name, micro_batches)
            raise ValueError(
                f"loss or gradient was not finite {limit} times in a row, up to step {state.step}, whose "
                f"batch is {where}; {self.remedy()}"
            )

    def remedy(self) -> str:
        """Say what helps against numbers that are not finite.

        A resumed run may change its precision, but not its learning rate.
        """
        slower = "start another --run with a lower learning rate"
        if self.precision.dtype == torch.float32:
            return slower
        return f"go on with --resume --precision fp32, or {slower}"

    def epoch(self) -> float:
        """Return how many passes over the training data are done."""
        return self.batches.epoch(self.state.step)

    def progress(self) -> float:
        """Return the share of the budget that is used; the run ends at 1."""
        return budget_used(self.config.train, self.state.step, self.epoch(), self.state.seconds)

    def out_of_patience(self) -> bool:
        """Return whether too many validations in a row brought no better loss."""
        patience = self.config.train.patience
        return bool(patience) and self.state.validations_without_better >= patience

    # --- validation and checkpoints ------------------------------------------------------------------

    def validate(self, limit: int = 0) -> TokenScores:
        """Return the scores of `limit` rows spread evenly over the validation files; 0 reads all of them."""
        release_freed_memory()
        scores = self.score(self.validation_batches(limit, self.world.rank, self.world.size))
        release_freed_memory()
        return scores

    def score(self, batches: Iterable[Batch]) -> TokenScores:
        """Return the scores of the batches of all processes, in the precision of validation.

        The sums of these are added in the order that one process has.
        """
        own = [tuple(sums) for sums in sums_of_batches(self.model, batches, self.eval_precision)]
        return total(BatchSums(*sums) for sums in in_turns(self.world.gather(own)))

    def validation_batches(self, limit: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the batches that `validate` reads, or those of one of several processes."""
        rows, length = self.config.train.batch_size, self.config.row_length
        return validation_batches(self.data.validation, rows, length, limit, rank, world_size)

    def knows_by_heart(self, scores: TokenScores) -> bool:
        """Return whether all is predicted but the first token of each file: nothing tells those apart."""
        may_miss = 0 if self.data.train.holds_examples else self.data.train.n_documents - 1
        return round((1 - scores.top1) * scores.tokens) <= may_miss

    def validate_save_and_compare(self, log: Log, first_steps: DerivedSteps) -> dict[str, float]:
        """Validate and save, and let the guard derive both again; return what is logged."""
        if first_steps.compare_weights():
            self.record(first_steps)
        values = self.validate_and_save(log)
        if self.world.is_first:
            with self.alone():
                passed = first_steps.after_save(values, is_last=self.progress() >= 1)
            if passed:
                self.record(first_steps)
        self.world.told(None)  # Rank 0 has saved, which may take long.
        return values

    def validate_and_save(self, log: Log) -> dict[str, float]:
        """Validate, count patience, log and save, and only then print; return what is logged."""
        train, state = self.config.train, self.state
        scores = self.validate(train.validation_rows)
        state.seconds = self.world.of_first(self.elapsed())  # Before it is saved: a resume counts it.
        if not math.isfinite(scores.loss):
            raise ValueError(
                f"the validation loss of step {state.step} is {scores.loss}, so it was not saved; "
                f"{self.remedy()}"
            )
        better = scores.loss < state.best_loss
        state.best_loss = min(scores.loss, state.best_loss)
        state.validations_without_better = 0 if better else state.validations_without_better + 1
        # Logged first: a resume drops the lines after its checkpoint, but cannot add one.
        values = {
            "eval/loss": scores.loss,
            "eval/perplexity": scores.perplexity,
            "eval/bits_per_byte": scores.loss / math.log(2) * self.targets_per_byte,
            "eval/top1": scores.top1,
        }
        log.write(state.step, values)
        log.to_disk()
        self.save(scores.loss)
        say(
            f"step {state.step}: validation loss {scores.loss:.3f}, top-1 {scores.top1:.1%}"
            + (", the best so far" if better else "")
        )
        return values

    def save(self, loss: float | None) -> None:
        """Write a checkpoint and remove what is superseded; ValueError if a tensor of it is not finite."""
        train, step = self.config.train, self.state.step
        self.saved_step = step
        if not self.world.is_first:
            return
        state = self.whole_state()
        wrong = not_finite(self.model, state)
        if wrong is not None:
            raise ValueError(f"{wrong} of step {step} is not finite, so it was not saved; {self.remedy()}")
        folder = self.folder / "checkpoints"
        keep = bool(train.save_every) and step % train.save_every == 0
        manifest = save_checkpoint(folder, step, self.model, state, loss, keep)
        remove_superseded(folder, train.keep)
        self.observer.on_save(manifest)

    def whole_state(self) -> dict[str, Any]:
        """Return all that a resumed run needs besides the weights, and what it must find unchanged."""
        return {
            "run": dataclasses.asdict(self.state) | {"best_loss": repr(self.state.best_loss)},
            "epoch": self.epoch(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": random_states(self.device),
            "fingerprints": {
                "config": config_fingerprint(self.config),
                "data": self.data.fingerprint,
                "tokenizer": self.data.train.tokenizer_fingerprint,
                "corpus": self.data.report.corpus,
            },
        } | ({"order_version": self.batches.version} if self.batches.version > 1 else {})

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole; print which damaged ones were passed over.

        Raises:
            ValueError: None is whole, or what was restored is not what the checkpoint holds.
            BudgetUsed: Nothing is left to train.
        """
        newest = newest_whole(self.folder / "checkpoints") if self.world.is_first else None
        manifest = read_manifest(Path(self.world.told(newest and str(newest.folder))))
        load_weights(self.model, manifest)
        state = load_state(manifest)
        self.state = RunState(**state["run"] | {"best_loss": float(state["run"]["best_loss"])})
        if (version := state.get("order_version", 1)) != self.batches.version:
            self.batches = self.batches.altered(version=version)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"], self.device)
        had_gpu = bool(state["random"]["cuda"])
        if had_gpu != (self.device.type == "cuda") or bool(state["scaler"]) != self.scaler.is_enabled():
            print(
                f"warning: the run was on {'a GPU' if had_gpu else 'a CPU'} and is on {self.device} now, or "
                "its precision is another one; from here on it differs from one that was never stopped",
                file=sys.stderr,
            )
        self.saved_step = self.state.step
        self.resumed_from = manifest
        self.refuse_difference()
        if self.progress() >= 1:
            raise BudgetUsed(self)
        print(f"resumed from {manifest.folder} at step {self.state.step}")

    def refuse_difference(self) -> None:
        """Raise a ValueError that names what differs from the checkpoint that was restored, if one was."""
        manifest = self.resumed_from
        if manifest is None:
            return
        saved, own = load_state(manifest), self.whole_state()
        if bool(saved["scaler"]) != bool(own["scaler"]):  # `resume` warned of another precision.
            saved["scaler"] = own["scaler"]
        gpu = gpu_state(saved["random"], self.device)  # None where `resume` warned of another device.
        saved["random"]["cuda"] = own["random"]["cuda"] if gpu is None else [gpu]
        name = "run/step" if self.state.step != manifest.step else changed_weight(self.model, manifest)
        name = name or first_difference(saved, own)
        if name is not None:
            raise ValueError(
                f"{name} is not what {manifest.folder} holds, so the run would not go on as it was; if its "
                "data, tokenizer and config.yaml are its own, report a fault of this program"
            )


def save_batches(path: Path, micro_batches: list[Batch]) -> str:
    """Write the micro-batches of a step as `NUMBER/tokens` and so on; return where, or why not."""
    tensors = {
        f"{i}/{name}": t
        for i, batch in enumerate(micro_batches)
        for name, t in batch._asdict().items()
        if isinstance(t, torch.Tensor)
    }
    try:
        save_tensors(tensors, path)
    except (OSError, SafetensorError) as error:
        return f"lost ({error})"
    return f"in {path}"


def compile_blocks(model: Decoder) -> None:
    """Compile each block with torch.compile, or warn where this machine cannot compile."""
    try:
        probe = torch.compile(lambda x: x * 2 + 1)
        probe(torch.ones(2, device=next(model.parameters()).device))
    except Exception as error:  # Whatever is missing (g++, Python's headers, triton), eager is right.
        reason = str(error).strip().splitlines()[0]
        remedy = "on a CPU it needs g++ and Python's headers (apt install g++ python3-dev)"
        warnings.warn(f"torch.compile does not work here, running eager: {reason}; {remedy}", stacklevel=2)
        return
    for block in model.blocks:
        block.compile()
