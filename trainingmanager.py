"""Train a model: `python trainingmanager.py [--config FILE.yaml] [--flag value ...]`.

One batch: Batches.batch(step) -> token_loss -> backward -> unscale -> clip -> step -> schedule -> log.
With no arguments it trains for 300 seconds on the interpreter's own standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from config import Config, one_sentence, parse_config


def command_line(words: list[str]) -> list[str]:
    """With --resume the run's own settings come first, so that flags need not be given again."""
    joined = [
        part for word in words for part in (word.split("=", 1) if word.startswith("--run=") else [word])
    ]
    if "--resume" in joined and "--run" in joined[:-1]:
        saved = Path(joined[joined.index("--run") + 1]) / "config.yaml"
        if saved.is_file():
            return ["--config", str(saved), *words]
    return words


# Before torch is imported, so that --help and a typo answer at once.
CONFIG = Config()
if __name__ == "__main__":
    CONFIG = parse_config(command_line(sys.argv[1:]), "Train a code model from scratch.")

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from tqdm import tqdm

from architecture import Decoder
from checkpoint import (
    checkpoints,
    code_fingerprint,
    load_run,
    load_state,
    load_weights,
    remove_superseded,
    save_checkpoint,
    verify,
)
from config import write_atomically
from curves import draw_curves
from dataset import (
    IGNORE_INDEX,
    Batch,
    Batches,
    PreparedData,
    prepare_data,
    prepare_tokenizer,
    validation_batches,
)
from eval import EvalConfig, evaluate, printable, sample_completions, table, write_results
from generate import GenerationConfig, generate
from loss import Scores, score, token_loss
from optim import build_optimizers, learning_rate_factor
from precision import Precision, choose_device, choose_precision, keep_freed_memory
from runfolder import claimed_folder, refuse_changes, refuse_other_data

DEFAULT_SECONDS = 300.0
RESUMABLE = 75  # exit code of a run that was asked to stop and can go on with --resume (EX_TEMPFAIL)
HOUSE = Path(__file__).parent


@dataclass
class RunState:
    """All that changes while a run goes on, besides weights, optimizers and random states. Saved whole."""

    step: int = 0  # updates done; with the seed it is also the position in the data
    tokens: int = 0  # that bore loss
    seconds: float = 0.0  # of training, over all resumes
    best_loss: float = math.inf
    validations_without_better: int = 0
    skipped_updates: int = 0  # for a gradient that was not finite


class TrainingManager:
    """Owns one run: model, optimizers, data order, logs and checkpoints.

    Args:
        config: The resolved settings.
        model: On its device.
        data: Token stores of both sides of the split.
        folder: Of the run.
    """

    def __init__(
        self, config: Config, model: Decoder, data: PreparedData, precision: Precision, folder: Path
    ):
        self.config, self.model, self.data, self.folder = config, model, data, folder
        self.precision = precision
        train = config.train
        asked = train.eval_precision
        self.eval_precision = precision if asked == "auto" else choose_precision(precision.device, asked)
        self.device = precision.device
        self.state = RunState()
        self.batches = Batches(data.train, train.batch_size, config.model.block_size, train.seed)
        self.optimizers = build_optimizers(model, config.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.dtype == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_seconds = train.max_seconds
        if not (train.max_seconds or train.max_steps or train.max_epochs):
            self.max_seconds = DEFAULT_SECONDS
        # A validation on the way reads a part of the files only, so its bytes are taken from the average.
        held_out = data.validation
        self.targets_per_byte = (held_out.n_tokens - held_out.n_documents) / held_out.n_bytes
        self.stop_signal: int | None = None
        self.saved_step: int | None = None
        self.skipped_in_a_row = 0
        model.checkpoint_activations = train.activation_checkpointing
        if train.compile:
            compile_blocks(model)

    # --- the loop ------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until the budget is used, patience ends, or a signal asks for a stop; then save."""
        if self.saved_step is not None and self.progress() >= 1:
            raise ValueError(
                f"the budget of {self.folder} is used up at step {self.state.step}; to go on, raise what "
                "ended it: --max_steps, --max_epochs and --max_seconds count from the run's beginning"
            )
        log = Log(self.folder, self.state.step)
        before = self.validate(limit=2)
        print(
            f"before step {self.state.step + 1}: loss {before.loss:.3f} on two validation batches; "
            f"ln(vocabulary) is {math.log(self.config.model.vocab_size):.3f}"
        )
        train = self.config.train
        started = time.perf_counter() - self.state.seconds
        tokens_at_start, seconds_at_start = self.state.tokens, self.state.seconds
        with signals_noted(self), progress_bar() as bar:
            while self.progress() < 1 and self.stop_signal is None:
                values = self.update()
                self.state.seconds = time.perf_counter() - started
                step = self.state.step
                rate = (self.state.tokens - tokens_at_start) / (self.state.seconds - seconds_at_start)
                self.show(bar, values["train/loss"], rate)
                if step == 1 or step % train.log_every == 0:
                    log.write(step, values | {"train/tokens_per_second": rate})
                due = bool(train.validate_every) and step % train.validate_every == 0
                if due or (train.save_every and step % train.save_every == 0):
                    self.validate_and_save(log)
                    self.state.seconds = time.perf_counter() - started
                if train.overfit and due and self.knows_by_heart(self.validate()):
                    break
                if train.patience and self.state.validations_without_better >= train.patience:
                    say(f"stopped early: {train.patience} validations without a better loss")
                    break
            if self.saved_step != self.state.step:
                self.validate_and_save(log)
        log.close()

    def update(self) -> dict[str, float]:
        """One optimizer step over `accumulation` micro-batches; returns what is logged."""
        train, optimizer_config = self.config.train, self.config.optimizer
        first = self.state.step * train.accumulation
        micro = [self.to_device(self.batches.batch(first + i)) for i in range(train.accumulation)]
        # Divided by the loss-bearing tokens of the whole step: ragged micro-batches weigh what they hold.
        tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in micro)
        if tokens == 0:
            raise ValueError(f"no token of step {self.state.step + 1} bears loss; check the data's labels")
        self.model.train()
        nats = 0.0
        for batch in micro:
            with self.precision.autocast():
                loss = token_loss(self.model, batch, optimizer_config.label_smoothing)
            self.scaler.scale(loss.objective / tokens).backward()
            nats += loss.cross_entropy.item()
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
        self.count_skipped(finite)
        return {
            "train/loss": nats / tokens,
            "train/learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": norm,
            "train/epoch": self.epoch(),
        }

    def count_skipped(self, finite: bool) -> None:
        """Skipped are updates that are not finite; three in a row end the run (fp16's scaler may skip 20)."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite:
            return
        self.state.skipped_updates += 1
        limit = 20 if self.scaler.is_enabled() else 3
        if self.skipped_in_a_row >= limit:
            raise ValueError(
                f"loss or gradient was not finite {limit} times in a row, up to step {self.state.step}; "
                "lower the learning rate or use --precision fp32, and go on with --resume"
            )

    def epoch(self) -> float:
        return self.state.step * self.config.train.accumulation / self.batches.steps_per_epoch

    def progress(self) -> float:
        """Share of the budget used: of steps, epochs or seconds, whichever is furthest."""
        train, shares = self.config.train, [0.0]
        if train.max_steps:
            shares.append(self.state.step / train.max_steps)
        if train.max_epochs:
            shares.append(self.epoch() / train.max_epochs)
        if self.max_seconds:
            shares.append(self.state.seconds / self.max_seconds)
        return max(shares)

    # --- validation, checkpoints, what is shown ------------------------------------------------------

    def validate(self, limit: int = 0) -> Scores:
        """Scores on `limit` batches spread evenly over the validation files; 0 reads all of them."""
        rows, length = self.config.train.batch_size, self.config.model.block_size
        batches = validation_batches(self.data.validation, rows, length)
        if limit:
            stride = max(1, self.data.validation.n_tokens // (rows * length) // limit)
            batches = itertools.islice(batches, 0, limit * stride, stride)
        return score(self.model, batches, self.eval_precision)

    def knows_by_heart(self, scores: Scores) -> bool:
        """Whether every token is predicted, but for the files' first ones: nothing tells those apart."""
        return round((1 - scores.top1) * scores.tokens) < self.data.train.n_documents

    def validate_and_save(self, log: Log) -> None:
        """Validate, keep count of patience, save, and remove what is superseded; only then tell."""
        train, state = self.config.train, self.state
        scores = self.validate(train.validation_batches)
        if not math.isfinite(scores.loss):
            raise ValueError(
                f"the validation loss of step {state.step} is {scores.loss}, so it was not saved; "
                "lower the learning rate or use --precision fp32, and go on with --resume"
            )
        better = scores.loss < state.best_loss
        state.best_loss = min(scores.loss, state.best_loss)
        state.validations_without_better = 0 if better else state.validations_without_better + 1
        folder = self.folder / "checkpoints"
        keep = bool(train.save_every) and state.step % train.save_every == 0
        save_checkpoint(folder, state.step, self.model, self.whole_state(), scores.loss, keep)
        self.saved_step = state.step
        remove_superseded(folder, train.keep)
        log.write(
            state.step,
            {
                "eval/loss": scores.loss,
                "eval/perplexity": scores.perplexity,
                "eval/bits_per_byte": scores.loss / math.log(2) * self.targets_per_byte,
                "eval/top1": scores.top1,
            },
        )
        say(
            f"step {state.step}: validation loss {scores.loss:.3f}, top-1 {scores.top1:.1%}"
            + (", the best so far" if better else "")
        )

    def whole_state(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the weights."""
        random = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "run": dataclasses.asdict(self.state) | {"best_loss": repr(self.state.best_loss)},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": random,
        }

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, saying which damaged ones were passed over.

        Raises:
            ValueError: None is whole.
        """
        manifests = checkpoints(self.folder / "checkpoints")
        for manifest in reversed(manifests):
            try:
                verify(manifest)
            except ValueError as error:
                print(f"passed over: {error}", file=sys.stderr)
                continue
            load_weights(self.model, manifest)
            state = load_state(manifest)
            run = state["run"] | {"best_loss": float(state["run"]["best_loss"])}
            self.state = RunState(**run)
            for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.scaler.load_state_dict(state["scaler"])
            self.saved_step = self.state.step
            torch.set_rng_state(state["random"]["torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
            print(f"resumed from {manifest.folder} at step {self.state.step}")
            return
        raise ValueError(
            f"{self.folder} has {len(manifests)} checkpoints and none is whole; start again in another --run"
        )

    def show(self, bar: tqdm, loss: float, rate: float) -> None:
        progress = self.progress()
        left = self.state.seconds * (1 / progress - 1) if progress else 0.0
        bar.set_description_str(
            f"step {self.state.step}  loss {loss:.3f}  {rate:,.0f} tokens/s"
            f"  {left // 60:.0f}:{left % 60:02.0f} left"
        )
        bar.update(min(1.0, progress) - bar.n)

    def to_device(self, batch: Batch) -> Batch:
        return Batch(*(t.to(self.device, non_blocking=True) for t in batch))


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
    """Print beside the bar. A reader who went away (`| head`) does not end the run."""
    with contextlib.suppress(BrokenPipeError):
        tqdm.write(text)


def progress_bar() -> tqdm:
    """From 0 to 1; silent where stderr is not a terminal."""
    return tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", disable=None)


@contextlib.contextmanager
def signals_noted(manager: TrainingManager) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP let the step end, save, and leave; a second one ends at once."""

    def note(number: int, frame: Any) -> None:
        if manager.stop_signal is not None and manager.progress() < 1:
            sys.exit(128 + number)
        manager.stop_signal = number
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving", file=sys.stderr)

    before = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compile_blocks(model: Decoder) -> None:
    """torch.compile for each block, or a warning where this machine cannot compile."""
    try:
        probe = torch.compile(lambda x: x * 2 + 1)
        probe(torch.ones(2, device=next(model.parameters()).device))
    except Exception as error:  # whatever is missing (g++, Python's headers, triton), eager is right
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile does not work here, running eager: {reason}", stacklevel=2)
        return
    for block in model.blocks:
        block.compile()


# --- a run, from settings to the final report --------------------------------------------------------


def train(config: Config) -> TrainingManager:
    """One whole run, from settings to the last checkpoint; prints what it decides on the way.

    Raises:
        ValueError: The settings, the data or the folder do not fit; nothing that was there is touched.
        OSError: The disk is full or read-only; older checkpoints stay.
    """
    with claimed_folder(config) as folder:
        return _train_in(folder, config)


def _train_in(folder: Path, config: Config) -> TrainingManager:
    if config.data.validation_one_in == 0 and not config.train.overfit:
        raise ValueError(
            "--data.validation_one_in 0 would validate on the training files; only --overfit may"
        )
    device = choose_device(config.train.device)
    precision = choose_precision(device, config.train.precision)
    print(f"precision: {precision.reason}")
    tokenizer = prepare_tokenizer(config.data, config.tokenizer)
    data = prepare_data(config.data, tokenizer)
    fingerprints = {
        "data": data.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "code": code_fingerprint(HOUSE),
    }
    if config.train.resume:
        refuse_other_data(folder, fingerprints)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {vocab_size} does not hold the tokenizer's {tokenizer.vocab_size} ids; "
            "leave model.vocab_size out, or train a smaller tokenizer"
        )
    model_config = dataclasses.replace(config.model, vocab_size=vocab_size).resolved()
    config = dataclasses.replace(config, model=model_config)
    for side in dict.fromkeys((data.train, data.validation)):
        print(f"{side.split}: {side.n_documents:,} files, {side.n_bytes:,} bytes, {side.n_tokens:,} tokens")
    torch.manual_seed(config.train.seed)
    model = Decoder(model_config).to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    manager = TrainingManager(config, model, data, precision, folder)
    if config.train.resume:
        refuse_changes(folder, config)
        manager.resume()
    else:
        tokenizer.save(folder / "tokenizer")
        write_atomically(folder / "fingerprints.json", json.dumps(fingerprints, indent=1))
    saved = config.to_dict() | {"run": str(folder), "resume": False}
    write_atomically(folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
    manager.fit()
    return manager


def report(manager: TrainingManager) -> None:
    """Scores of the best checkpoint beside the baseline, pictures, and completions; says where they are."""
    folder, train = manager.folder, manager.config.train
    device, precision = str(manager.device), train.eval_precision
    if precision == "auto":
        precision = train.precision
    run = load_run(folder)
    data = manager.config.data
    settings = EvalConfig(
        str(folder), device=device, precision=precision, source=data.source, cache=data.cache
    )
    scores = evaluate(settings)
    print(f"\nbest checkpoint, step {run.step}, on all held-out files\n{table(scores)}")
    write_results(scores, settings)
    samples = sample_completions(
        run.model.to(manager.device),
        run.tokenizer,
        manager.data.validation,
        manager.eval_precision,
        train.samples,
    )
    shown = "\n".join(
        f"--- {s.name}:{s.line}\n{s.prompt}\n--- the model goes on\n{s.completion.strip(chr(10))}\n"
        f"--- the file goes on\n{s.reference}\n"
        for s in samples
    )
    shown = printable(shown) if samples or not train.samples else "no held-out function to complete\n"
    write_atomically(folder / "samples.txt", shown)
    print(f"\n{shown}")
    pictures = draw_curves(folder)
    print(f"checkpoints  {folder / 'checkpoints'}")
    print(f"TensorBoard  tensorboard --logdir {folder / 'tensorboard'}")
    print(f"pictures     {', '.join(str(path) for path in pictures)}")
    print(f"score again  python eval.py --checkpoint {folder}")


def prove_overfit(manager: TrainingManager) -> bool:
    """Whether each file of the tiny corpus comes back from its first line, character for character."""
    scores = manager.validate()
    passed = manager.knows_by_heart(scores)
    verdict = "passed" if passed else "FAILED"
    print(f"check 1, every token is predicted: {verdict}, accuracy is {scores.top1:.4f} of {scores.tokens}")
    run, store = load_run(manager.folder, "last"), manager.data.train
    for number in range(store.n_documents):
        text = run.tokenizer.decode(store.document(number).tolist())
        if not text:
            continue
        first = text.split("\n", 1)[0]
        expected = text[len(first) :]
        settings = GenerationConfig(max_new_tokens=len(store.document(number)))
        (completion,) = generate(run.model, run.tokenizer, [first], settings)
        if completion.text == expected and completion.finish_reason == "eos":
            verdict = f"passed, all {len(expected)} characters and the end of the file"
        else:
            differs = [a != b for a, b in zip(completion.text, expected, strict=False)]
            at = differs.index(True) if True in differs else len(differs)
            found, wanted = completion.text[at:][:20], expected[at:][:20]
            verdict = f"FAILED at character {at} of {len(expected)}: {found!r} instead of {wanted!r}"
            if len(store.document(number)) > run.model.config.block_size:
                verdict += (
                    f"; its {len(store.document(number))} tokens do not fit one row of "
                    f"{run.model.config.block_size}: raise --model.block_size or take a shorter file"
                )
            passed = False
        print(f"check 2, {store.names[number]} regenerated from {first!r}: {verdict}")
        if not passed:
            break
    print(f"run          {manager.folder}")
    return passed


def main(config: Config) -> None:
    with one_sentence():
        keep_freed_memory()
        manager = train(config)
        if manager.stop_signal is not None and manager.progress() < 1:
            print(f"stopped at step {manager.state.step}; go on with --resume --run {manager.folder}")
            sys.exit(RESUMABLE)
        if config.train.overfit:
            sys.exit(0 if prove_overfit(manager) else 1)
        report(manager)


if __name__ == "__main__":
    main(CONFIG)
