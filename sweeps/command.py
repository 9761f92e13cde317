"""The command that sweeps: it starts workers on this machine, watches them, and says what the study found.

    space: -> trials through the ordinary training -> table, pictures, and the best config as a file

The workers share the study through its storage alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from config import say, write_atomically
from config.console import command_of, for_shell
from sweeps import verdict
from sweeps.board import Board, Pulse, alone, is_done
from sweeps.budget import ALL_FAILED, foreseen
from sweeps.settings import SweepSettings
from sweeps.storage import told
from sweeps.study import open_studies, refuse_other_data, refuse_other_runs
from sweeps.worker import STOPPED, start

LOOK = 1.0  # Seconds between two looks at workers and study.
DEATHS_IN_A_ROW = 100  # Deaths of workers, without a trial that ended between, that end the sweep.


def prepare(settings: SweepSettings) -> str:
    """Make the config's tokenizer and tokens once for all trials, and return the data's fingerprint.

    Raises:
        ValueError: The data hold a mistake.
    """
    from data.run_documents import RunDocuments
    from dataset import prepare_data, prepare_tokenizer
    from tokenization.turn_end import end_turns

    documents = RunDocuments(settings.config.data)
    if settings.config.train.base is None:
        tokenizer = prepare_tokenizer(documents, settings.config.tokenizer)
        if documents.record.first_chat:
            end_turns(tokenizer)  # As each trial does.
        prepare_data(documents, tokenizer)
    return documents.fingerprint


@dataclass
class CrewMember:
    """A worker's process, as the command that started it sees it."""

    name: str  # The id by which the storage knows it.
    process: Any
    ear: Any  # The end of a pipe through which the worker tells its error.
    ticks: Any  # A shared number, which stands still while the worker does nothing.
    last_ticks: int = 0
    idle: float = 0.0  # Seconds since `ticks` changed.
    hung: bool = False


def gpus_for(device: str) -> list[str]:
    """Return the GPUs that workers take in turn, as CUDA_VISIBLE_DEVICES names them.

    There are none where `device` names one GPU.
    """
    from torch.cuda import device_count

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device not in ("auto", "cuda"):
        return []
    return visible.split(",") if visible is not None else [str(n) for n in range(device_count())]


class Crew:
    """The workers on this machine: it starts them, watches them, stops them, and replaces those that die."""

    def __init__(self, settings: SweepSettings, fingerprint: str):
        from training.signals import SAME_SIGNAL

        self.settings, self.fingerprint, self.same_signal = settings, fingerprint, SAME_SIGNAL
        self.stop_requests = 0  # How often the workers were told to stop.
        self.signal = (0, 0.0)  # The last signal that counted, and when it came.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.sweep.workers)))
        self.gpus = gpus_for(settings.config.train.device)
        self.context = multiprocessing.get_context("spawn")
        self.deaths = 0
        self.sentence = ""  # The error of the first worker that ended with one.
        self.looked = time.monotonic()
        self.members: list[CrewMember] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A SIGHUP that nohup made ignored stays ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)
        for place in range(settings.sweep.workers):
            self.begin(place)

    def begin(self, place: int) -> None:
        """Start a worker at a place, the first one there or another in its stead."""
        ear, mouth = self.context.Pipe(duplex=False)
        name, ticks = uuid.uuid4().hex, self.context.RawValue("Q")
        process = self.context.Process(
            target=start, args=(self.settings, self.fingerprint, mouth, name, ticks)
        )
        if len(self.gpus) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        process.start()
        mouth.close()
        self.members[place : place + 1] = [CrewMember(name, process, ear, ticks)]
        if self.stop_requests:  # The signal came before this worker was a member.
            process.terminate()

    def stop(self, number: int = 0, frame: Any = None) -> None:
        """Tell the workers to stop; the second time kill them.

        The same signal shortly after does not count as a second one.
        """
        (before, since), now = self.signal, time.monotonic()
        if number and number == before and now - since < self.same_signal:
            return
        self.signal = (number, now)
        self.stop_requests += 1
        for member in self.members:
            if member.process.is_alive():
                member.process.terminate() if self.stop_requests == 1 else member.process.kill()

    def end_hung(self, fail: Callable[[str], object]) -> None:
        """Kill the workers that have done nothing for too long.

        Args:
            fail: Called with the name of each while it still lives, to fail its trial: another worker would
                take up the trial of a dead one.
        """
        # While this process itself stood still, the workers may have too.
        passed, self.looked = min(time.monotonic() - self.looked, 10 * LOOK), time.monotonic()
        limit = self.settings.sweep.hung_after
        for member in self.members:
            ticks = member.ticks.value
            member.idle = member.idle + passed if ticks == member.last_ticks else 0.0
            member.last_ticks = ticks
            if limit and member.idle >= limit and member.process.is_alive() and not member.hung:
                member.hung = True
                fail(member.name)
                member.process.kill()
                # With a file system that is gone the kernel may take its time.
                member.process.join(10 * LOOK)

    def wait(self) -> None:
        """Wait for LOOK seconds, or less if a worker ends."""
        alive = [member.process.sentinel for member in self.members if member.process.is_alive()]
        wait(alive, LOOK) if alive else time.sleep(LOOK)

    def look(self) -> int | None:
        """Start workers again that were killed; return the exit code of all once they have ended."""
        for place, member in enumerate(self.members):
            code = member.process.exitcode
            if code == 2 and not self.sentence:
                try:
                    self.sentence = member.ear.recv()
                except EOFError:
                    self.sentence = "a worker ended with exit code 2 and did not say why"
            if code in (None, 0, STOPPED, 2) or self.stop_requests:
                continue
            self.deaths += 1
            if self.deaths > DEATHS_IN_A_ROW:  # The caller tells the others to stop.
                raise ValueError(
                    f"{DEATHS_IN_A_ROW} workers died in a row and no trial ended between; the last one's "
                    f"exit code was {code}"
                )
            if not member.hung:
                say(f"a worker died (exit code {code}); another one takes its trial up")
            self.begin(place)
        codes = [member.process.exitcode for member in self.members]
        if 2 in codes and not self.stop_requests:
            self.stop()
        if None in codes:
            return None
        # A worker exits with 0 if it found nothing left to do.
        return 2 if 2 in codes else 0 if 0 in codes else STOPPED


def sweep(settings: SweepSettings) -> int:
    """Run a whole sweep; return the exit code: 0 at its end, 75 where it was stopped and can go on.

    Raises:
        ValueError: The storage, the data or every trial is at fault; one sentence.
    """
    from training.beforehand import refuse_mistakes

    refuse_mistakes(settings.config)
    folder = settings.sweep.folder
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with told(settings.sweep.storage, folder):
            studies = open_studies(settings)
            refuse_other_runs(studies[0], folder)
    except ValueError:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # This fails unless it is empty.
        raise
    say(beginning(settings))
    fingerprint = prepare(settings)
    with told(settings.sweep.storage, folder):
        refuse_other_data(studies[0], fingerprint)
    pulse = Pulse(studies[0], folder)  # This process is no worker: it only looks at other pulses.
    trials, repeats = (Board(study, pulse) for study in studies)
    shown = {slot for slot, record in trials.slots().items() if is_done(record)}
    again = {slot for slot, record in repeats.slots().items() if is_done(record)}
    if shown:
        say(f"the study in {folder} goes on after {len(shown)} trials")
    crew = Crew(settings, fingerprint)
    try:
        with told(settings.sweep.storage, folder):
            code = watch(settings, crew, (trials, shown), (repeats, again))
            trials.reap()
            repeats.reap()
    except ValueError:
        if not crew.stop_requests:  # Workers that were told to stop are saving.
            crew.stop()
        raise
    if code == 2:
        raise ValueError(crew.sentence)
    with alone(folder, ".finish"):  # Another command may share the folder.
        with told(settings.sweep.storage, folder):
            slots, repeated = trials.slots(), repeats.slots()
        if code == 0 or any(record.state == TrialState.COMPLETE for record in slots.values()):
            finish(settings, studies, slots, repeated)
    if code == STOPPED:
        say(f"stopped after {sum(map(is_done, slots.values()))} trials; the same command goes on")
        return code
    if slots and all(record.state == TrialState.FAIL for record in slots.values()):
        reason = slots[0].user_attrs.get("reason")
        raise ValueError(
            f"all {len(slots)} trials failed (it stops after {ALL_FAILED}); the first one: {reason}; mend "
            "that, and begin anew with another --study"
        )
    return 0


def watch(
    settings: SweepSettings, crew: Crew, trials: tuple[Board, set[int]], repeats: tuple[Board, set[int]]
) -> int:
    """Watch the workers until all have ended, and print a line for each slot that ends; return the exit code.

    Args:
        trials: The board of the trials, and the slots that ended before.
        repeats: The board of the repeats, and the slots that ended before.
    """
    seconds, expected, code = settings.sweep.hung_after, "", None

    def fail_hung(name: str) -> None:
        hung = f"its worker did nothing for {seconds:g} s (--hung_after) and was killed"
        if not trials[0].fail(name, hung) + repeats[0].fail(name, hung):
            say(f"a worker did nothing for {seconds:g} s and was killed")

    while code is None:
        crew.wait()
        crew.end_hung(fail_hung)
        code = crew.look()
        for board, known in (trials, repeats):
            for slot, record in board.slots().items():
                if is_done(record) and slot not in known:
                    known.add(slot)
                    crew.deaths = 0
                    say(line(settings, board is repeats[0], record))
        if not expected and (expected := foreseen(settings, trials[0].slots())):
            say(expected)
    return code


def beginning(settings: SweepSettings) -> str:
    """Say in one line what the sweep is about to do, since no trial ends in its first minute."""
    own = settings.sweep
    budgets = [
        f"{value:g} {name}" for name in ("trials", "steps", "seconds") if (value := getattr(own, name))
    ]
    return (
        f"sweep over {len(settings.space.parameters)} settings with "
        f"{own.workers} worker{'s' * (own.workers > 1)}, "
        f"{' or '.join(budgets) or 'the whole grid'}: first the tokens of all trials, then trial 0; "
        f"what a trial prints is in {own.folder / 'logs'}"
    )


def line(settings: SweepSettings, is_repeat: bool, record: FrozenTrial) -> str:
    """Say in one line what became of a slot."""
    facts = record.user_attrs
    name = f"trial {facts['slot']}"
    if is_repeat:
        name = f"{verdict.called(facts['of'])} again, seed {facts['seed']}"
    if record.state == TrialState.FAIL:
        return f"{name}: failed: {facts.get('reason')}"
    if "same_as" in facts:
        return f"{name}: as trial {facts['same_as']}, which has the same settings"
    took = f"{facts.get('steps', 0):,} steps, {facts.get('seconds', 0):.0f} s"
    if record.state == TrialState.PRUNED:
        return f"{name}: pruned after {took}"
    names = zip(settings.sweep.objectives, record.values, strict=True)
    return f"{name}: {', '.join(f'{n} {verdict.number(v)}' for n, v in names)} ({took})"


def finish(
    settings: SweepSettings,
    studies: tuple[Any, Any],
    slots: Mapping[int, FrozenTrial],
    repeats: Mapping[int, FrozenTrial],
) -> None:
    """Print the table and the verdict so far; write the best config, the pictures and the page."""
    from sweeps.pictures import draw

    folder = settings.sweep.folder
    # A repeat that was stopped goes on with the next command.
    repeats = {slot: record for slot, record in repeats.items() if is_done(record)}
    rows, front = verdict.table(settings, slots), verdict.front(settings, slots)
    said = [*verdict.counts(settings, slots), *verdict.idle(settings, slots)]
    judged = verdict.verdict(settings, slots, repeats)
    say("\n".join(["", *rows, "", *front, *([""] if front else []), *said, "", *judged, ""]))
    if any(record.state == TrialState.COMPLETE for record in slots.values()):
        best = verdict.winner(settings, slots, repeats)
        config = verdict.config_of(settings, slots, best)
        head = verdict.best_head(settings, config, best)
        values = verdict.best_yaml(config, settings.space, settings.config)
        path = folder / "best.yaml"
        write_atomically(path, head + yaml.safe_dump(values, sort_keys=False))
        say(f"best config  {command_of('trainingmanager.py')} --config {for_shell(str(path))}")
    pictures = draw(settings, studies[0], slots, ["\n".join(rows), "\n".join(front), *said, *judged])
    say(f"page         {folder / 'report.html'}, with the {len(pictures)} of {folder / 'pictures'}")
    say(f"TensorBoard  tensorboard --logdir {for_shell(str(folder / 'tensorboard'))}")
