"""A study as a row of slots, each claimed by one worker at a time, through the storage alone.

A slot is one thing to be run: a trial of the budget, or a repeat. Optuna's records are its attempts: one that
a worker leaves behind, killed or stopped, is ended as failed with the reason in its `requeue`, and the slot's
next attempt goes on from its parameters and its run folder. So slots are counted, never records.

    claim   a record is created as running, with slot, attempt and worker in one write. If two were created
            for one attempt, the lower number has it, and the other one ends.
    reap    a running record whose worker is gone is ended, which a storage grants only once.

On the machine of its files, a worker is known to live by a lock that the kernel frees when it ends.
Elsewhere it is known by its pulse, an attribute of the study that it writes every BEAT seconds, and that
stands still when the worker is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeps.storage import patiently

BEAT = 10.0  # Seconds between two writes of a pulse.
# Seconds without a change, on this machine's clock, after which a pulse counts as that of a dead worker.
STALE = 60.0
PULSE = "worker "  # An attribute of the study begins with it; a worker's id follows.
KILLED = "killed"  # Marks a trial that was ended for good; its run may be beyond its last known validation.
VALIDATED = "validated"  # The step of the last validation, where Optuna is not told of it.
# Attributes that a slot's next attempt takes over.
RUN_ON = ("slot", "attempt", "of", "seed", "first_losses", "parameters", "fingerprint", VALIDATED)


@dataclass(frozen=True)
class Claim:
    """A slot that this worker has, and nobody else."""

    slot: int
    attempt: int
    record: FrozenTrial


class Pulse:
    """The sign that this process lives, for as long as the context lasts."""

    def __init__(self, study: optuna.Study, folder: Path, name: str = ""):
        self.study, self.folder = study, folder
        self.id = name or uuid.uuid4().hex
        self.started = time.time()
        owner = multiprocessing.parent_process()  # The parent may have ended before this line.
        self.parent = os.getppid() if owner is None else owner.pid
        self.last: dict[str, tuple[Any, float]] = {}  # The last pulse of other workers, and when it changed.
        self._over = threading.Event()

    def __enter__(self) -> Pulse:
        locks = self.folder / "workers"
        locks.mkdir(parents=True, exist_ok=True)
        self._file = open(locks / self.id, "w", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        patiently(self.beat)
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        # The storage may be what failed: then the file, which is unlocked, shows the end.
        with contextlib.suppress(Exception):
            self.beat(ended=True)
            (self.folder / "workers" / self.id).unlink(missing_ok=True)
        self._file.close()

    def beat(self, ended: bool = False) -> None:
        """Write the pulse into the study."""
        lock = str((self.folder / "workers" / self.id).resolve())
        values = {"host": host(), "lock": lock, "start": self.started, "seen": time.time(), "ended": ended}
        self.study.set_user_attr(PULSE + self.id, values)

    def _go_on(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.5):
            if os.getppid() != self.parent:  # The command that started this worker was killed.
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if time.monotonic() - last >= BEAT:
                # The storage may be down; the next beat may come through.
                with contextlib.suppress(Exception):
                    self.beat()
                last = time.monotonic()

    def lives(self, other: str, pulses: Mapping[str, Any]) -> bool:
        """Return whether the worker with that id is alive, as far as can be told from here."""
        if other == self.id:
            return True
        pulse = pulses.get(PULSE + other)
        if pulse is not None and pulse.get("ended"):
            return False
        # Containers may share a host's name and kernel, and not its files.
        if pulse is not None and pulse["host"] == host() and Path(pulse["lock"]).is_file():
            return is_locked(Path(pulse["lock"]))
        value, since = self.last.get(other, (None, 0.0))
        if other not in self.last or value != pulse:
            self.last[other] = (pulse, time.monotonic())
            return True
        return time.monotonic() - since < STALE


def host() -> str:
    """Return a name of this machine since it was last started, on which locks and processes can be seen."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.is_file() else ''}".strip()


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock, here or where the file system's locks are shared."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def spent_seconds(attributes: Mapping[str, Any]) -> float:
    """Return the seconds in which at least one worker was at the study, whenever and wherever that was."""
    spans = sorted((p["start"], p["seen"]) for key, p in attributes.items() if key.startswith(PULSE))
    total, until = 0.0, -1.0
    for start, seen in spans:
        total += max(0.0, seen - max(start, until))
        until = max(until, seen)
    return total


def slots_of(records: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return the record that counts for each slot: the lowest number of its last attempt."""
    found: dict[int, FrozenTrial] = {}
    for record in sorted(records, key=lambda r: r.number):
        slot = record.user_attrs.get("slot")
        if slot is None:
            continue
        known = found.get(slot)
        if known is None or record.user_attrs["attempt"] > known.user_attrs["attempt"]:
            found[slot] = record
    return dict(sorted(found.items()))


def is_open(record: FrozenTrial) -> bool:
    """Return whether a record's slot waits for another attempt."""
    return record.state == TrialState.FAIL and "requeue" in record.user_attrs


def is_done(record: FrozenTrial) -> bool:
    return record.state.is_finished() and not is_open(record)


class Board:
    """The slots of one study, as one worker sees them."""

    def __init__(self, study: optuna.Study, pulse: Pulse):
        self.study, self.pulse = study, pulse

    def records(self) -> list[FrozenTrial]:
        return patiently(lambda: self.study.get_trials(deepcopy=False))

    def slots(self) -> dict[int, FrozenTrial]:
        return slots_of(self.records())

    def reap(self) -> None:
        """End the running records of workers that are gone, so that their slots can be had again."""
        running = [r for r in self.records() if r.state == TrialState.RUNNING]
        if not running:
            return
        pulses = patiently(lambda: self.pulse.study.user_attrs)
        for record in running:
            worker = record.user_attrs.get("worker")
            if worker is not None and not self.pulse.lives(worker, pulses):
                self.release(record, "its worker died")

    def release(self, record: FrozenTrial, reason: str) -> bool:
        """End a record whose slot goes on in another attempt; False if it had ended before."""
        storage = self.study._storage

        def end() -> bool:
            try:
                storage.set_trial_user_attr(record._trial_id, "requeue", reason)
                return storage.set_trial_state_values(record._trial_id, TrialState.FAIL)
            except UpdateFinishedTrialError:
                return False

        return patiently(end)

    def fail(self, worker: str, reason: str) -> int:
        """End for good what a worker that is gone was running; return the number of records."""
        storage, ended = self.study._storage, 0
        for record in self.records():
            if record.state != TrialState.RUNNING or record.user_attrs.get("worker") != worker:
                continue

            def end(record: FrozenTrial = record) -> bool:
                for key, value in (("reason", reason), ("steps", validated(record)), (KILLED, True)):
                    storage.set_trial_user_attr(record._trial_id, key, value)
                return storage.set_trial_state_values(record._trial_id, TrialState.FAIL)

            # Another worker may have ended the record first.
            with contextlib.suppress(UpdateFinishedTrialError):
                ended += patiently(end)
        return ended

    def claim(
        self,
        more: Callable[[dict[int, FrozenTrial]], bool],
        template: Callable[[dict[int, FrozenTrial]], Mapping[str, Any]],
    ) -> Claim | None:
        """Claim a slot to run: one that was left behind, or the next one if there are `more`; else None.

        Args:
            more: Returns whether the budget has a slot beyond these.
            template: Returns the arguments of `create_trial` for the slot after these: parameters,
                attributes.
        """
        with alone(self.pulse.folder, ".claim"):
            slots = self.slots()
            left = next((record for record in slots.values() if is_open(record)), None)
            if left is not None:
                slot, attempt = left.user_attrs["slot"], left.user_attrs["attempt"] + 1
                given: dict[str, Any] = {
                    "params": left.params,
                    "distributions": left.distributions,
                    "intermediate_values": left.intermediate_values,
                    "system_attrs": left.system_attrs,
                    "user_attrs": {k: v for k, v in left.user_attrs.items() if k in RUN_ON},
                }
                given["user_attrs"] |= _deaths(left)
                if left.params and "fingerprint" not in left.user_attrs:  # Not all parameters were chosen.
                    before = template({number: slots[number] for number in range(slot)})
                    given |= {key: before.get(key, {}) for key in ("params", "distributions")}
                    given["system_attrs"] = {}
            elif more(slots):
                slot, attempt = len(slots), 0
                given = dict(template(slots))
            else:
                return None
            token = uuid.uuid4().hex
            own = {"slot": slot, "attempt": attempt, "worker": self.pulse.id, "token": token}
            given["user_attrs"] = {**given.get("user_attrs", {}), **own}
            patiently(lambda: self.study.add_trial(create_trial(state=TrialState.RUNNING, **given)))
            records = self.records()
            mine = next(r for r in records if r.user_attrs.get("token") == token)
            first = next(
                r
                for r in records
                if (r.user_attrs.get("slot"), r.user_attrs.get("attempt")) == (slot, attempt)
            )
            if first.number != mine.number:
                self.release(mine, "another worker had the slot first")
                return None
            return Claim(slot, attempt, mine)


def validated(record: FrozenTrial) -> int:
    """Return the step of a record's last reported validation; 0 before the first."""
    return max(record.user_attrs.get(VALIDATED, 0), *record.intermediate_values, 0)


def _deaths(left: FrozenTrial) -> dict[str, int]:
    """Return how often in a row workers died at the last validation of an attempt, and its step."""
    at = validated(left)
    died = left.user_attrs["requeue"] == "its worker died"
    before = left.user_attrs.get("deaths", 0) if left.user_attrs.get("died_at", 0) == at else 0
    return {"deaths": before + died, "died_at": at}


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Let processes that share the folder come in turn; the storage tells the claims of others apart."""
    with open(folder / name, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
