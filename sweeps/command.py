"""The command that sweeps: it starts workers on this machine, watches them, and says what the study found.

space: -> trials through the ordinary training -> table, pictures, and the best config as a file

"""

from __future__ import annotations

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
from config.console import for_shell
from sweeps import verdict
from sweeps.board import Board, Pulse, alone, is_done
from sweeps.budget import ALL_FAILED, foreseen
from sweeps.settings import SweepSettings
from sweeps.storage import told
from sweeps.study import open_studies, refuse_other_data, refuse_other_runs
from sweeps.worker import STOPPED, start

LOOK = 1.0  # seconds between two looks at workers and study
DEATHS_IN_A_ROW = 100  # of workers, without a trial that ended between


def prepare(settings: SweepSettings) -> str:
    """The data's fingerprint, with tokenizer and tokens of the config itself made once for all trials.

    Raises:
        ValueError: A mistake in the data.
    """
    from data.corpus import split_documents
    from data.documents import Report
    from dataset import prepare_data, prepare_tokenizer

    data = settings.config.data
    if settings.config.train.base is None:
        return prepare_data(data, prepare_tokenizer(data, settings.config.tokenizer)).fingerprint
    report = Report()
    for _ in split_documents(data, report):
        pass
    return report.fingerprint


@dataclass
class CrewMember:
    """A worker's process, as the command that started it sees it."""

    name: str  # by which the storage knows it
    process: Any
    ear: Any  # end of a pipe: all tell, one is shown
    ticks: Any  # shared number, which stands still while it does nothing
    seen: int = 0
    idle: float = 0.0  # seconds since it stood at another number
    hung: bool = False


def gpus_for(device: str) -> list[str]:
    """The GPUs that workers share out, as CUDA_VISIBLE_DEVICES names them; none where `device` names one."""
    from torch.cuda import device_count

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device not in ("auto", "cuda"):
        return []
    return visible.split(",") if visible is not None else [str(n) for n in range(device_count())]


class Crew:
    """The workers on this machine: started, watched, told to stop, and started again when they are killed."""

    def __init__(self, settings: SweepSettings, fingerprint: str):
        from training.loop import SAME_SIGNAL

        self.settings, self.fingerprint, self.same_signal = settings, fingerprint, SAME_SIGNAL
        self.stop_requests = 0  # signals
        self.signal = (0, 0.0)  # the last one that counted, and when it came
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.sweep.workers)))
        self.gpus = gpus_for(settings.config.train.device)
        self.context = multiprocessing.get_context("spawn")
        self.deaths = 0
        self.sentence = ""  # the first worker's that ended with an error
        self.looked = time.monotonic()
        self.members: list[CrewMember] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self.stop)
        for place in range(settings.sweep.workers):
            self.begin(place)

    def begin(self, place: int) -> None:
        """Start a worker, the first one of that place or another."""
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
        if self.stop_requests:  # before it was a member
            process.terminate()

    def stop(self, number: int = 0, frame: Any = None) -> None:
        """Tell the workers to stop; the second time kill them. The same signal at once is no second one."""
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
            fail: Told the name of each, to fail its trial, while it still lives: of a dead one another worker
                would take it up.
        """
        # While this process itself stood still, they may have too.
        passed, self.looked = min(time.monotonic() - self.looked, 10 * LOOK), time.monotonic()
        limit = self.settings.sweep.hung_after
        for member in self.members:
            ticks = member.ticks.value
            member.seen, member.idle = ticks, member.idle + passed if ticks == member.seen else 0.0
            if limit and member.idle >= limit and member.process.is_alive() and not member.hung:
                member.hung = True
                fail(member.name)
                member.process.kill()
                member.process.join(10 * LOOK)  # the kernel may take its time over a file system that is gone

    def wait(self) -> None:
        """Until it is time to look again: LOOK seconds, or less where a worker ends."""
        alive = [member.process.sentinel for member in self.members if member.process.is_alive()]
        wait(alive, LOOK) if alive else time.sleep(LOOK)

    def look(self) -> int | None:
        """The exit code of all once they have ended; those that were killed are started again."""
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
            if self.deaths > DEATHS_IN_A_ROW:  # the others are told to stop by whoever called
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
        return 2 if 2 in codes else 0 if 0 in codes else STOPPED  # 0: one found nothing left to do


def sweep(settings: SweepSettings) -> int:
    """The whole sweep; the exit code: 0 at its end, 75 where it was stopped and can go on.

    Raises:
        ValueError: The storage, the data or every trial is at fault; one sentence.
    """
    from training.beforehand import refuse_mistakes

    refuse_mistakes(settings.config)
    folder = settings.sweep.folder
    folder.mkdir(parents=True, exist_ok=True)
    with told(settings.sweep.storage, folder):
        studies = open_studies(settings)
        refuse_other_runs(studies[0], folder)
    say(beginning(settings))
    fingerprint = prepare(settings)
    with told(settings.sweep.storage, folder):
        refuse_other_data(studies[0], fingerprint)
    pulse = Pulse(studies[0], folder)  # not of a worker: it only looks
    trials, repeats = (Board(study, pulse) for study in studies)
    shown = {slot for slot, record in trials.slots().items() if is_done(record)}
    again = {slot for slot, record in repeats.slots().items() if is_done(record)}
    if shown:
        say(f"the study in {folder} goes on after {len(shown)} trials")
    crew, code, expected = Crew(settings, fingerprint), None, ""
    hung = f"its worker did nothing for {settings.sweep.hung_after:g} s (--hung_after) and was killed"

    def fail_hung(name: str) -> None:
        if not trials.fail(name, hung) + repeats.fail(name, hung):
            say(f"a worker did nothing for {settings.sweep.hung_after:g} s and was killed")

    try:
        with told(settings.sweep.storage, folder):
            while code is None:
                crew.wait()
                crew.end_hung(fail_hung)
                code = crew.look()
                for board, known in ((trials, shown), (repeats, again)):
                    for slot, record in board.slots().items():
                        if is_done(record) and slot not in known:
                            known.add(slot)
                            crew.deaths = 0
                            say(line(settings, board is repeats, record))
                if not expected and (expected := foreseen(settings, trials.slots())):
                    say(expected)
            trials.reap()
            repeats.reap()
    except ValueError:
        if not crew.stop_requests:  # or they are saving
            crew.stop()
        raise
    if code == 2:
        raise ValueError(crew.sentence)
    with alone(folder, ".finish"):  # of another command that shares the folder
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


def beginning(settings: SweepSettings) -> str:
    """What the sweep is about to do, in one line: no trial ends in its first minute."""
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
    """What became of a slot, in one line."""
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
    """Print the table and the verdict; write the best config, the pictures and the page; as of now."""
    from sweeps.pictures import draw

    folder = settings.sweep.folder
    repeats = {slot: record for slot, record in repeats.items() if is_done(record)}  # a stopped one goes on
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
        say(f"best config  python trainingmanager.py --config {for_shell(str(path))}")
    pictures = draw(settings, studies[0], slots, ["\n".join(rows), "\n".join(front), *said, *judged])
    say(f"page         {folder / 'report.html'}, with the {len(pictures)} of {folder / 'pictures'}")
    say(f"TensorBoard  tensorboard --logdir {for_shell(str(folder / 'tensorboard'))}")
