"""Sixty-three programs that cheat, break out or wear the machine down, and a command that tries them all.

    python tests/hostile.py --times 20 --workers 4

Each is judged as the solution of one small problem, and run as a program that prints ESCAPED wherever it got
what it must not have. The last line is a JSON object: every verdict, what was printed, what is left running
a second later, what changed outside, and the growth of this process. It needs sandbox/ and the standard
library only, so that any user's interpreter can run it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import sandbox  # noqa: E402

SECRET = "canary-7f3a91"
TEST = """
def check(candidate):
    assert candidate([1, 2, 3]) == 6
    assert candidate([]) == 0
    data = [2, 3]
    assert candidate(data) == sum(data)
    assert candidate([5] * 10) == 50 and candidate([-1, 1, -7]) == -7
check(total)
"""
HONEST = "def total(values):\n    return sum(values)\n"

# Each replaces BODY here. SYSCALL(x86-64, aarch64, arguments...) gives what the kernel answers.
FRAME = """
import atexit, builtins, ctypes, gc, mmap, os, resource, signal, socket, subprocess, sys, threading, time
def SYSCALL(x86, arm, *args):
    number = x86 if os.uname().machine == "x86_64" else arm
    return ctypes.CDLL(None, use_errno=True).syscall(number, *args)
def tried(action, *args):
    try:
        action(*args)
        print("ESCAPED", action, args, flush=True)
    except Exception:
        pass
BODY
"""


def calls(body: str) -> str:
    return "def total(values):\n" + "".join(f"    {line}\n" for line in body.strip().splitlines())


EQUAL = "class Equal(BASE):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
FORGED = "sys.modules['__main__'].framed(sys.modules['__main__'].encode(('passed', '')))"

HOSTILE: dict[str, dict[str, str]] = {
    "cheat": {
        "exit when called": calls("sys.exit(0)"),
        "exit when loaded": "sys.exit(0)",
        "exit at once": calls("os._exit(0)"),
        "equal to everything": EQUAL.replace("BASE", "object") + calls("return Equal()"),
        "an int equal to everything": EQUAL.replace("BASE", "int") + calls("return Equal(4)"),
        "a list equal to everything": EQUAL.replace("BASE", "list") + calls("return Equal([4])"),
        "patched builtins": "builtins.AssertionError = builtins.sum = builtins.exec = lambda *a: 0\n"
        + calls("return 0"),
        "a forged line": calls("print('passed', flush=True)\nos.write(1, b'passed')\nreturn True"),
        "a forged verdict everywhere": f"DATA = {FORGED}\n"
        + calls("for fd in range(64):\n    try: os.write(fd, DATA)\n    except OSError: pass\nos._exit(0)"),
        "a patched judge": "sys.modules['__main__'].judge = lambda *a: ('passed', '')\n"
        "sys.modules['__main__'].Remote.call = lambda *a: 6\n" + calls("return 0"),
        "exit with a handler": "atexit.register(os._exit, 0)\n" + calls("raise SystemExit(0)"),
        "another program instead": calls("os.execv(sys.executable, [sys.executable, '-c', 'pass'])"),
        "an exception of a known name": "class Over(BaseException): pass\nOver.__name__ = 'SystemExit'\n"
        + calls("raise Over('passed')"),
        "an emptied argument": calls("values.clear()\nreturn 0"),
    },
    "time": {
        "a loop": calls("while True: pass"),
        "a sleep": calls("time.sleep(1e6)"),
        "one long operation": calls("return 10 ** 10 ** 9"),
        "a regular expression": calls("import re\nreturn re.match('(a+)+$', 'a' * 60 + 'b')"),
        "a signal for the time that is blocked": "blocked = {signal.SIGXCPU}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, blocked)\n" + calls("while True: pass"),
        "a handler for the time": "import contextlib\nwith contextlib.suppress(PermissionError):\n"
        "    signal.signal(signal.SIGXCPU, lambda *_: os._exit(0))\n" + calls("while True: pass"),
        "a loop in a thread": "threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\n"
        + calls("threading.Event().wait()"),
        "an endless answer": calls("return iter(int, 1)"),
        "a lock that is held when loaded": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    },
    "memory and disk": {
        "a terabyte": calls("return len(bytearray(10 ** 12))"),
        "a growing list": calls("x = [0]\nwhile True: x += x"),
        "a mapping": calls("m = mmap.mmap(-1, 1 << 34)\nprint('ESCAPED', flush=True)\nreturn 1"),
        "stacks of threads": calls(
            "threading.stack_size(64 << 20)\n"
            "for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
            "print('ESCAPED', flush=True)"
        ),
        "a full disk": calls(
            "for n in range(16):\n    with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(4 << 20))\n"
            "print('ESCAPED', flush=True)"
        ),
        "files that hold nothing": calls(
            "for n in range(10 ** 7):\n    os.close(os.open(f'/tmp/{n}', os.O_CREAT))\n"
            "    if n == 50_000: print('ESCAPED', flush=True)"
        ),
        "links and folders": calls(
            "for n in range(10 ** 7):\n    os.mkdir(f'/tmp/d{n}')\n    os.symlink('x', f'/tmp/d{n}/l')\n"
            "    if n == 25_000: print('ESCAPED', flush=True)"
        ),
        "attributes of a file": calls(
            "open('/tmp/x', 'w').close()\nfor n in range(1000):\n"
            "    os.setxattr('/tmp/x', f'user.{n}', bytes(60_000))\nprint('ESCAPED', flush=True)"
        ),
        "a sparse file": calls(
            "f = open('/tmp/big', 'wb')\nos.truncate(f.fileno(), 1 << 40)\nprint('ESCAPED', flush=True)"
        ),
        "files without a name": calls(
            "if SYSCALL(319, 279, b'x', 0) >= 0: print('ESCAPED', flush=True)\nreturn 1"
        ),
        "shared memory": calls(
            "if SYSCALL(29, 194, 0, 1 << 34, 0o1600) >= 0: print('ESCAPED', flush=True)\nreturn 1"
        ),
        "a deep recursion": "sys.setrecursionlimit(10 ** 9)\ndef total(values): return total(values) + 1\n",
    },
    "process": {
        "a fork bomb": calls("while True:\n    os.fork()\n    print('ESCAPED', flush=True)"),
        "a daemon": calls(
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\nprint('ESCAPED')"
        ),
        "a command": calls("subprocess.Popen(['/bin/sleep', '600'])\nprint('ESCAPED', flush=True)"),
        "a spawn": calls("os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})\nprint('ESCAPED')"),
        "a pool": "import multiprocessing\n"
        + calls("multiprocessing.get_context('fork').Process(target=print).start()\nprint('ESCAPED')"),
        "a kill of all": calls(
            "for pid in (-1, 1, 0):\n    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass\n"
            "return 1"
        ),
        "a kill of its makers": calls(
            "for pid in (MAKER, MAKER - 1, os.getppid(), 1):\n"
            "    for s in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):\n"
            "        try: os.kill(pid, s)\n        except OSError: pass\nreturn 1"
        ),
        "a thousand threads": calls(
            "for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
            "print('ESCAPED', flush=True)"
        ),
        "leaving its group and its parent": calls(
            "SYSCALL(157, 167, 1, 0, 0, 0, 0)\nfor f in (os.setsid, os.setpgrp): tried(f) if 0 else None\n"
            "for fd in range(64):\n    try: os.close(fd)\n    except OSError: pass\ntime.sleep(600)"
        ),
    },
    "file system": {
        "a write": calls("tried(open, 'CANARY/file', 'w')\ntried(open, 'CANARY/new', 'x')\nreturn 1"),
        "a removal": calls(
            "import shutil\ntried(os.remove, 'CANARY/file')\ntried(os.rmdir, 'CANARY')\n"
            "shutil.rmtree('/', ignore_errors=True)\nreturn 1"
        ),
        "a read": calls(
            "for path in ('CANARY/file', '/proc/self/environ', '/proc/1/environ', '/etc/shadow',\n"
            "    '/etc/passwd', '/etc/hostname'): tried(open, path)\nprint(dict(os.environ))\nreturn 1"
        ),
        "the home folder": calls(
            "for path in ('HOME', '/root', '/home', '/var', '/'): tried(open, path + '/x', 'w')\n"
            "tried(os.listdir, 'HOME') if 'HOME' not in sys.prefix else None\nreturn 1"
        ),
        "the interpreter": calls(
            "tried(open, os.__file__, 'a')\ntried(open, sys.executable, 'r+b')\n"
            "tried(os.remove, os.__file__)\ntried(os.chmod, os.__file__, 0o777)\n"
            "tried(open, '/child.pyc', 'r+b')\nreturn 1"
        ),
        "a path upwards": calls(
            "os.chdir('/tmp')\nos.symlink('../../../../CANARY/file', 'link')\ntried(open, 'link')\n"
            "tried(os.link, 'CANARY/file', 'hard')\ntried(open, '../' * 40 + 'CANARY/file')\nreturn 1"
        ),
        "a chroot and an open folder": calls(
            "tried(os.chroot, '/tmp')\nfor fd in range(64):\n"
            "    try: tried(open, os.open('..', os.O_RDONLY, dir_fd=fd))\n    except OSError: pass\nreturn 1"
        ),
        "a device": calls(
            "tried(os.mknod, '/tmp/disk', 0o60666, os.makedev(254, 0))\n"
            "for name in ('mem', 'kmsg', 'sda', 'vda', 'tty', 'shm/x', 'fuse'):\n"
            "    tried(open, '/dev/' + name, 'wb')\n"
            "return 1"
        ),
    },
    "network and kernel": {
        "a connection": calls(
            "tried(socket.create_connection, ('127.0.0.1', PORT), 1)\ntried(socket.socket)\nreturn 1"
        ),
        "a datagram and a raw socket": calls(
            "tried(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)\n"
            "tried(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)\ntried(socket.socket, 17, 3)\nreturn 1"
        ),
        "sockets that know no namespace": calls(
            "for family in (1, 16, 38, 40): tried(socket.socket, family, socket.SOCK_STREAM)\nreturn 1"
        ),
        "a namespace of its own": calls(
            "if SYSCALL(272, 97, 0x10000000) == 0: print('ESCAPED unshare', flush=True)\n"
            "if SYSCALL(56, 220, 0x10000011, 0, 0, 0, 0) >= 0: print('ESCAPED clone', flush=True)\n"
            "return 1"
        ),
        "a mount": calls(
            "if SYSCALL(165, 40, b'x', b'/tmp', b'tmpfs', 0, 0) == 0: print('ESCAPED mount', flush=True)\n"
            "if SYSCALL(428, 428, -100, b'/', 1) >= 0: print('ESCAPED open_tree', flush=True)\nreturn 1"
        ),
        "parts of the kernel": calls(
            "for name, x86, arm, *args in (('bpf', 321, 280, 0, 0, 0), ('userfaultfd', 323, 282, 1),\n"
            "    ('io_uring', 425, 425, 1, bytes(120)), ('perf', 298, 241, bytes(112), 0, -1, -1, 0),\n"
            "    ('keyctl', 250, 219, 0, -3, 1), ('log', 103, 116, 10, 0, 0),\n"
            "    ('ptrace', 101, 117, 0, 0, 0, 0)):\n"
            "    if SYSCALL(x86, arm, *args) >= 0: print('ESCAPED', name, flush=True)\nreturn 1"
        ),
        "root again": calls(
            "tried(os.setuid, 0)\ntried(os.setgid, 0)\ntried(os.setgroups, [0])\ntried(os.nice, -5)\n"
            "tried(resource.setrlimit, resource.RLIMIT_AS, (-1, -1))\n"
            "tried(time.clock_settime, time.CLOCK_REALTIME, 0)\ntried(socket.sethostname, 'x')\nreturn 1"
        ),
    },
    "output": {
        "a flood": calls("while True: os.write(1, b'x' * 65536)"),
        "a flood of errors": calls("while True: os.write(2, b'x' * 65536)"),
        "a flood of answers": calls(
            "while True:\n    for fd in range(3, 64):\n        try: os.write(fd, bytes(8192))\n"
            "        except OSError: pass"
        ),
        "a large answer": calls("return 'x' * (100 << 20)"),
        "a large error": calls("raise ValueError('\\x1b[2J\\udcff' * (10 << 20))"),
    },
}
SLEEPERS = {"a sleep", "a lock that is held when loaded", "leaving its group and its parent"}
LIMITS = sandbox.SandboxLimits(cpu=1, output=1 << 20)


def snapshot(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_nlink)
        if path.is_file():
            found[str(path)] = (*found[str(path)], path.read_text())  # type: ignore[misc]
    return found


def still_running(size: int) -> list[str]:
    """Processes of sandboxes whose /tmp has this size; nothing in one outlives its first, bwrap's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--size" in words and str(size).encode() in words:
            found.append(path.parent.name)
    return found


def listening(hits: list[str]) -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                server.accept()
            except OSError:
                return
            hits.append("a connection")

    threading.Thread(target=accept, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    size = (8 << 20) + 4096 * (os.getpid() % 1000)  # tells this process's sandboxes from others'
    patient = replace(LIMITS, disk=size)
    isolated = sandbox.isolation().name
    verdicts: dict[str, list[str]] = defaultdict(list)
    reasons: dict[str, str] = {}
    escaped: list[str] = []
    hits: list[str] = []
    with tempfile.TemporaryDirectory() as folder, listening(hits) as server:
        canary = Path(folder, "canary")
        canary.mkdir()
        (canary / "file").write_text(SECRET)
        before = {place: snapshot(place) for place in (canary,)} | {
            place: sorted(os.listdir(place)) for place in (Path.home(),) if os.access(place, os.R_OK)
        }
        values = {"CANARY": str(canary), "PORT": str(server.getsockname()[1])}
        values |= {"MAKER": str(os.getpid()), "HOME": str(Path.home())}
        os.environ["CANARY_SECRET"] = SECRET

        def attempt(task: tuple[str, str, str]) -> None:
            kind, name, body = task
            limits = replace(patient, wall=3.0) if name in SLEEPERS else patient
            program = FRAME.replace("BODY", body)
            for word, value in values.items():
                program = program.replace(word, value)
            verdict = sandbox.judge(program, "", TEST, "total", HONEST, limits)
            verdicts[f"{kind}: {name}"].append(verdict.kind)
            reasons[f"{kind}: {name}"] = verdict.reason
            if kind != "time":
                said = sandbox.run(program + "\ntotal([1, 2, 3])\n", "", limits)
                if "ESCAPED" in said.stdout or SECRET in said.stdout + said.stderr:
                    escaped.append(f"{kind}: {name}: {said.stdout[:300]}")
                if max(len(said.stdout), len(said.stderr)) > limits.output:
                    escaped.append(f"{kind}: {name}: {len(said.stdout)} characters of output")

        tasks = [(kind, name, body) for kind, group in HOSTILE.items() for name, body in group.items()]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(attempt, tasks * options.times))
        seconds = time.monotonic() - start
        honest = sandbox.judge(FRAME.replace("BODY", HONEST), "", TEST, "total", HONEST, patient).kind
        time.sleep(1)
        left = still_running(size)
        after = {place: snapshot(place) for place in (canary,)} | {
            place: sorted(os.listdir(place)) for place in (Path.home(),) if os.access(place, os.R_OK)
        }
        changed = [str(place) for place in before if before[place] != after[place]] + hits
    report = {
        "uid": os.getuid(),
        "sandbox": isolated,
        "verdicts": verdicts,
        "reasons": reasons,
        "escaped": escaped,
        "left": left,
        "changed": changed,
        "honest": honest,
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) / 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
