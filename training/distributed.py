"""Several processes that train one model together, as torchrun starts them.

    torchrun --standalone --nproc_per_node 4 -- trainingmanager.py [the same flags]

The path of a batch. An update has batch_size * accumulation rows. Each process, a rank, reads its range of
them (`Batches` in dataset.py), and seeds each pass by the run's seed, the update and the row. The ranks add
up their targets; each divides its summed loss by all of them, so that the sum of the ranks' gradients is the
gradient of the mean over the whole update. `Reduction` in training/reduction.py makes this sum in flat
buckets while backward runs. From then on all ranks do the same with the same numbers: norm, clip, the
decision whether all is finite, the optimizers' steps. Of Muon each rank orthogonalises its share of the
matrices and sends it to the others.

The path of a decision. Time is rank 0's, sent after each update, and budget, schedule and patience go by it.
Once more in an update the ranks agree whether anyone was told to stop, by a signal or by the observer, so
that all leave the loop after the same update. Rank 0 alone has the folder, its lock, the log and the bar,
prepares the data, runs the guards, saves and reports; the others wait until it tells them to go on, and
print nothing. A rank that fails tells its reason and ends; the others lose it in the next thing that they do
together, and end without a word. A rank that ends without a reason, or does not come within PATIENCE, is
named by the others.

Everything here does nothing in a process that is alone. All of it comes from torchrun's environment.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from config.console import under_torchrun
from modules.precision import Precision, choose_device
from training.signals import RankLost

T = TypeVar("T")

PATIENCE = 600.0  # Seconds that a rank waits for another in what all do together.
GRACE = 5.0  # Seconds in which those that are left say so, before the others are named.
POLL = 0.02  # Seconds between two looks for what rank 0 tells.
PIECE = 2**22  # Bytes of a value in torch's store, which ends the connection at more than 2**23.
JOINING = 120.0  # Seconds in which all processes have to come.


@dataclass(eq=False)
class World:
    """The processes that train together, seen from one of them; by default it is alone.

    Attributes:
        rank: The number of this process among `size`.
        local_rank: Its number on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None  # torch's store of keys, which outlives each process.
    told_so_far: dict[int, int] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, prints and decides."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over all ranks; of a rank that is alone the numbers."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def sum_of(self, t: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, in its memory."""
        if self.size > 1:
            self.together(lambda: dist.all_reduce(t))
        return t

    def largest(self, *numbers: float) -> list[float]:
        """Return the largest of each number over all ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def of_first(self, number: float) -> float:
        """Return rank 0's number."""
        (found,) = self.largest(number if self.is_first else float("-inf"))
        return found

    def _reduced(self, numbers: tuple[float, ...], how: Any) -> list[float]:
        if self.size == 1:
            return list(numbers)
        words = torch.tensor(numbers, dtype=torch.float64)
        self.together(lambda: dist.all_reduce(words, how))
        return words.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; it is sent as JSON."""
        if self.size == 1:
            return [value]
        word = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        (longest,) = self.largest(len(word))
        padded = torch.full((int(longest),), ord(" "), dtype=torch.uint8)
        padded[: len(word)] = word
        words = [torch.empty_like(padded) for _ in range(self.size)]
        self.together(lambda: dist.all_gather(words, padded))
        return [json.loads(bytes(word.tolist())) for word in words]

    def collect(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, when it says it: it may have worked for hours. Sent as JSON."""
        return [self.told(value, by) for by in range(self.size)]

    def told(self, value: Any = None, by: int = 0) -> Any:
        """Return what one rank says, when it says it: it may have worked for hours. It is sent as JSON.

        Args:
            value: What this rank says, if it is the one.
            by: The rank that says it.
        """
        if self.size == 1:
            return value
        number = self.told_so_far[by] = self.told_so_far.get(by, 0) + 1
        key = f"told/{by}/{number}"
        try:
            if self.rank == by:
                words = json.dumps(value)
                pieces = [words[i : i + PIECE] for i in range(0, len(words), PIECE)]
                for i, piece in enumerate(pieces):
                    self.store.set(f"{key}/{i}", piece)
                self.store.set(key, str(len(pieces)))
            while not self.store.check([key]):
                if self.store.check(["ended"]):
                    raise RankLost("another process has ended")
                time.sleep(POLL)
            found = [self.store.get(f"{key}/{i}") for i in range(int(self.store.get(key)))]
            return json.loads(b"".join(found))
        except RuntimeError:
            raise RankLost("torchrun has ended, by whose store the processes find each other") from None

    def together(self, act: Callable[[], T]) -> T:
        """Do what all ranks do; RankLost if another one has ended or does not come."""
        began = time.perf_counter()
        try:
            return act()
        except RuntimeError as error:
            if "out of memory" in str(error).lower():
                raise
            raise RankLost(self._who_is_lost(time.perf_counter() - began)) from None

    def _who_is_lost(self, seconds: float) -> str:
        """Return a sentence that names the ranks that do not say, as this one does, that others are lost."""
        if seconds >= PATIENCE:
            self.store.set("hangs", str(round(seconds)))
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()  # So that those who wait for this one are told, too.
        self.store.set(f"left/{self.rank}", "")
        others, until = [], time.monotonic() + GRACE
        while time.monotonic() < until:
            others = [r for r in range(self.size) if not self.store.check([f"left/{r}"])]
            if not others or self.store.check(["ended"]):
                break
            time.sleep(POLL)
        names = " and ".join(map(str, others)) or "another"
        did = "has ended without a word"
        if self.store.check(["hangs"]):
            did = f"hangs: it did not come in {int(self.store.get('hangs'))} s to what all do together"
        return (
            f"process {names} of {self.size} {did}; all others end, and what was saved is whole: go on with "
            "--resume auto"
        )

    def is_first_to_end(self) -> bool:
        """Return whether no other rank has said why it ends."""
        try:
            return self.store.add("ended", 1) == 1
        except RuntimeError:  # The store is gone, and with it who could know.
            return self.is_first


ALONE = World()


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Be one of the processes that torchrun started, until all have come to the end.

    All but rank 0 print nothing meanwhile. Of several that end by an error, the first raises it, and the
    others end with exit code 2 and without a word.
    """
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    world = _join()
    try:
        with contextlib.nullcontext() if world.is_first else _silent():
            yield world
            world.told(None)  # Rank 0 has come to the end.
    except BaseException:
        if not world.is_first_to_end():
            raise SystemExit(2) from None
        raise
    finally:
        with contextlib.suppress(RuntimeError, AssertionError, ValueError):
            dist.destroy_process_group()


def _join() -> World:
    """Join the group of torchrun's environment: gloo between CPUs, NCCL between GPUs."""
    patience = datetime.timedelta(seconds=PATIENCE)
    store, rank, size = next(iter(rendezvous("env://", timeout=datetime.timedelta(seconds=JOINING))))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"plumb/{attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=patience)
    # None goes on, and may end with its sentence, while gloo still connects another, which would then fail.
    own.set(f"joined {rank}", "")
    own.wait([f"joined {other}" for other in range(size)], patience)
    return World(rank, size, int(os.environ["LOCAL_RANK"]), own)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Print nothing, to either stream."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def of_rank(precision: Precision, world: World) -> Precision:
    """Return the precision on the device of this process, which of several on a machine is its own GPU.

    Raises:
        ValueError: There are fewer GPUs than processes.
    """
    if world.size == 1 or precision.device.type == "cpu":
        return precision
    if precision.device.index is not None:
        raise ValueError(
            f"--device {precision.device} is one GPU, and {world.size} processes need one each; take cuda"
        )
    return replace(precision, device=choose_device(f"cuda:{world.local_rank}"))


def in_turns(shares: list[list[T]]) -> list[T]:
    """Return one list of which the ranks have had a value each in turns, rank 0 the first."""
    return [value for row in itertools.zip_longest(*shares) for value in row if value is not None]


def shared_rows(world: World, matrices: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `compute(matrices)`, (N, rows, columns), of which each rank computes every `size`-th matrix."""
    if world.size == 1:
        return compute(matrices)
    n = len(matrices)
    own = compute(matrices[world.rank :: world.size]) if world.rank < n else matrices[:0]
    sent = matrices.new_zeros(-(-n // world.size), *matrices.shape[1:])
    sent[: len(own)] = own
    received = [torch.empty_like(sent) for _ in range(world.size)]
    world.together(lambda: dist.all_gather(received, sent))
    return torch.stack(received, dim=1).flatten(0, 1)[:n]
