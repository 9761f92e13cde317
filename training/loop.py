"""The training of a model.

One batch: Batches.batch(step) -> token_loss -> backward -> unscale -> clip -> step -> schedule -> log.
With no arguments it trains for 300 seconds on the interpreter's own standard library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from tqdm import tqdm

from architecture import Decoder
from config import Config, TrainConfig, unread_rates, write_atomically
from config.console import printable
from config.files import code_fingerprint
from config.yamlfile import read_yaml
from data.curriculum import difficulties
from data.fim import fim_markers
from data.tokenstore import TokenStore
from dataset import (
    GAPS_SEEN,
    IGNORE_INDEX,
    Batch,
    Batches,
    PreparedData,
    fitting_row,
    gaps_in_sight,
    is_trimmed,
    prepare_data,
    prepare_tokenizer,
    refuse_long_answers,
    stored_data,
    validation_batches,
)
from generation.settings import GenerationConfig
from generation.text import generate
from guards.first_steps import FirstSteps
from guards.preflight import Subject, preflight, record_overrides
from guards.subject import refuse_unknown_faults
from lora import trainable_table
from modules.precision import (
    Precision,
    choose_device,
    choose_precision,
    evaluation_precision,
    keep_freed_memory,
    release_freed_memory,
)
from modules.quantize import n_weights
from modules.tensorfiles import save_tensors
from suites.closing import closing_lines, flags_of, shown_examples
from suites.evaluate import evaluate, table, write_results
from suites.evaluated import data_config, data_of
from suites.functions import sample_completions
from suites.records import read_evaluation
from suites.settings import EvalConfig
from suites.stored import text_of_example
from tokenizer import Tokenizer
from training.beforehand import refuse_mistakes
from training.checkpoint import (
    Manifest,
    best_of,
    changed_weight,
    checkpoints,
    first_difference,
    load_counters,
    load_state,
    load_weights,
    newest_whole,
    not_finite,
    remove_superseded,
    save_checkpoint,
)
from training.curves import draw_curves
from training.loss import Scores, TokenLoss, score, token_loss
from training.optim import (
    ParameterGroup,
    build_optimizers,
    groups_table,
    learning_rate_factor,
    parameter_groups,
)
from training.outputs import OUTPUTS, note_made, outputs_made
from training.run import (
    Run,
    adopted,
    export_adapter,
    gaps_began_bare,
    load_run,
    open_base,
    starting_model,
    starting_tokenizer,
)
from training.runfolder import (
    claimed_folder,
    config_fingerprint,
    note_base,
    refuse_changes,
    refuse_other_data,
    with_data_resolved,
)

DEFAULT_SECONDS = 300.0
RESUMABLE = 75  # exit code of a run that was asked to stop and can go on with --resume (EX_TEMPFAIL)
SAME_SIGNAL = 0.1  # seconds
LEAST_QUARTER = 5  # steps; of fewer the mean loss says little
STEEP = 0.1  # of all that the training loss fell, and nats a token: more in the last quarter is steep


class BudgetUsed(ValueError):
    """A run is resumed whose budget is used up: there is nothing left to train."""

    def __init__(self, manager: TrainingManager):
        self.manager = manager
        super().__init__(
            f"the budget of {manager.folder} is used up at step {manager.state.step}; to go on, raise what "
            "ended it: --max_steps, --max_epochs and --max_seconds count from the run's beginning"
        )


# Told of each step, with what was logged of it and of its validation, if there was one; True ends the run.
Observer = Callable[["TrainingManager", dict[str, float]], bool]


@dataclass
class RunState:
    """All that changes while a run goes on, besides weights, optimizers and random states. Saved whole."""

    step: int = 0  # updates done; with the seed it is also the position in the data
    tokens: int = 0  # that bore loss
    seconds: float = 0.0  # of training, over all resumes
    best_loss: float = math.inf
    validations_without_better: int = 0
    skipped_updates: int = 0  # for a loss or gradient that was not finite
    skipped_in_a_row: int = 0


def budget_used(train: TrainConfig, step: int, epoch: float, seconds: float) -> float:
    """The share of it: of steps, epochs or seconds, whichever is furthest."""
    shares = [0.0]
    if train.max_steps:
        shares.append(step / train.max_steps)
    if train.max_epochs:
        shares.append(epoch / train.max_epochs)
    if train.max_seconds or len(shares) == 1:
        shares.append(seconds / (train.max_seconds or DEFAULT_SECONDS))
    return max(shares)


class TrainingManager:
    """Owns one run: model, optimizers, data order, logs and checkpoints.

    Args:
        config: The resolved settings.
        model: On its device.
        data: Token stores of the sides of the split.
        folder: Of the run.
    """

    def __init__(
        self, config: Config, model: Decoder, data: PreparedData, precision: Precision, folder: Path
    ):
        config = config.with_optimizer_defaults()
        self.config, self.model, self.data, self.folder = config, model, data, folder
        self.precision = precision
        train = config.train
        held = model.embed.weight.dtype
        self.eval_precision = evaluation_precision(precision, train.eval_precision, held)
        self.device = precision.device
        self.state = RunState()
        by_difficulty = config.data.order not in ("shuffled", "sequential")
        self.batches = Batches(
            data.train,
            train.batch_size,
            config.row_length,
            train.seed,
            loss_on_prompts=config.data.loss_on == "all",
            order=config.data.order,
            difficulty=difficulties(data.train, config.data.difficulty) if by_difficulty else None,
        )
        self.optimizers = build_optimizers(
            model, config.optimizer, config.lora.lr_ratio, config.model.widening
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.dtype == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # A validation on the way reads a part of the files only, so its bytes are taken from the average.
        held_out = data.validation
        self.targets_per_byte = held_out.n_targets / held_out.n_bytes
        self.stop_signal: int | None = None
        self.saved_step: int | None = None
        self.began = 0.0  # on the clock, as if all of it had been one stretch
        self.resumed_from: Manifest | None = None
        model.checkpoint_activations = train.activation_checkpointing
        if config.lora.r and not train.activation_checkpointing:  # whole blocks are made again there
            model.keep_less()

    def subject(self, tokenizer: Tokenizer, start: str, known_ids: int | None) -> Subject:
        """What the guards look at; `start` and `known_ids` as they say."""
        return Subject(
            config=self.config,
            model=self.model,
            tokenizer=tokenizer,
            train=self.data.train,
            validation=self.data.validation,
            test=self.data.test,
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
            known_ids=known_ids,
        )

    # --- the loop ------------------------------------------------------------------------------------

    def fit(self, subject: Subject, observer: Observer | None = None, warn: bool = True) -> None:
        """Train until the budget is used, patience ends, or a signal or the observer says so; then save.

        Args:
            warn: Of a budget that ended while the loss still fell steeply.
        """
        train = self.config.train
        self.began = time.perf_counter() - self.state.seconds
        tokens_at_start, seconds_at_start = self.state.tokens, self.state.seconds
        if self.config.train.compile:  # after the guards, which would compile for many shapes
            compile_blocks(self.model)
        losses: list[float] = []  # of training, of each step since the run began
        watch = FirstSteps(subject, self.config.train.allow, self.state.step, self.progress())
        self.refuse_difference()  # again: between resume and here nothing may have changed
        with (
            contextlib.closing(Log(self.folder, self.state.step)) as log,
            contextlib.closing(watch),
            signals_noted(self),
            progress_bar() as bar,
        ):
            while self.progress() < 1 and self.stop_signal is None and not self.out_of_patience():
                values = self.update()
                self.state.seconds = time.perf_counter() - self.began
                losses.append(values["train/loss"])
                step = self.state.step
                if watch.after(self.progress(), self.state.skipped_in_a_row > 0):
                    record_overrides(self.folder, watch.passed)  # at once: a killed run keeps the record too
                rate = (self.state.tokens - tokens_at_start) / (self.state.seconds - seconds_at_start)
                self.show(bar, values["train/loss"], rate)
                if step == 1 or step % train.log_every == 0:
                    log.write(step, values | {"train/tokens_per_second": rate})
                due = bool(train.validate_every) and step % train.validate_every == 0
                if due or (train.save_every and step % train.save_every == 0):
                    values |= self.validate_and_save(log)
                if train.overfit and not train.prove_resume and due and self.knows_by_heart(self.validate()):
                    break
                if observer is not None and observer(self, values):
                    break
            if watch.finish():
                record_overrides(self.folder, watch.passed)
            if self.out_of_patience():
                say(f"stopped early: {train.patience} validations without a better loss")
            if self.saved_step != self.state.step and self.stop_signal is not None and self.progress() < 1:
                self.save(None)  # without a validation, which a run that is not stopped would not have here
            elif self.saved_step != self.state.step:
                self.validate_and_save(log)
        ended = self.resumed_from is None and self.progress() >= 1
        if warn and ended and (told := still_falling(losses)):
            print(f"warning: {told}", file=sys.stderr)

    def update(self) -> dict[str, float]:
        """One optimizer step over `accumulation` micro-batches; returns what is logged."""
        train, optimizer_config = self.config.train, self.config.optimizer
        first = self.state.step * train.accumulation
        micro = [self.micro_batch(first + i) for i in range(train.accumulation)]
        # Divided by the loss-bearing tokens of the whole step: ragged micro-batches weigh what they hold.
        tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in micro)
        if tokens == 0:
            raise ValueError(f"no token of step {self.state.step + 1} bears loss; check the data's labels")
        self.model.train()
        nats = 0.0
        for batch in micro:
            loss = self.loss(batch)
            self.scaler.scale(loss.objective / tokens).backward()
            nats += loss.cross_entropy.item()
            del loss  # its graph: the next forward pass needs the memory
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, optimizer_config.grad_clip or math.inf).item()
        factor = learning_rate_factor(optimizer_config, self.state.step, self.progress())
        finite = math.isfinite(norm) and math.isfinite(nats)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            if finite:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += tokens
        self.count_skipped(finite, micro)
        return {
            "train/loss": nats / tokens,
            "train/learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": norm,
            "train/epoch": self.epoch(),
        }

    def micro_batch(self, number: int) -> Batch:
        return Batch(*(t.to(self.device, non_blocking=True) for t in self.batches.batch(number)))

    def loss(self, batch: Batch) -> TokenLoss:
        """Of training, in its precision."""
        with self.precision.autocast():
            optimizer = self.config.optimizer
            return token_loss(self.model, batch, optimizer.label_smoothing, optimizer.z_loss)

    def count_skipped(self, finite: bool, micro: list[Batch]) -> None:
        """Skipped are updates that are not finite; three in a row end the run (fp16's scaler may skip 20)."""
        state = self.state
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        if finite:
            return
        state.skipped_updates += 1
        limit = 20 if self.scaler.is_enabled() else 3
        if state.skipped_in_a_row >= limit:
            where = save_batches(self.folder / f"not-finite-step-{state.step}.safetensors", micro)
            raise ValueError(
                f"loss or gradient was not finite {limit} times in a row, up to step {state.step}, whose "
                f"batch is {where}; {self.remedy()}"
            )

    def remedy(self) -> str:
        """Against what is not finite. The learning rate of a run is fixed, its precision is not."""
        slower = "start another --run with a lower learning rate"
        if self.precision.dtype == torch.float32:
            return slower
        return f"go on with --resume --precision fp32, or {slower}"

    def epoch(self) -> float:
        return self.state.step * self.config.train.accumulation / self.batches.steps_per_epoch

    def progress(self) -> float:
        return budget_used(self.config.train, self.state.step, self.epoch(), self.state.seconds)

    def out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return bool(patience) and self.state.validations_without_better >= patience

    # --- validation, checkpoints, what is shown ------------------------------------------------------

    def validate(self, limit: int = 0) -> Scores:
        """Scores on `limit` rows spread evenly over the validation files; 0 reads all of them."""
        release_freed_memory()
        scores = self.score(self.validation_batches(limit))
        release_freed_memory()
        return scores

    def score(self, batches: Iterable[Batch]) -> Scores:
        """Of validation, in its precision."""
        return score(self.model, batches, self.eval_precision)

    def validation_batches(self, limit: int = 0) -> Iterator[Batch]:
        rows, length = self.config.train.batch_size, self.config.row_length
        return validation_batches(self.data.validation, rows, length, limit)

    def knows_by_heart(self, scores: Scores) -> bool:
        """Whether every token is predicted, but for the files' first ones: nothing tells those apart."""
        unforeseen = 0 if self.data.train.holds_examples else self.data.train.n_documents - 1
        return round((1 - scores.top1) * scores.tokens) <= unforeseen

    def validate_and_save(self, log: Log) -> dict[str, float]:
        """Validate, keep count of patience, and save; only then tell. Returns what is logged."""
        train, state = self.config.train, self.state
        scores = self.validate(train.validation_rows)
        state.seconds = time.perf_counter() - self.began  # before it is saved: a resume knows what was used
        if not math.isfinite(scores.loss):
            raise ValueError(
                f"the validation loss of step {state.step} is {scores.loss}, so it was not saved; "
                f"{self.remedy()}"
            )
        better = scores.loss < state.best_loss
        state.best_loss = min(scores.loss, state.best_loss)
        state.validations_without_better = 0 if better else state.validations_without_better + 1
        # Before the checkpoint exists: a resume drops the lines after its checkpoint, but could not add one.
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
        train, step, state = self.config.train, self.state.step, self.whole_state()
        wrong = not_finite(self.model, state)
        if wrong is not None:
            raise ValueError(f"{wrong} of step {step} is not finite, so it was not saved; {self.remedy()}")
        folder = self.folder / "checkpoints"
        keep = bool(train.save_every) and step % train.save_every == 0
        save_checkpoint(folder, step, self.model, state, loss, keep)
        self.saved_step = step
        remove_superseded(folder, train.keep)

    def whole_state(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the weights, and what it must find unchanged."""
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
        }

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, saying which damaged ones were passed over.

        Raises:
            ValueError: None is whole, or what was restored is not what the checkpoint holds.
            BudgetUsed: Nothing is left to do.
        """
        manifest = newest_whole(self.folder / "checkpoints")
        load_weights(self.model, manifest)
        state = load_state(manifest)
        self.state = RunState(**state["run"] | {"best_loss": float(state["run"]["best_loss"])})
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"], self.device)
        gpus, had = (
            torch.cuda.device_count() if self.device.type == "cuda" else 0,
            len(state["random"]["cuda"]),
        )
        if had != gpus or bool(state["scaler"]) != self.scaler.is_enabled():
            print(
                f"warning: the run had {had} GPUs and has {gpus} now, or its precision is another one; "
                "from here on it differs from one that was never stopped",
                file=sys.stderr,
            )
        self.saved_step = self.state.step
        self.resumed_from = manifest
        self.refuse_difference()
        if self.progress() >= 1:
            raise BudgetUsed(self)
        print(f"resumed from {manifest.folder} at step {self.state.step}")

    def refuse_difference(self) -> None:
        """ValueError that names what is not, bit for bit, as in the checkpoint that the run goes on from."""
        manifest = self.resumed_from
        if manifest is None:
            return
        saved, own = load_state(manifest), self.whole_state()
        if bool(saved["scaler"]) != bool(own["scaler"]):  # another precision, which was warned of
            saved["scaler"] = own["scaler"]
        if len(saved["random"]["cuda"]) != len(own["random"]["cuda"]):  # another device, likewise
            saved["random"]["cuda"] = own["random"]["cuda"]
        name = "run/step" if self.state.step != manifest.step else changed_weight(self.model, manifest)
        name = name or first_difference(saved, own)
        if name is not None:
            raise ValueError(
                f"{name} is not what {manifest.folder} holds, so the run would not go on as it was; if its "
                "data, tokenizer and config.yaml are its own, report a fault of this program"
            )

    def show(self, bar: tqdm, loss: float, rate: float) -> None:
        progress = self.progress()
        left = self.state.seconds * (1 / progress - 1) if progress else 0.0
        bar.set_description_str(
            f"step {self.state.step}  loss {loss:.3f}  {rate:,.0f} tokens/s"
            f"  {left // 60:.0f}:{left % 60:02.0f} left"
        )
        bar.update(min(1.0, progress) - bar.n)


def still_falling(losses: Sequence[float]) -> str | None:
    """What to say of a run that ends while its training loss falls steeply, or None.

    Args:
        losses: Of each step of the whole run, nats a token.
    """
    quarter = len(losses) // 4
    if quarter < LEAST_QUARTER:
        return None
    before, last = (sum(part) / quarter for part in (losses[-2 * quarter : -quarter], losses[-quarter:]))
    share = (before - last) / max(losses[0] - last, 1e-9)
    if not (share > STEEP and before - last > STEEP):
        return None
    return (
        f"the training loss still fell steeply at the end, from {before:.2f} to {last:.2f} between the third "
        f"and the last quarter of {len(losses)} steps, {min(share, 1):.0%} of all that it fell: train for "
        "longer, or with a higher learning rate"
    )


class Log:
    """metrics.jsonl and TensorBoard, the same values under the same names."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():  # lines that a killed run wrote after its last checkpoint, and one cut short, go
            kept = [line for line in path.read_text("utf-8").splitlines() if step_of(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()
        for tag, value in values.items():
            self.tensorboard.add_scalar(tag, value, step)

    def to_disk(self) -> None:
        """Until it returns, a loss of power may take the lines."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


def step_of(line: str) -> float:
    """Of a line of metrics.jsonl; infinite for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def say(text: str) -> None:
    """Print beside the bar. A reader (`| head`) or a terminal that went away does not end the run."""
    with contextlib.suppress(OSError):
        tqdm.write(text)


def progress_bar() -> tqdm:
    """From 0 to 1; silent where stderr is not a terminal."""
    return tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", disable=None)


@contextlib.contextmanager
def signals_noted(manager: TrainingManager) -> Iterator[None]:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 let the step end, save, and leave; a second one ends at once.

    The same one within SAME_SIGNAL is no second one: a closed terminal hangs up twice, through the shell and
    through the kernel, and `timeout` signals its child and then the child's group.
    """
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if manager.stop_signal == number and time.monotonic() - first < SAME_SIGNAL:
            return
        if manager.stop_signal is not None:
            os._exit(128 + number)  # an exception may be swallowed, by a finalizer for one
        manager.stop_signal, first = number, time.monotonic()
        text = f"\n{signal.Signals(number).name}: finishing the step, then saving\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # print fails where it has itself been interrupted

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seed_everything(seed: int) -> None:
    """Of Python, numpy's global generator, which takes 32 bits, and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """Of everything that `seed_everything` seeds, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy_state = dict(np.random.get_state(legacy=False))
    inner = dict(numpy_state["state"])
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": numpy_state | {"state": inner | {"key": torch.from_numpy(inner["key"].astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`. GPUs keep their own states if there are more or fewer of them now."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    inner = states["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state(states["numpy"] | {"state": inner | {"key": key}})
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_batches(path: Path, micro: list[Batch]) -> str:
    """Write the micro-batches of a step as `NUMBER/tokens` and so on; says where, or why not."""
    tensors = {
        f"{i}/{name}": t
        for i, batch in enumerate(micro)
        for name, t in batch._asdict().items()
        if isinstance(t, torch.Tensor)
    }
    try:
        save_tensors(tensors, path)
    except (OSError, SafetensorError) as error:
        return f"lost ({error})"
    return f"in {path}"


def compile_blocks(model: Decoder) -> None:
    """torch.compile for each block, or a warning where this machine cannot compile."""
    try:
        probe = torch.compile(lambda x: x * 2 + 1)
        probe(torch.ones(2, device=next(model.parameters()).device))
    except Exception as error:  # whatever is missing (g++, Python's headers, triton), eager is right
        reason = str(error).strip().splitlines()[0]
        remedy = "on a CPU it needs g++ and Python's headers (apt install g++ python3-dev)"
        warnings.warn(f"torch.compile does not work here, running eager: {reason}; {remedy}", stacklevel=2)
        return
    for block in model.blocks:
        block.compile()


# --- a run, from settings to the final report --------------------------------------------------------


def train(config: Config, observer: Observer | None = None, is_preset: bool = False) -> TrainingManager:
    """One whole run, from settings to the last checkpoint; prints what it decides on the way.

    Args:
        observer: Is told of each step and may end the run there.
        is_preset: The settings are no user's, but a recipe's own, who says itself what they are like.

    Raises:
        ValueError: The settings, the data or the folder do not fit; nothing that was there is touched.
        OSError: The disk is full or read-only; older checkpoints stay.
    """
    precision = refuse_mistakes(config)
    with claimed_folder(config) as folder:
        return _train_in(folder, with_data_resolved(config, folder), precision, observer, is_preset)


def _train_in(
    folder: Path, config: Config, precision: Precision, observer: Observer | None, is_preset: bool
) -> TrainingManager:
    device = precision.device
    print(f"precision: {precision.reason}")
    base = open_base(config, precision.dtype, device)
    row_follows = base is not None and not config.train.row_length
    told = base is None and config.model.vocab_size > 0
    if config.train.resume and told:  # before the corpus, where the tokenizer need not be made of it
        refuse_changes(folder, dataclasses.replace(config, model=config.model.resolved()))
    if base is None:
        tokenizer = prepare_tokenizer(config.data, config.tokenizer)
    else:
        tokenizer = starting_tokenizer(config, base)
        config = adopted(config, base, tokenizer, precision.dtype)
        if not config.lora.r:  # before the data are read: what trains is the base as it is
            checked_groups(config, base.model)
        if row_follows and config.train.resume:
            config = with_row_of(folder, config)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {vocab_size} does not hold the tokenizer's {tokenizer.vocab_size} ids; "
            "leave model.vocab_size out, or take a smaller tokenizer"
        )
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size).resolved()
    )
    if config.train.resume and not told:
        refuse_changes(folder, config)
    if config.train.resume:
        tokenizer.bare_gaps = gaps_began_bare(folder)
    tokenizer.heals = config.data.heal
    data = prepare_data(config.data, tokenizer)
    if row_follows and not config.train.resume:
        config = with_fitting_row(config, data)
    fingerprints = {
        "data": data.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "code": code_fingerprint(),
    }
    if data.report.corpus:
        fingerprints["corpus"] = data.report.corpus
    if base is not None:
        fingerprints["base"] = base.fingerprint
    if config.train.resume:
        refuse_other_data(folder, config, fingerprints)
    if groups := data.report.groups:
        documents = sum(data.report.kept.values())
        print(f"split: {documents:,} documents in {groups:,} groups by their text (data.regroup true)")
    for side in dict.fromkeys((data.train, data.validation, data.test)):
        kind = "examples" if side.holds_examples else "files"
        refuse_long_answers(config.data, side, config.row_length)
        longer = int(is_trimmed(side, config.row_length).sum())
        gaps = data.report.gaps if side is data.train else 0
        print(
            f"{side.split}: {side.n_documents:,} {kind}, {side.n_bytes:,} bytes, {side.n_tokens:,} tokens"
            + (f"; {longer:,} trimmed to a row of {config.row_length}" if longer else "")
            + (f"; {gaps:,} with a gap to fill" if gaps else "")
        )
    if config.lora.new_tokens:
        say_absent(config.lora.new_tokens, tokenizer, data.train)
    if data.report.gaps:
        share = gaps_in_sight(data.train, fim_markers(tokenizer), config.row_length)
        say_gaps_in_sight(share, config, warn=not is_preset)
    seed_everything(config.train.seed)
    model = starting_model(config, base, tokenizer).to(device)
    print(f"model: {n_weights(model):,} parameters on {device}")
    if base is not None:
        print(trainable_table(model, base.family.key))
    release_freed_memory()  # what loading the data and the weights freed is not needed again
    keep_freed_memory()
    say_groups(config, model)
    manager = TrainingManager(config, model, data, precision, folder)
    config = manager.config
    if config.train.resume:
        manager.resume()
    subject = manager.subject(
        tokenizer,
        "resumed" if config.train.resume else "fresh" if base is None else "loaded",
        None if base is None or base.tokenizer is None else base.tokenizer.vocab_size,
    )
    passed = preflight(subject, config.train.allow)
    release_freed_memory()
    # Only now: a run that a guard refuses leaves its folder as it was, free for the next try.
    if not config.train.resume:
        tokenizer.save(folder / "tokenizer")
        write_atomically(folder / "fingerprints.json", json.dumps(fingerprints, indent=1))
    saved = config.to_dict() | {"run": str(folder), "resume": False}
    write_atomically(folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
    record_overrides(folder, passed)
    manager.fit(subject, observer, warn=not is_preset)
    return manager


def with_row_of(folder: Path, config: Config) -> Config:
    """The settings with the rows that the run in the folder was begun with."""
    row = Config.from_dict(read_yaml(folder / "config.yaml")).train.row_length or config.row_length
    return dataclasses.replace(config, train=dataclasses.replace(config.train, row_length=row))


def with_fitting_row(config: Config, data: PreparedData) -> Config:
    """The settings with rows only as long as the examples need, at most as they are."""
    row = fitting_row((data.train, data.validation, data.test), config.row_length)
    if row < config.row_length:
        print(f"rows: {row} tokens, which hold every example whole; --row_length sets another length")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, row_length=row))


def checked_groups(config: Config, model: Decoder) -> list[ParameterGroup]:
    """What moves which parameters; ValueError for a learning rate that is set and at which none learns."""
    groups = parameter_groups(model, config.optimizer, config.lora.lr_ratio, config.model.widening)
    for key, reason in unread_rates(config.optimizer, {group.kind for group in groups}):
        raise ValueError(f"{key} is set, but {reason}; remove it")
    return groups


def say_groups(config: Config, model: Decoder) -> None:
    """Print each group of parameters; ValueError as `checked_groups`."""
    groups = checked_groups(config, model)
    print(groups_table(groups, config.optimizer))
    if config.optimizer.name == "muon" and all(group.optimizer != "Muon" for group in groups):
        print(
            "warning: optimizer.name is muon, and no matrix of a block trains, which is all that Muon moves: "
            "AdamW moves everything; set --optimizer.name adamw to say so",
            file=sys.stderr,
        )


def say_absent(new_tokens: Sequence[str], tokenizer: Tokenizer, train: TokenStore) -> None:
    """Warn of new tokens that no training text holds."""
    ids = [id for token in new_tokens if (id := tokenizer.token_id(token)) is not None]
    counts = dict(zip(new_tokens, train.occurrences(ids), strict=True))
    absent = [repr(token) for token, count in counts.items() if not count]
    if absent:
        print(
            f"warning: no training text holds {', '.join(absent)}: {len(absent)} of {len(counts)} "
            f"lora.new_tokens occur 0 times in {train.n_tokens:,} tokens, and their rows cannot learn what "
            "they mean; spell them in the data as they are named, or leave them out",
            file=sys.stderr,
        )


def say_gaps_in_sight(share: float, config: Config, warn: bool = True) -> None:
    """Rows are cut from documents with their gaps: in the rest of a long one, a gap is filled by guessing."""
    length = config.row_length
    print(f"gaps: {share:.1%} of the tokens that fill one see their prefix and suffix in a row of {length}")
    if warn and share < GAPS_SEEN:
        print(
            f"warning: of the tokens that --data.fim_rate {config.data.fim_rate} makes the model fill in, "
            f"{1 - share:.1%} are learned without prefix and suffix, since documents are longer than rows of "
            f"{length} tokens: set --row_length higher, or give functions instead of files",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class EndedRun:
    """A run whose training was done when it was resumed."""

    folder: Path
    config: Config
    data: PreparedData
    device: torch.device
    eval_precision: Precision


def ended(train: TrainConfig, folder: Path) -> Manifest | None:
    """The newest checkpoint of a run of whose budget or patience nothing is left; None where it goes on."""

    def is_done(manifest: Manifest) -> bool:
        counters = load_counters(manifest)
        run = counters["run"]
        is_patient = not train.patience or run["validations_without_better"] < train.patience
        return not is_patient or budget_used(train, run["step"], counters["epoch"], run["seconds"]) >= 1

    newest = checkpoints(folder / "checkpoints")[-1:]
    try:
        if not newest or not is_done(newest[0]):
            return None  # training itself compares the checksums
        whole = newest_whole(folder / "checkpoints")
        return whole if is_done(whole) else None
    except (OSError, ValueError, KeyError, TypeError):  # a damaged one, which training names
        return None


class Lost(ValueError):
    """The base or the data of a run that ended, without which some of it cannot be made, are not there."""


def finish_ended(config: Config) -> bool:
    """Make what is missing of a run whose training is done, and say what cannot be made; False if it is not.

    The store in the cache is enough for all of it: the source of the data may be gone.

    Raises:
        ValueError: As `train`, of the folder and of settings that were changed; a file of the run is damaged.
        OSError: The disk is full or read-only.
    """
    with claimed_folder(config) as folder:
        last = ended(config.train, folder)
        if last is None:
            return False
        refuse_unknown_faults(config.train.allow)
        choose_precision(choose_device(config.train.device), precision_of_scores(config.train))
        config = with_data_resolved(config, folder)
        saved = Config.from_dict(read_yaml(folder / "config.yaml"))
        vocab_size = config.model.vocab_size or saved.model.vocab_size
        model = dataclasses.replace(config.model, vocab_size=vocab_size).resolved()
        refuse_changes(folder, dataclasses.replace(config, model=model))
        say(
            f"the training of {folder} is done, at step {last.step:,}; to train on, raise what ended it: "
            "--max_steps, --max_epochs and --max_seconds count from the run's beginning"
        )
        best = best_of(checkpoints(folder / "checkpoints")) or last
        made = outputs_made(folder, best.step)
        missing = [name for name in OUTPUTS if name not in made and (name != "adapter" or config.lora.r)]
        if not missing:
            say("nothing is missing: its scores, samples and pictures are there")
            return True
        note_made(folder, *made)
        try:
            _make_missing(folder, config, missing)
            say(f"made now: {', '.join(missing)}")
        except Lost as error:  # another try would end alike
            there = outputs_made(folder, best.step)
            lost = " and ".join(name for name in missing if name not in there)
            reason = " ".join(str(error).split())
            print(f"warning: the training is whole, and its {lost} cannot be made: {reason}", file=sys.stderr)
    return True


def _make_missing(folder: Path, config: Config, missing: Sequence[str]) -> None:
    """Make what needs no data, then the rest; Lost where the base or the data are gone or have changed."""
    if "pictures" in missing:
        make_pictures(folder)
    if [*missing] == ["pictures"]:
        return
    try:
        run = load_run(folder, base=config.train.base)
    except ValueError as error:
        if config.train.base is None:  # then a file of the run itself is at fault
            raise
        raise Lost(str(error)) from None
    note_base(folder, config.train.base)
    if "adapter" in missing:
        make_adapter(folder, run)
    if {"scores", "samples"} & {*missing}:
        device = choose_device(config.train.device)
        precision = choose_precision(device, precision_of_scores(config.train))
        settings = final_settings(folder, config, device)
        data = stored_data(data_config(run, settings), run.tokenizer, run.fingerprints["data"])
        if data is None:
            try:
                data = data_of(run, settings)
            except ValueError as error:
                raise Lost(str(error).replace("--source", "--data.source")) from None
        rest = [name for name in missing if name in ("scores", "samples")]
        report(EndedRun(folder, config, data, device, precision), rest)


def precision_of_scores(train: TrainConfig) -> Literal["auto", "bf16", "fp16", "fp32"]:
    """That of validation, as it was asked for."""
    return train.precision if train.eval_precision == "auto" else train.eval_precision


def final_settings(folder: Path, config: Config, device: torch.device) -> EvalConfig:
    """What a run asks of its evaluation at its end."""
    precision, data = precision_of_scores(config.train), config.data
    return EvalConfig(
        str(folder), device=str(device), precision=precision, source=data.source, cache=data.cache
    )


def samples_of(manager: TrainingManager | EndedRun, run: Run, scores: dict[str, Any]) -> tuple[str, str]:
    """What the model makes of held-out text, to read, and the words that ask `generate.py` for one of them.

    Of a corpus of examples it is examples of its own, of plain files completions of functions.
    """
    n = manager.config.train.samples
    if manager.data.test.holds_examples:
        record = scores.get("suite")
        if record is None:
            return "no held-out example to complete\n", flags_of([])
        return shown_examples(record, n), flags_of(record["samples"])
    samples = sample_completions(
        run.model.to(manager.device),
        run.tokenizer,
        manager.data.test,
        manager.config.row_length,
        manager.eval_precision,
        n,
    )
    shown = "\n".join(
        f"--- {s.name}:{s.line}\n{s.prompt}\n--- the model goes on\n{s.completion.strip(chr(10))}\n"
        f"--- the file goes on\n{s.reference}\n"
        for s in samples
    )
    if n and not samples:
        shown = "no held-out function to complete\n"
    return shown, flags_of([{"prompt": s.prompt.split("\n")[0].lstrip()} for s in samples])


def make_adapter(folder: Path, run: Run) -> None:
    """Write the adapter of a run's best checkpoint, in the place of one of an earlier end of the same run."""
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    export_adapter(run, folder / "adapter")
    note_made(folder, "adapter")


def make_pictures(folder: Path) -> list[Path]:
    """Draw the curves of a run; their paths."""
    pictures = draw_curves(folder)
    note_made(folder, "pictures")
    return pictures


def report(manager: TrainingManager | EndedRun, missing: Collection[str] = tuple(OUTPUTS)) -> None:
    """Scores of the best checkpoint beside the baseline, pictures, and completions; says where they are.

    Args:
        missing: Those of OUTPUTS that are made now; the others are there.
    """
    folder = manager.folder
    run = load_run(folder)
    if run.family is not None and "adapter" in missing:
        make_adapter(folder, run)
    if "scores" in missing:
        settings = final_settings(folder, manager.config, manager.device)
        scores = evaluate(settings, manager.data)
        print(f"\nbest checkpoint, step {run.step}, on all {scores['side']} files\n{table(scores)}")
        write_results(scores, settings)
        note_made(folder, "scores")
    else:
        scores = read_evaluation(folder / OUTPUTS["scores"])
    asked = flags_of([])
    if "samples" in missing:
        shown, asked = samples_of(manager, run, scores)
        shown = printable(shown)
        write_atomically(folder / "samples.txt", shown)
        note_made(folder, "samples")
        print(f"\n{shown}")
    pictures = make_pictures(folder) if "pictures" in missing else sorted((folder / "curves").glob("*.png"))
    print(f"checkpoints  {folder / 'checkpoints'}")
    if run.family is not None:
        print(f"adapter      {folder / 'adapter'}")
    print(f"TensorBoard  tensorboard --logdir {folder / 'tensorboard'}")
    print(f"pictures     {', '.join(str(path) for path in pictures)}")
    print(f"every line   {folder / 'eval.html'}")
    print(f"score again  python eval.py --checkpoint {folder}")
    print("\n".join(closing_lines(folder, manager.config.lora.r > 0, printable(asked))))


def prove_overfit(manager: TrainingManager) -> bool:
    """Whether each file comes back from its first line, or completion from its prompt, to the character."""
    scores = manager.validate()
    passed = manager.knows_by_heart(scores)
    verdict = "passed" if passed else "FAILED"
    print(f"check 1, every token is predicted: {verdict}, accuracy is {scores.top1:.4f} of {scores.tokens}")
    run, store = load_run(manager.folder, "last"), manager.data.train
    for number in range(store.n_documents):
        example = text_of_example(store, run.tokenizer, number)
        first, expected, suffix = example.prompt, example.reference, example.suffix
        if not store.holds_examples:
            first = expected.split("\n", 1)[0]
            expected = expected[len(first) :]
        if not first + expected:
            continue
        settings = GenerationConfig(max_new_tokens=len(store.document(number)))
        (completion,) = generate(run.model, run.tokenizer, [first], settings, suffix=suffix)
        if completion.text == expected and completion.finish_reason == "eos":
            verdict = f"passed, all {len(expected)} characters and the end of the file"
        else:
            differs = [a != b for a, b in zip(completion.text, expected, strict=False)]
            at = differs.index(True) if True in differs else len(differs)
            found, wanted = completion.text[at:][:20], expected[at:][:20]
            verdict = f"FAILED at character {at} of {len(expected)}: {found!r} instead of {wanted!r}"
            if len(store.document(number)) > run.config.row_length:
                verdict += (
                    f"; its {len(store.document(number))} tokens do not fit one row of "
                    f"{run.config.row_length}: raise --model.block_size or take a shorter file"
                )
            passed = False
        print(f"check 2, {store.names[number]} regenerated from {first!r}: {verdict}")
        if not passed:
            break
    print(f"run          {manager.folder}")
    return passed


def run_to_its_end(config: Config) -> int:
    """Train and report, or make what an ended run lacks; returns the exit code of the command."""
    if config.train.resume and not config.train.overfit and finish_ended(config):
        return 0
    try:
        manager = train(config)
    except BudgetUsed as used:  # of --overfit: its proof is made again
        manager = used.manager
    if manager.stop_signal is not None and manager.progress() < 1:
        say(f"stopped at step {manager.state.step}; go on with --resume --run {manager.folder}")
        return RESUMABLE
    if config.train.overfit:
        return 0 if prove_overfit(manager) else 1
    report(manager)
    return 0
