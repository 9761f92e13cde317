"""The sandbox: what crosses its pipes, what a verdict is, and sixty programs that it has to hold."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hostile import still_running
from hypothesis import given, settings

import sandbox
from config.files import REPOSITORY
from sandbox import SandboxLimits, calls, child, filter, judge, process, run
from sandbox.child import CandidateError, NotData, decode, encode

HOSTILE = Path(__file__).with_name("hostile.py")
NOBODY = 65534
ADD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'\n"


# --- plain data

KEYS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**300), 2**300)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.binary(max_size=5)
    | st.tuples(st.integers(), st.text(max_size=3))
    | st.frozensets(st.integers(), max_size=3)
)
DATA = st.recursive(
    KEYS
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=5).map(bytearray)
    | st.sets(KEYS, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def spelled(value: object) -> str:
    """Type and value all the way down: 1, 1.0 and True differ, 0.0 and -0.0 do, and a NaN is itself."""
    if isinstance(value, dict):
        inner = [spelled(item) for pair in value.items() for item in pair]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [spelled(item) for item in value]
    else:
        inner = [repr(value)]
    return f"{type(value)}{sorted(inner) if isinstance(value, set | frozenset) else inner}"


@given(DATA)
@settings(max_examples=100, deadline=None)
def test_data_comes_back_as_it_was(value: object) -> None:
    for guarded in (False, True):
        assert spelled(decode(encode(value), guarded)) == spelled(value)


COLLIDING = {  # In CPython the hash of an int is its rest by this prime number.
    "ints": "{n * (2**61 - 1) for n in range(40_000)}",
    "keys": "dict.fromkeys(n * (2**61 - 1) for n in range(40_000))",
    "tuples": "{(0, n * (2**61 - 1)) for n in range(20_000)}",
    "sets in sets": "{frozenset((n % 40 * (2**61 - 1), n // 40 * (2**61 - 1))) for n in range(1_600)}",
    "a few of many parts": "{tuple(m * (2**61 - 1) for m in range(n, n + 60)) for n in range(8)}",
}


@pytest.mark.parametrize("name", ["ints", "keys", "tuples", "sets in sets", "a few of many parts"])
def test_members_that_were_chosen_to_collide_are_refused_at_once(name: str) -> None:
    if name == "ints":  # made without the set, which would take a minute
        data = b"S40000;" + b"".join(encode(n * (2**61 - 1)) for n in range(40_000))
    else:
        data = encode(eval(COLLIDING[name].replace("0_000", "000")))
    began = time.process_time()
    with pytest.raises(ValueError, match="keys of one container have the same hash"):
        decode(data, guarded=True)
    assert time.process_time() - began < 3


def test_collisions_that_come_by_themselves_are_none(isolated: sandbox.Isolation) -> None:
    grid = {(x, y, z) for x in range(-9, 9) for y in range(-9, 9) for z in range(-3, 3)}  # -1 and -2 collide
    assert decode(encode(grid), guarded=True) == grid
    boards = {tuple((n, m) for m in range(81)): n for n in range(300)}
    assert decode(encode([boards, {1, 2.5, "a"}]), guarded=True) == [boards, {1, 2.5, "a"}]


def test_an_answer_does_not_hold_the_process_that_asked_for_it(isolated: sandbox.Isolation) -> None:
    """The answer is written as bytes, so that the program itself is quick."""
    forge = (
        "import os, sys\nm = sys.modules['__main__']\ndef f():\n"
        "    items = b''.join(m.encode(n * (2**61 - 1)) for n in range(40_000))\n"
        "    m.write(int(sys.argv[-1]), b't3;s8;returnedS40000;' + items + b'N')\n"
    )
    began = time.process_time()
    with pytest.raises(CandidateError, match="have the same hash"), calls(forge) as call:
        call("f")
    assert time.process_time() - began < 3


@given(DATA, st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_data_is_refused_or_data(value: object, draw: st.DataObject) -> None:
    data = bytearray(encode([value]))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        found = decode(bytes(data))
    except ValueError:
        return
    encode(found)


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"N" * 2, b"l5;N", b"i3;12", b"ix;", b"i-1;1", b"l1;" * 10_000 + b"N", b"S1;l0;", b"d1;N",
     b"r3;f3;0x1NN", b"s1;\xff", b"i9999999999999999999;1", b"f3;xyz", b"l99999999;", b"c1;N"],
)  # fmt: skip
def test_forged_data_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_an_instance_of_a_subclass_is_sent_as_its_builtin_base() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

        def __index__(self) -> int:
            return 7

    class Lying(list):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([6])

    Pair = namedtuple("Pair", "a b")
    Level = IntEnum("Level", "LOW HIGH")
    for value, plain in (
        (Liar(4), 4),
        (Lying([1]), [1]),
        (Pair(1, 2), (1, 2)),
        (Level.HIGH, 2),  # type: ignore[attr-defined]
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (type("Text", (str,), {"__str__": lambda self: "x"})("y"), "y"),
        (type("Real", (float,), {"__float__": lambda self: 0.0})(1.5), 1.5),
        (type("Raw", (bytes,), {"__bytes__": lambda self: b""})(b"z"), b"z"),
    ):
        assert spelled(decode(encode(value))) == spelled(plain)


def test_iterators_are_sent_as_their_items_and_stay_iterators() -> None:
    found = decode(encode(x * x for x in range(4)))
    assert found != [0, 1, 4, 9] and list(found) == [0, 1, 4, 9]
    assert list(decode(encode(zip("ab", [1, 2], strict=True)))) == [("a", 1), ("b", 2)]
    assert decode(encode(range(1, 9, 3))) == range(1, 9, 3)


@pytest.mark.parametrize(
    "value", [object(), len, deque(), {}.keys(), (1).__add__, type, iter(int, 1), [object()]]
)
def test_what_is_no_data_is_refused(value: object) -> None:
    with pytest.raises(NotData):
        encode(value)


def test_a_loop_of_containers_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(NotData, match="200 deep"):
        encode(value)


# --- one program


def test_a_program_runs_with_its_input_and_nothing_else(isolated: sandbox.Isolation) -> None:
    program = (
        "import os, sys\nprint(input(), sorted(os.environ), os.listdir('/tmp'), os.getuid() != 0, sys.argv)\n"
        "print(len(sys.stdin.read()), 'é', file=sys.stderr)\nsys.exit(3)\n"
    )
    os.environ["PLUMB_SECRET"] = "x"
    try:
        found = run(program, "first line\n" + "x" * 300_000)
    finally:
        del os.environ["PLUMB_SECRET"]
    names = sorted(sandbox.ENVIRONMENT)
    shown = eval(found.stdout.split("first line ")[1].split("] ")[0] + "]")
    assert [name for name in shown if name not in ("PWD", "LC_CTYPE")] == names
    assert found.stdout.endswith("[] True ['program']\n")
    assert (found.status, found.exit_code, found.stderr) == ("ended", 3, "300000 é\n")
    assert found.sandbox.startswith("bubblewrap")


def test_a_program_is_the_same_each_time(isolated: sandbox.Isolation) -> None:
    """The order of a set of texts is a part of what a program does."""
    texts = {run("print({'a', 'b', 'c', 'd', 'e', 'f'})").stdout for _ in range(3)}
    assert len(texts) == 1 and "'a'" in texts.pop()


def test_temporary_files_and_threads_are_there(isolated: sandbox.Isolation) -> None:
    program = (
        "import tempfile, threading, asyncio\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "with tempfile.TemporaryFile() as f: print(f.write(b'x' * 1000))\n"
        "with ThreadPoolExecutor(4) as pool: print(sum(pool.map(len, ['a'] * 9)))\n"
        "async def one(): await asyncio.sleep(0); return 1\nprint(asyncio.run(one()))\n"
    )
    found = run(program)
    assert found.stdout == "1000\n9\n1\n", found.stderr


def test_limits_end_a_program(isolated: sandbox.Isolation) -> None:
    assert run("while True: pass", limits=SandboxLimits(cpu=1)).status == "timed out"
    asleep = run("print('before', flush=True)\nimport time\ntime.sleep(99)", limits=SandboxLimits(wall=5.0))
    assert (asleep.status, asleep.exit_code, asleep.stdout) == ("timed out", None, "before\n")
    assert 2 <= asleep.seconds < 20
    flood = run("while True: print('x' * 1000)", limits=SandboxLimits(output=5000))
    assert (flood.status, len(flood.stdout)) == ("output", 5000)
    files = "import os\nfor n in range(10**6): os.mknod(f'/tmp/{n}')\n"
    assert run(files, limits=SandboxLimits(files=500)).status == "files"
    assert judge(files, "", "f()", limits=SandboxLimits(files=500))[:2] == (
        "failed",
        "the program made more than 500 files",
    )
    assert run(files.replace("10**6", "400"), limits=SandboxLimits(files=500)).exit_code == 0
    full = run("x = bytearray(300 << 20)", limits=SandboxLimits(memory=200 << 20))
    assert full.exit_code == 1 and "MemoryError" in full.stderr


# --- verdicts


def kind(program: str, test: str = TEST, entry: str | None = None, **more: str) -> tuple[str, str]:
    found = judge(program, more.get("setup", ""), test, entry, more.get("reference", ADD))
    return found.kind, found.reason


def test_right_and_wrong_programs(isolated: sandbox.Isolation) -> None:
    assert kind(ADD) == ("passed", "")
    assert kind(ADD.replace("+", "-"))[0] == "failed"
    assert kind("def add(a, b):\n    pass") == ("failed", "AssertionError")
    assert kind("def add(a, b: int") == (
        "failed",
        "SyntaxError: '(' was never closed (<candidate>, line 1)",
    )
    assert kind("def other(a, b): return a + b") == ("failed", "NameError: name 'add' is not defined")
    assert kind("add = 3") == ("failed", "TypeError: 'int' object is not callable")
    assert kind("import missing_package\n" + ADD)[1].startswith("ModuleNotFoundError")


def test_equality_is_that_of_plain_python(isolated: sandbox.Isolation) -> None:
    """Types, signs and NaN are what the program returned: 1 == 1.0 == True, and a list is no tuple."""
    program = (
        "import math\nNAN = math.nan\ndef add(a, b): return {'t': (1, 2), 'n': NAN, 'o': True, 's': {1}}[a]\n"
    )
    test = (
        "assert add('t', 0) == (1, 2) and add('t', 0) != [1, 2] and type(add('t', 0)) is tuple\n"
        "assert add('n', 0) != add('n', 0) and add('o', 0) == 1 == 1.0 and add('o', 0) is True\n"
        "assert add('s', 0) == {1} and isinstance(add('s', 0), set)\n"
    )
    assert kind(program, test) == ("passed", "")


def test_exceptions_cross_by_type(isolated: sandbox.Isolation) -> None:
    program = (
        "class Mine(ValueError): pass\ndef add(a, b):\n"
        "    raise {1: ValueError('one'), 2: KeyError('two'), 3: Mine('three'), 4: SystemExit(0)}[a]\n"
    )
    caught = (
        "try:\n    add({}, 0)\nexcept {} as error:\n    assert {!r} in str(error)\nelse:\n    assert False\n"
    )
    assert kind(program, caught.format(1, "ValueError", "one"))[0] == "passed"
    assert kind(program, caught.format(2, "LookupError", "two"))[0] == "passed"
    assert kind(program, caught.format(3, "Exception", "three"))[0] == "passed"
    assert kind(program, caught.format(4, "BaseException", "0")) == ("failed", "SystemExit: 0")
    stop = "def add(a, b): raise StopIteration"
    assert kind(stop, "assert all(map(add, [1], [2]))") == ("failed", "CandidateError: StopIteration: ")


def test_arguments_cross_by_value_and_come_back_from_functions_that_return_none(
    isolated: sandbox.Isolation,
) -> None:
    in_place = "def add(a, b):\n    a.append(b)\n    a.sort()\n    b_rows[0] = 1\nb_rows = [0]\n"
    test = "data = [3, 1]\nassert add(data, 2) is None\nassert data == [1, 2, 3]\n"
    assert kind(in_place, test) == ("passed", "")
    nested = "def add(a, *, b):\n    a['x'].append(1)\n    b.add(2)\n"
    test = "a, b = {'x': []}, set()\nadd(a, b=b)\nassert a == {'x': [1]} and b == {2}\n"
    assert kind(nested, test) == ("passed", "")
    # A function that returns something leaves its arguments as they were, whatever it did to its copies.
    cheat = "def add(a, b):\n    a.clear()\n    return []\n"
    test = "data = [3, 1]\nassert add(data, 0) == sorted(data)\n"
    assert kind(cheat, test) == ("failed", "AssertionError")


def test_helpers_are_the_problems_own(isolated: sandbox.Isolation) -> None:
    """The candidate defines the helper again, so that any answer would do; the judge has its own."""
    setup = "def double(x):\n    return 2 * x\ndef solve(x):\n    '''Half of x.'''\n"
    test = "def check(f):\n    assert double(f(10)) == 10\n    assert solve(4) == 2\ncheck(solve)\n"
    cheat = "def double(x): return 10\ndef solve(x): return 0\n"
    assert kind(cheat, test, "solve", setup=setup)[0] == "failed"
    assert kind(setup + "    return x // 2\n", test, "solve", setup=setup)[0] == "passed"


def test_a_builtins_name_is_the_candidates_only_if_the_reference_says_so(isolated: sandbox.Isolation) -> None:
    test = "assert set(add(1, 2)) == set([3])"
    assert kind("def set(x): return 0\ndef add(a, b): return [a]", test)[0] == "failed"
    assert kind("def add(a, b): return [a + b]", test)[0] == "passed"
    theirs = "def sum(a, b):\r\n  return a * b"
    assert kind(theirs, "assert sum(3, 4) == 12", reference=theirs) == ("passed", "")


def test_what_cannot_be_judged_is_named(isolated: sandbox.Isolation) -> None:
    pair = "class Pair:\n    def __init__(self, a): self.a = a\ndef add(a, b): return a.a + b\n"
    assert kind(pair, "assert add(Pair(1), 2) == 3") == (
        "no data",
        "the program returned a Pair, which is no plain data",
    )
    assert kind(ADD, "assert add(object(), 2) == 3")[0] == "not judged"
    assert kind(ADD, "assert add.__name__ == 'add'")[0] == "not judged"
    assert kind(ADD, "assert add != 3")[0] == "not judged"
    assert kind(ADD, "assert True") == ("not judged", "the test never calls the program")
    assert kind(ADD, "assert (") == (
        "not judged",
        "the test itself cannot be run: SyntaxError: '(' was never closed (<test>, line 1)",
    )
    assert kind(ADD, setup="1 / 0")[0] == "not judged"
    assert kind(ADD, TEST + "assert list(map(add, [1], [2])) == [3]") == ("passed", "")


def test_a_fault_cannot_be_caught_by_the_test(isolated: sandbox.Isolation) -> None:
    """A test that tolerates every exception does not make a program pass that has ended."""
    test = "for _ in range(3):\n    try:\n        add(1, 2)\n    except BaseException:\n        pass\n"
    assert kind("import os\ndef add(a, b): os._exit(0)", test)[0] == "failed"
    assert kind("def add(a, b): return object()", test)[0] == "no data"


def test_the_judge_is_bounded_too(isolated: sandbox.Isolation) -> None:
    found = judge(ADD, "", "while True: add(1, 2)", limits=SandboxLimits(cpu=1, wall=10))
    assert found.kind == "timed out"
    colliding = "def add(a, b): return {n * (2**61 - 1) for n in range(60000)}"
    assert judge(colliding, "", "assert add(1, 2) == 3", limits=SandboxLimits(cpu=1)).kind != "passed"


def test_verdicts_in_parallel_are_those_in_series(isolated: sandbox.Isolation) -> None:
    programs = [f"def add(a, b):\n    return a + b if {n} % 3 else b\n" for n in range(9)]
    series = [kind(program) for program in programs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(kind, programs)) == series
    assert [name for name, _ in series] == ["failed", "passed", "passed"] * 3


# --- calls from this process


def test_calls_by_data(isolated: sandbox.Isolation) -> None:
    program = (
        "seen = []\ndef note(x):\n    seen.append(x)\n    return seen\ndef fail(): raise KeyError('k')\n"
    )
    with calls(program + "class Odd: pass\ndef odd(): return Odd()\n") as call:
        assert call("note", math.inf) == [math.inf]
        assert call("note", x="b") == [math.inf, "b"]
        with pytest.raises(KeyError, match="k"):
            call("fail")
        with pytest.raises(CandidateError, match="Odd, which is no plain data"):
            call("odd")
        with pytest.raises(CandidateError):
            call("note", 1)
    with pytest.raises(SyntaxError), calls("def"):
        pass
    with (
        pytest.raises(CandidateError, match="ended"),
        calls("import time\ndef f(): time.sleep(99)", SandboxLimits(wall=2.0)) as call,
    ):
        call("f")
    with (
        pytest.raises(CandidateError, match="a message of"),
        calls("def f(): return bytes(5 << 20)") as call,
    ):
        call("f")


# --- what holds


def hostile(uid: int | None, times: int) -> dict:
    """The report of hostile.py, run by this user or another, from copies that anyone may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tests").mkdir()
        for path in (*REPOSITORY.glob("sandbox/*.py"), HOSTILE):
            Path(folder, path.parent.name).mkdir(exist_ok=True)
            shutil.copy(path, Path(folder, path.relative_to(REPOSITORY)))
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755)
        who: dict = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
        who |= {"cwd": folder, "env": {**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}}
        for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
            new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
            try:
                if subprocess.run([python, "-c", new_enough], check=False, **who).returncode == 0:
                    break
            except OSError:  # nobody may start an interpreter in another user's home
                continue
        else:
            pytest.skip(f"user {uid} has no Python 3.11")
        done = subprocess.run(
            [python, "tests/hostile.py", "--times", str(times)],
            capture_output=True,
            text=True,
            check=False,
            **who,
        )
    if "generated code runs in a sandbox only" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def held(report: dict, times: int) -> None:
    counts = Counter(name.split(":")[0] for name in report["verdicts"])
    assert counts == {
        "cheat": 14, "time": 9, "memory and disk": 12, "process": 9, "file system": 8,
        "network and kernel": 7, "output": 5,
    }  # fmt: skip
    for name, verdicts in report["verdicts"].items():
        assert len(verdicts) == times and not {"passed", "not judged"} & set(verdicts), (name, verdicts)
    for name in ("a signal for the time that is blocked", "a handler for the time"):
        assert {*report["verdicts"][f"time: {name}"]} == {"timed out"}
    assert report["escaped"] == [] and report["changed"] == [] and report["left"] == []
    assert report["honest"] == "passed"
    assert report["grown_mib"] < 64 and report["open_files"] < 20


USERS = [None, NOBODY] if os.getuid() == 0 else [None]


def test_hostile_programs_are_held(isolated: sandbox.Isolation) -> None:
    held(hostile(None, 1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("uid", USERS)
def test_hostile_programs_are_held_20_times(isolated: sandbox.Isolation, uid: int | None) -> None:
    held(hostile(uid, 20), 20)


def test_a_killed_parent_takes_its_sandboxes_along(isolated: sandbox.Isolation) -> None:
    size = (9 << 20) + 4096 * (os.getpid() % 1000)
    limits = f"sandbox.SandboxLimits(disk={size})"
    program = f"import sandbox; sandbox.judge('while True: pass', '', 'f()', limits={limits})"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    try:
        end = time.monotonic() + 60
        while len(still_running(size)) < 4:  # two each, outside and inside
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    end = time.monotonic() + 30
    while still_running(size):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sandbox_that_is_ended_while_it_starts_leaves_nothing(isolated: sandbox.Isolation) -> None:
    """The judge gives up at once, when the candidate's sandbox is perhaps half made."""
    size = (10 << 20) + 4096 * (os.getpid() % 1000)

    def early(n: int) -> None:
        job = process._job(isolated, SandboxLimits(), program="import time\ntime.sleep(99)")
        with process._started(isolated, "candidate", SandboxLimits(disk=size)) as started:
            assert started.process.stdin is not None
            os.write(started.process.stdin.fileno(), job)
            time.sleep(0.002 * n)

    for n in range(20):
        early(n)
    time.sleep(1)
    assert still_running(size) == []


def test_runs_leave_no_open_files(isolated: sandbox.Isolation) -> None:
    kind(ADD)
    before = sorted(os.listdir("/proc/self/fd"))
    for program in (ADD, "while", "import os; os._exit(1)", "def add(a, b): return object()") * 2:
        kind(program)
    run("print('x' * 100_000)", limits=SandboxLimits(output=10))
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- where nothing isolates


def test_without_bubblewrap_it_refuses_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (lambda: run("print(1)"), lambda: judge(ADD, "", TEST), sandbox.isolation):
        with pytest.raises(
            ValueError, match=r"^generated code runs in a sandbox only, and bubblewrap is not inst"
        ):
            ask()


def test_a_bubblewrap_that_cannot_isolate_is_refused_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(
        '#!/bin/sh\ntest "$1" = --version && echo bubblewrap 0.1 && exit\necho no namespaces >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match=r"bubblewrap 0\.1 cannot make one here: no namespaces"):
        sandbox.isolation()


def test_a_flag_runs_all_the_same_and_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = run("import os\nprint(os.getcwd())", allow_unsafe=True)
    assert (found.status, found.sandbox) == ("ended", sandbox.UNSAFE), found.stderr
    verdict = judge(ADD, "", TEST, allow_unsafe=True)
    assert (verdict.kind, verdict.sandbox) == ("passed", sandbox.UNSAFE)
    assert judge(
        "import time\ntime.sleep(99)", "", TEST, limits=SandboxLimits(wall=2.0), allow_unsafe=True
    ).kind == ("timed out")
    assert (
        judge("while 1: pass", "", TEST, limits=SandboxLimits(cpu=1), allow_unsafe=True).kind == "timed out"
    )


# --- the filter


def answer(program: bytes, number: int, machine: str, flags: int = 0, arch: int | None = None) -> int:
    """Return what the kernel does with a call: classic BPF by linux/filter.h, over struct seccomp_data."""
    import struct

    data = struct.pack("=iIQ6Q", number, filter.AUDIT[machine] if arch is None else arch, 0, flags, *[0] * 5)
    value, at = 0, 0
    while True:
        operation, true, false, operand = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if operation == filter.LOAD:
            value = struct.unpack_from("=I", data, operand)[0]
        elif operation == filter.RETURN:
            return operand
        else:
            tests = {
                filter.EQUAL: value == operand,
                filter.AT_LEAST: value >= operand,
                filter.ANY_BIT: bool(value & operand),
            }
            at += true if tests[operation] else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_denies_what_it_lists_and_nothing_else(machine: str) -> None:
    program = filter.program(machine)
    column = list(filter.AUDIT).index(machine)
    denied = {row[column] for row in filter.DENIED.values()} - {None}
    clone = filter.CLONE[machine]
    for number in range(500):
        if number not in (clone, filter.CLONE3):
            wanted = 0x00050001 if number in denied else 0x7FFF0000
            assert answer(program, number, machine) == wanted, number
    assert answer(program, clone, machine, flags=0x11) == 0x00050001
    assert answer(program, clone, machine, flags=0x10000000 | 0x11) == 0x00050001
    assert answer(program, clone, machine, flags=0x3D0F00) == 0x7FFF0000  # A thread is made so.
    assert answer(program, filter.CLONE3, machine) == 0x00050026
    assert answer(program, 0x40000000 | clone, machine) == 0x00050001
    assert answer(program, 0, machine, arch=0x40000003) == 0x80000000  # i386's calls have other numbers


@pytest.mark.parametrize(
    "machine, header",
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_filters_numbers_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"the kernel's headers are not installed: {header}")
    numbers = {
        n: int(v) for n, v in re.findall(r"#define __NR3?2?6?4?_(\w+)\s+(\d+)", Path(header).read_text())
    }
    column = list(filter.AUDIT).index(machine)
    known = {name: row[column] for name, row in filter.DENIED.items() if row[column] is not None}
    known |= {"clone": filter.CLONE[machine], "clone3": filter.CLONE3}
    assert {name: numbers[name] for name in known if name in numbers} == {
        name: number for name, number in known.items() if name in numbers
    }
    assert len(known.keys() & numbers.keys()) > 30


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="no system call filter for riscv64"):
        filter.program("riscv64")
    assert platform.machine() in filter.AUDIT or sys.platform != "linux"


def test_the_part_inside_imports_little() -> None:
    """Each import is a part of every run's start."""
    code = "import sys, child; print(*sorted(sys.modules))"
    words = [sys.executable, "-s", "-S", "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY / "sandbox", capture_output=True, text=True, check=True)
    assert not {"typing", "re", "collections", "json", "ast"} & set(done.stdout.split())
    assert child.DEPTH == 200
