"""Code that nobody has read, run in bubblewrap and judged from outside.

    outcome = run("print(input())", stdin="hello")             # one program
    verdict = judge(program, setup, test, "add")               # a program by tests that call its functions
    with calls(program) as call: call("add", 1, 2)             # its functions, called by data

The program and its tests go into two sandboxes with two pipes between them. A test's call and its result
cross as plain data (sandbox/child.py has the encoding), so that a test compares builtins that its own
process made. The judge's last message is the verdict. The program has no way to end or change the judge's
process, and this process reads nothing but that one message.

A sandbox is a process in namespaces of its own (processes, network, mounts, IPC, host name), without /proc
and /sys, with the interpreter and its libraries read-only, an empty /tmp of limited size, an empty
environment and no privileges. A seccomp filter refuses new processes (threads are allowed), sockets, and
parts of the kernel that a program does not need. As a sandbox is one process, its limits on memory and CPU
time hold for all of it. Root's sandboxes run as a user id that owns nothing.

A run is timed out when it used `SandboxLimits.cpu` seconds of CPU time, towards which other load on the
machine does not count, or when `SandboxLimits.wall` seconds have passed, which are many more.

An empty file costs no byte of /tmp and 1 KiB of kernel memory. As bwrap cannot limit the number of files,
this process counts them while a sandbox lives, and ends one that has more than `SandboxLimits.files`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import marshal
import os
import platform
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sandbox import filter
from sandbox.child import CandidateError, Over, Remote, decode, encode, framed

CHILD = Path(__file__).resolve().with_name("child.py")
INSIDE = "/child.pyc"
REPORTED = ("passed", "failed", "ended", "no data", "not judged")
REPORT_BYTES = 1 << 16
# Bytes of the longest answer that this process decodes; decoded as empty sets they are 75 times as many.
PARENT_BYTES = 1 << 20
SIGNALS = 256  # Signals that may be pending; a timer is one too, and takes kernel memory.
WATCH_SECONDS = 0.02  # Seconds between two counts of the files of a sandbox.
UNSAFE = "none: it ran with this user's rights"
# The ids that systemd reserves for dynamic service users (systemd.io/UIDS-GIDS). Each sandbox has one of its
# own, as the kernel counts processes by id.
USER_IDS = range(61184, 65520)
ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0", "TZ": "UTC", "HOME": "/tmp"}


@dataclass(frozen=True)
class SandboxLimits:
    """The limits of one sandbox.

    Args:
        cpu: Whole seconds of CPU time.
        wall: Seconds by the clock.
        memory: Bytes of address space.
        disk: Bytes under /tmp, which are memory too, and bytes of one file there.
        files: Files, folders and links under /tmp. They are counted every WATCH_SECONDS, so that some more
            may be made before the end; where /proc does not show a sandbox to its maker, they are not.
        output: Bytes of the standard output, and as many of the standard error.
        threads: Threads. Where root cannot leave its id, the memory bounds them.
    """

    cpu: int = 10
    wall: float = 60.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    files: int = 4096
    output: int = 1 << 20
    threads: int = 32


LIMITS = SandboxLimits()


class ProgramOutcome(NamedTuple):
    """How a program ended.

    `status` is "ended", with an exit code (128 + n for signal n); "timed out"; or "output" or "files", if it
    made more of these than its limits allow.
    """

    status: str
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    sandbox: str


class Verdict(NamedTuple):
    """The verdict on a program by its tests.

    `kind` is "passed", "failed", "timed out", "no data" (a value was returned that is no plain data) or "not
    judged" (the test is at fault, or needs more than data); `reason` says why.
    """

    kind: str
    reason: str
    seconds: float
    sandbox: str


# --- what isolates


class Isolation(NamedTuple):
    """A way to isolate a process.

    `prefix` stands before the interpreter's command line. With `leave_root` the child leaves root itself.
    """

    name: str
    prefix: tuple[str, ...]
    leave_root: bool


def isolation(allow_unsafe: bool = False) -> Isolation:
    """Return the way to isolate on this machine; each is tried once, by running a program in it.

    Raises:
        ValueError: There is none, and `allow_unsafe` is false.
    """
    try:
        return _bubblewrap(shutil.which("bwrap"))
    except ValueError:
        if not allow_unsafe:
            raise
        return Isolation(UNSAFE, (), False)


@functools.cache
def _bubblewrap(command: str | None) -> Isolation:
    refusal = "generated code runs in a sandbox only, and"
    if command is None:
        raise ValueError(f"{refusal} bubblewrap is not installed: install it (apt install bubblewrap)")
    filter.program(platform.machine())
    version = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=False
    ).stdout.strip()
    said = ""
    for user_namespace in (False, True) if os.getuid() == 0 else (True,):
        found = Isolation(version, (command, *_arguments(user_namespace)), not user_namespace)
        outcome = _run(found, "print('inside')", "", LIMITS)
        if outcome.stdout == "inside\n":
            return found
        said = (outcome.stderr.strip().splitlines() or [outcome.status])[-1]
    raise ValueError(f"{refusal} {version} cannot make one here: {said}")


def _arguments(user_namespace: bool) -> Iterator[str]:
    """Yield bwrap's own arguments; `--size` needs version 0.7 or newer."""
    yield from ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--die-with-parent", "--hostname", "sandbox")
    if user_namespace:
        yield from ("--unshare-user", "--uid", "65534", "--gid", "65534")
    else:
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    prefix = Path(sys.base_prefix).resolve()
    bound = Path(_interpreter()) if prefix == Path("/usr") else prefix
    for folder in ("/dev", "/etc", "/usr", *map(str, reversed(bound.parents[:-1]))):
        yield from ("--perms", "0755", "--dir", folder)  # Without it bwrap may close them to other users.
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
        else:
            yield from ("--ro-bind-try", path, path)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    yield from ("--ro-bind", str(bound), str(bound))
    for device in ("null", "zero", "random", "urandom"):
        yield from ("--dev-bind", f"/dev/{device}", f"/dev/{device}")


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


@functools.cache
def _compiled() -> bytes:
    """Return sandbox/child.py as a .pyc file; compiling it each time would take as long as a start."""
    code = compile(CHILD.read_bytes(), CHILD.name, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _pipe_holding(data: bytes) -> int:
    """Return the reading end of a pipe with these bytes in it, fewer than the 64 KiB that a pipe holds."""
    end, start = os.pipe()
    with open(start, "wb") as pipe:
        pipe.write(data)
    return end


# --- processes


class Sandbox:
    """One process in a sandbox, and everything that ends with it.

    Its standard input begins with the job. `fds` are passed on and named on its command line.
    """

    def __init__(
        self,
        found: Isolation,
        role: str,
        limits: SandboxLimits,
        fds: tuple[int, ...] = (),
        output: bool = False,
    ) -> None:
        words = [_interpreter(), "-s", "-S", "-P", "-B", INSIDE if found.prefix else str(CHILD)]
        words += [role, *map(str, fds)]
        read: list[int] = []
        if found.prefix:
            read = [_pipe_holding(data) for data in (filter.program(platform.machine()), _compiled())]
            words = [
                *found.prefix,
                *("--perms", "1777", "--size", str(limits.disk), "--tmpfs", "/tmp", "--chdir", "/tmp"),
                *("--perms", "0444", "--ro-bind-data", str(read[1]), INSIDE),
                *("--remount-ro", "/", "--seccomp", str(read[0]), *words),
            ]
        quiet = subprocess.DEVNULL
        self.limits, self.isolated = limits, bool(found.prefix)
        self.killed = self.overfull = False
        self.started = self.ended = time.monotonic()
        try:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=quiet if role == "candidate" else subprocess.PIPE,
                stderr=subprocess.PIPE if output else quiet,
                pass_fds=(*fds, *read),
                env=ENVIRONMENT,
                start_new_session=True,
            )
        finally:
            for fd in read:
                os.close(fd)

    def finish(self, deadline: float) -> int | None:
        """Wait for the end and return the exit code, or None where it had to be killed at the deadline."""
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                self.process.wait()
                return None
            time.sleep(0.001)
        if self.ended == self.started:
            self.ended = time.monotonic()
        return self.process.returncode

    @property
    def used_up(self) -> bool:
        """Whether too much CPU time ended it.

        A program that ignores the signal is killed a second of CPU time later, and the kernel does not say
        why. It may also have been killed for want of memory, or by itself: then it usually ended too early to
        have used its CPU time.
        """
        code = self.process.returncode
        if code in (128 + signal.SIGKILL, -signal.SIGKILL) and not self.killed:
            return (self.ended - self.started) * (os.cpu_count() or 1) >= self.limits.cpu
        return code in (128 + signal.SIGXCPU, -signal.SIGXCPU)

    def count_files(self) -> None:
        """Kill it if it has more files than it may have. Only its own /tmp is counted."""
        try:
            bwrap = self.process.pid
            first = Path(f"/proc/{bwrap}/task/{bwrap}/children").read_text().split()[0]
            found = os.statvfs(f"/proc/{first}/root/tmp")
        except (OSError, IndexError):  # The process is not there yet, or not any more, or is not shown.
            return
        page = resource.getpagesize()
        own = found.f_blocks * found.f_frsize == -(-self.limits.disk // page) * page
        if own and found.f_files - found.f_ffree > self.limits.files + 1:  # The folder itself is a file too.
            self.overfull = True
            self.kill()

    def kill(self) -> None:
        """Kill its process group, which holds the first process inside; with that one all inside end.

        bwrap's --new-session would take the first process out of the group, and --die-with-parent alone
        leaves it running if bwrap is killed while it sets up.
        """
        if self.process.returncode is None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left and close every pipe."""
        self.finish(0.0)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def _started(*args: Any, **kwargs: Any) -> Iterator[Sandbox]:
    global _watcher
    sandbox = Sandbox(*args, **kwargs)
    try:
        with _lock:
            _live.add(sandbox)
            if sandbox.isolated and (_watcher is None or not _watcher.is_alive()):
                _watcher = threading.Thread(target=_watch, daemon=True)
                _watcher.start()
        yield sandbox
    finally:
        with _lock:
            _live.discard(sandbox)
        sandbox.close()


def _watch() -> None:
    """Count the files of all sandboxes of this process, for as long as there are some."""
    global _watcher
    while True:
        time.sleep(WATCH_SECONDS)
        with _lock:
            if not _live:
                _watcher = None
                return
            live = tuple(_live)
        for sandbox in live:
            if sandbox.isolated and sandbox.process.returncode is None:
                sandbox.count_files()


def _forked() -> None:
    """Reset a forked child, which has neither sandboxes nor watcher, and perhaps a lock that nobody frees."""
    global _lock, _watcher
    _lock, _watcher = threading.Lock(), None
    _live.clear()


_live: set[Sandbox] = set()
_lock = threading.Lock()
_watcher: threading.Thread | None = None
os.register_at_fork(after_in_child=_forked)


def end_all() -> None:
    """Kill every sandbox of this process, after an interrupt; threads that wait for one then go on."""
    for sandbox in tuple(_live):
        sandbox.kill()


def _job(found: Isolation, limits: SandboxLimits, **fields: Any) -> bytes:
    """Return the first message of a sandbox: its fields, limits and user id."""
    numbers = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits.cpu,  # A signal comes at this limit, and a kill a second later.
        "RLIMIT_FSIZE": limits.disk,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_AS": limits.memory,
    }
    if found.prefix:  # Without a sandbox the user's other processes would count too.
        numbers |= {"RLIMIT_NPROC": limits.threads + 1, "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0}
        numbers["RLIMIT_SIGPENDING"] = SIGNALS
    uid = USER_IDS[next(_turns) % len(USER_IDS)] if found.leave_root else None
    return framed(encode(fields | {"limits": numbers, "uid": uid}))


_turns = itertools.count(os.getpid())


def _exchange(
    feeds: dict[Any, bytes], drains: list[Any], most: int, deadline: float
) -> tuple[str, list[bytes]]:
    """Write each feed and read each drain until all drains have ended; return the status and what was read.

    The status is "ended", "timed out", or "output" when one drain gave more than `most` bytes.
    """
    status = "ended"
    got = {stream: bytearray() for stream in drains}
    left = {stream: memoryview(data) for stream, data in feeds.items()}
    with selectors.DefaultSelector() as waiting:
        for streams, event in ((feeds, selectors.EVENT_WRITE), (drains, selectors.EVENT_READ)):
            for stream in streams:
                os.set_blocking(stream.fileno(), False)
                waiting.register(stream, event)
        open_drains = len(drains)
        while open_drains and status == "ended":
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                status = "timed out"
            for key, _ in ready:
                stream: Any = key.fileobj
                if stream in left:
                    try:
                        left[stream] = left[stream][os.write(stream.fileno(), left[stream][: 1 << 16]) :]
                    except BrokenPipeError:
                        left[stream] = left[stream][:0]
                    if not left[stream]:
                        waiting.unregister(stream)
                        stream.close()
                elif part := os.read(stream.fileno(), 1 << 16):
                    got[stream] += part
                    if len(got[stream]) > most:
                        status = "output"
                else:
                    waiting.unregister(stream)
                    open_drains -= 1
    return status, [bytes(data[:most]) for data in got.values()]


# --- what is offered


def run(
    program: str, stdin: str = "", limits: SandboxLimits = LIMITS, allow_unsafe: bool = False
) -> ProgramOutcome:
    """Run one program to its end.

    Raises:
        ValueError: Nothing isolates here, and `allow_unsafe` is false.
    """
    return _run(isolation(allow_unsafe), program, stdin, limits)


def _run(found: Isolation, program: str, stdin: str, limits: SandboxLimits) -> ProgramOutcome:
    with _started(found, "run", limits, output=True) as sandbox:
        deadline = sandbox.started + limits.wall
        process = sandbox.process
        job = _job(found, limits, program=program) + stdin.encode("utf-8", "surrogatepass")
        status, got = _exchange(
            {process.stdin: job}, [process.stdout, process.stderr], limits.output, deadline
        )
        code = sandbox.finish(deadline if status == "ended" else 0.0)
        if sandbox.overfull:
            status = "files"
        elif status == "ended" and (code is None or sandbox.used_up):
            status = "timed out"
        stdout, stderr = (data.decode("utf-8", "replace") for data in got)
        seconds = time.monotonic() - sandbox.started
        return ProgramOutcome(
            status, code if status == "ended" else None, stdout, stderr, seconds, found.name
        )


def judge(
    program: str,
    setup: str,
    test: str,
    entry: str | None = None,
    reference: str = "",
    limits: SandboxLimits = LIMITS,
    allow_unsafe: bool = False,
) -> Verdict:
    """Judge a program by a test that calls its functions; the two never share a process.

    Args:
        program: Source of the candidate.
        setup: Source that runs in the judge before the test.
        test: Source that raises if the candidate is wrong.
        entry: The one name in the test that is the candidate's; without it, all that nobody else defines.
        reference: Source of a right solution. A builtin's name is the candidate's only if this defines it
        too. limits: The limits of each of the two sandboxes.
        allow_unsafe: Run the program where nothing isolates it.

    Raises:
        ValueError: Nothing isolates here, and `allow_unsafe` is false.
    """
    found = isolation(allow_unsafe)
    asks, answers = os.pipe(), os.pipe()
    with contextlib.ExitStack() as stack:
        try:
            judging = stack.enter_context(_started(found, "judge", limits, (answers[0], asks[1])))
            candidate = stack.enter_context(_started(found, "candidate", limits, (asks[0], answers[1])))
        finally:
            for fd in (*asks, *answers):
                os.close(fd)
        deadline = judging.started + limits.wall
        feeds = {
            judging.process.stdin: _job(
                found, limits, setup=setup, test=test, entry=entry, reference=reference
            ),
            candidate.process.stdin: _job(found, limits, program=program),
        }
        status, (report,) = _exchange(feeds, [judging.process.stdout], REPORT_BYTES, deadline)
        kind, reason = _verdict(status, report, judging, candidate, limits, deadline)
        return Verdict(kind, reason, time.monotonic() - judging.started, found.name)


def _verdict(
    status: str, report: bytes, judging: Sandbox, candidate: Sandbox, limits: SandboxLimits, deadline: float
) -> tuple[str, str]:
    """Return the kind and reason that the judge reported, or why it could not."""
    try:
        kind, reason = map(str, decode(report[8:], guarded=True))
        kind = kind if kind in REPORTED else ""
        # A terminal obeys some characters that are not printable.
        reason = "".join(letter if letter.isprintable() else " " for letter in reason)
    except (ValueError, TypeError):
        kind, reason = "", ""
    if status == "timed out" or (not kind and judging.finish(deadline) is None):
        return "timed out", f"{limits.wall:g} s by the clock"
    if not kind and judging.used_up:
        return "timed out", f"the test used {limits.cpu} s of CPU time"
    if judging.overfull:
        return "failed", f"the test made more than {limits.files:,} files"
    if not kind:
        return "failed", "the test's process ended without a verdict"
    if kind != "ended":
        return kind, reason
    code = candidate.finish(deadline)
    if candidate.overfull:
        return "failed", f"the program made more than {limits.files:,} files"
    if candidate.used_up:
        return "timed out", f"{limits.cpu} s of CPU time"
    return "failed", reason if code is None else f"{reason} with exit code {code}"


@contextlib.contextmanager
def calls(
    program: str, limits: SandboxLimits = LIMITS, allow_unsafe: bool = False
) -> Iterator[Callable[..., Any]]:
    """Yield a function that calls a program's functions from here, by data: `call(name, *args, **kwargs)`.

    It is for tests that are this project's own. What a call returns consists of builtins; what it raises is
    an Exception of a builtin type, or a CandidateError with the type's name. The limits hold for all calls
    together, and an answer that would cost this process much is refused: one of more than PARENT_BYTES, or
    with keys or members that were chosen to collide (see `child.decode`).

    Raises:
        ValueError: Nothing isolates here, and `allow_unsafe` is false.
        CandidateError: The program has ended, or a call returned what is no plain data.
    """
    found = isolation(allow_unsafe)
    asks, answers = os.pipe(), os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, asks[1])
        stack.callback(os.close, answers[0])
        try:
            sandbox = stack.enter_context(_started(found, "candidate", limits, (asks[0], answers[1])))
        finally:
            os.close(asks[0])
            os.close(answers[1])
        alarm = threading.Timer(limits.wall, sandbox.kill)
        alarm.daemon = True
        stack.callback(alarm.cancel)
        alarm.start()
        remote = Remote(answers[0], asks[1], PARENT_BYTES, guarded=True)
        assert sandbox.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), sandbox.process.stdin as pipe:
            pipe.write(_job(found, limits, program=program))

        def call(name: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return remote.call(name, args, kwargs)
            except Over as over:
                raise CandidateError(str(over)) from None

        try:
            remote.hear()
        except Over as over:
            raise CandidateError(str(over)) from None
        yield call
