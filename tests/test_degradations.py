"""recipes/degradations.py: five ways that differ, keep scopes and keep what a function computes."""

from __future__ import annotations

import ast
import asyncio
import gc
import sys
import sysconfig
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recipes.degradations import STRATEGIES, check, check_distinct, degrade
from recipes.functions import Function, globals_of, parsed, syntax_tree

# Functions, each below the arguments that it is called with.
CASES = r"""
# ([1, 2],); ([],)
def f(xs):
    ys = [x * 2 for x in xs]
    return ys

# ([1, 2],)
def f(x):
    ys = [x for x in x]
    return ys, x

# ([1, 2],)
def f(xs):
    total = 0
    for x in xs:
        total += x
    return total

# (3,)
def f(n: int, k: 'str' = 'a') -> dict:
    '''Doc.'''
    d: dict = {k: n}
    return {**d}

# ([0, 1, 2], [1, 2, 3])
def f(a, b):
    return {x: y for x in a if x for y in b if y > x}

# ([1, 4, 5],)
def f(a):
    return {x % 3 for x in a}

# ([1],)
def f(a):
    x = 5
    return [x + y for y in a] + [x for x in a] + [x]

# ([1],)
def f(a):
    x = 5
    b = [x for x in a]
    return b, x

# (0,)
def f(a, *, x=1):
    y = x
    return dict(x=y, y=x)

# (None,); (1,); (2,); (0,); (9,)
def f(n):
    if n is None:
        return True
    elif n in (1,
              2):
        return n in [2]
    return not n

# (1,)
def f(n):
    def g(m):
        n = m + 1
        return n
    k = g(n)
    return k, n

# (1,)
def f(n):
    count = 0
    def g():
        nonlocal count
        count += 1
    g()
    return count

# (0,); (2,)
def f(n):
    try:
        v = 1 / n
    except ZeroDivisionError as e:
        v = str(e)
    return v

# (7,)
def f(n):
    v = n + 1
    w = v
    return f'{v!r:>{w}} {n}'

# (7,)
def f(n):
    v = n
    return f'''
  {v} and
      {v} {n}'''

# (7.5,)
def f(n):
    import math as m
    v = m.floor(n)
    return v

# ([1, 2],); ({'k': 1, 'l': 2},)
def f(n):
    match n:
        case [a, *rest]:
            out = a, rest
        case {'k': v, **more}:
            out = v, more
        case _:
            out = None
    return out

# ([3],)
def f(a):
    b = [y := 1, y]
    c = [(z := v) for v in a]
    return b, c, z

# ([1, 2],)
def f(a):
    g = [lambda: x for x in a]
    return [h() for h in g]

# (3,)
def f(a):
    s = (
        '#no comment'  # comment
        'b' )
    return a . real, s , 1 .real, - 1, a   if a else not a

# ([1],)
def f(a): return [i for i in a]

# ([1, 2],)
def f(a):
    b = [
        i  # each
        + 1
        for i in a
        if i
        > 1
    ]
    return b

# ([1, 2],)
def f(order):
    seen = []
    d = {seen.append(('k', i)) or i: seen.append(('v', i)) for i in order}
    return d, seen

# (1,)
def f(x):
    y = x\
        + 1; z = y
    return z

# ([1, 2],)
def f(xs):
    [a, b] = [v for v in xs]
    c = d = [v + 1 for v in xs]
    return a, b, c, c is d

# ([1, 2],)
def f(é):
    ü = [ñ for ñ in é]  # ö
    return ü

# (1,)
def f(var0):
    a = var0
    var1 = a
    return a, var1

# (1,)
def f(n):
    class A:
        xs = [n for n in range(3)]
    return A.xs

# (1,)
def f(n):
    class A:
        xs = [i for i in range(n)]
    return sorted(name for name in vars_of(A))

# ([1, 2],)
def f(xs):
    return [item for item in item(xs)]

# (1, [2])
def f(set, ys):
    zs = {y for y in ys}
    return zs, set

# (); (3,)
def f(a=LIMIT):
    LIMIT = a + 1
    return LIMIT

# (3,)
def f(a) -> RATE:
    RATE = a + 1
    return RATE

# (3,)
@same
def f(a):
    same = a + 1
    return same

# (0,)
def f(n):
    return LIMIT.bit_length() + n

# (1,)
def f(n: (int), m: (
    str) = 1) -> (
        int):
    return n

# (1,)
def f(n):
    'only a docstring'

# (1,)
def f(n):
    'one'
    'two'
    return n

# (0,); (2,)
def f(n):
    if n:
        return LIMIT * n
    LIMITED = RATE.real
    return LIMITED + LIMIT
"""


def cases() -> dict[str, list[tuple]]:
    blocks = [block.split("\n", 1) for block in CASES.strip("\n").split("\n\n")]
    return {f"{source}\n": [ast.literal_eval(c) for c in calls[2:].split("; ")] for calls, source in blocks}


FUNCTIONS = cases()
CONSTANTS = {"LIMIT": 50, "RATE": -0.5}


def value_of(source: str, arguments: tuple):
    scope = {
        **CONSTANTS,
        "item": list,
        "same": lambda function: function,
        "vars_of": lambda a: [n for n in a.__dict__ if n[0] != "_"],
    }
    exec(source, scope)
    return scope["f"](*arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_function_computes_is_kept(strategy: str) -> None:
    changed = 0
    for source, calls in FUNCTIONS.items():
        result = degrade(source, strategy, CONSTANTS)
        if result is None:
            continue
        changed += 1
        assert result != source
        for arguments in calls:
            assert value_of(result, arguments) == value_of(source, arguments), result
    assert changed >= 3


def test_each_way_changes_what_it_is_for_and_nothing_else() -> None:
    source = (
        "def area(w: float, h: float = 2) -> float:\n"
        '    """Of a rectangle."""\n'
        "    sides = [w, h]  # both\n"
        "    doubled = [s * FACTOR for s in sides]\n"
        "    return doubled[0] * h\n"
    )
    made = {name: degrade(source, name, {"FACTOR": 2}) for name in STRATEGIES}
    lines = source.splitlines(keepends=True)
    assert made["names"] == source.replace("sides", "var0").replace("doubled", "var1")
    assert made["hints"] == "".join(["def area(w, h = 2):\n", *lines[2:]])
    assert made["loops"] == "".join(
        [
            *lines[:3],
            "    result0 = []\n    for s in sides:\n",
            "        result0.append(s * FACTOR)\n    doubled = result0\n",
            lines[4],
        ]
    )
    assert made["formatting"] == (
        'def area(w:float,h:float=2)->float:\n """Of a rectangle."""\n sides=[w,h]# both\n'
        " doubled=[s*FACTOR for s in sides]\n return doubled[0]*h\n"
    )
    assert made["redundant"] == source.replace("FACTOR", "2").replace(
        "return doubled[0] * h", "answer0 = doubled[0] * h\n    return answer0"
    )
    assert made["mixed"] == (
        "def area(w,h=2):\n var0=[w,h]# both\n result0=[]\n for s in var0:\n  result0.append(s*2)\n"
        " var1=result0\n answer0=var1[0]*h\n return answer0\n"
    )
    check_distinct({name: [text] for name, text in made.items()})


@pytest.mark.parametrize("word", ["locals()", "eval('y')", "f.__doc__", "sys._getframe()"])
def test_a_function_that_reads_itself_is_left_alone(word: str) -> None:
    source = f"def f(x: int):\n    y = [z for z in x]\n    return y, {word}\n"
    assert [degrade(source, name) for name in STRATEGIES] == [None] * len(STRATEGIES)


def test_hints_that_a_decorator_may_read_stay() -> None:
    assert degrade("@app.get('/')\ndef f(x: int) -> int:\n    return x\n", "hints") is None


@pytest.mark.parametrize(
    ("strategy", "result", "fault"),
    [
        (
            "names",
            "def f(var0):\n    y = [x * 2 for var1 in var0]\n    return y\n",
            "out-of-scope: names takes x",
        ),
        ("names", "def f(xs=var0):\n    var0 = [x * 2 for x in xs]\n    return var0\n", "takes var0"),
        ("names", "def f(xs):\n    var0 = [x * 3 for x in xs]\n    return var0\n", "changes-meaning"),
        ("names", "def f(xs):\n    xs = [x * 2 for x in xs]\n    return xs\n", "changes-meaning"),
        (
            "loops",
            "def f(xs):\n    y = []\n    for z in xs:\n        y.append(x * 2)\n    return y\n",
            "takes x",
        ),
        ("formatting", "def f(xs):\n    y = [x * 2 for x in xs]\n", "changes-meaning"),
        ("hints", "def f(xs):\n    y: xs = [2 * x for x in xs]\n    return y\n", "changes-meaning"),
        (
            "redundant",
            "def f(xs):\n    return [x * 2 for x in\n",
            "broken: redundant gives what is not a Python",
        ),
    ],
)
def test_a_wrong_rewrite_is_named(strategy: str, result: str, fault: str) -> None:
    with pytest.raises(ValueError, match=f"degradation-.*{fault}"):
        check("def f(xs):\n    y = [x * 2 for x in xs]\n    return y\n", result, strategy)


def test_a_way_that_is_a_copy_of_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = list(FUNCTIONS)

    def made() -> dict[str, list[str | None]]:
        return {name: [degrade(source, name, CONSTANTS) for source in sources] for name in STRATEGIES}

    check_distinct(made())
    real = dict(STRATEGIES)
    one, other = real["redundant"], real["formatting"]
    copies = {
        "a copy": ("redundant", other, "formatting and redundant give the same for 39 of the 39 functions"),
        "falls back": (
            "redundant",
            lambda s, c: one(s, c) or other(s, c),
            "formatting and redundant .* 17 of",
        ),
        "rare": (
            "loops",
            lambda s, c: real["names"](s, c) if "total" in s else None,
            "names and loops .* 1 of",
        ),
    }
    for name, way, sentence in copies.values():
        with monkeypatch.context() as only:
            only.setitem(STRATEGIES, name, way)
            with pytest.raises(ValueError, match=f"degradation-is-a-copy: .*{sentence}.* 10% is the most"):
                check_distinct(made())
    monkeypatch.setitem(STRATEGIES, "redundant", lambda source, constants: None)
    with pytest.raises(
        ValueError,
        match=f"degradation-does-nothing: redundant changes none of {len(sources)} .* or leave redundant out",
    ):
        check_distinct(made())


@pytest.mark.parametrize(
    "source", ["x = 1\n", "def f(:\n", "def f(): pass\ndef g(): pass\n", "", "f(" * 3000]
)
def test_what_is_not_one_function_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"not (one|a) Python function"):
        degrade(source, "names")


def test_names_from_outside_are_told_in_every_scope() -> None:
    source = (
        "def f(a):\n    def g():\n        return a + b\n    return [c for d in g()] + [len(e) for e in a]\n"
    )
    assert globals_of(source) == {"b", "c", "len"}


def test_a_function_called_top_is_one_like_others() -> None:
    """CPython's symtable takes it for the module, whose table has that name."""
    source = "def {}(a):\n    global d\n    d = b = a\n    return b + c + d\n"
    assert globals_of(source.format("top")) == globals_of(source.format("f")) == {"c", "d"}
    made = {name: degrade(source.format(name), "redundant") for name in ("top", "f")}
    assert made["top"] == str(made["f"]).replace("def f(", "def top(")


def test_an_async_function_keeps_its_result() -> None:
    source = "async def f(a):\n    xs = [x async for x in a()]\n    ys = [x for x in xs]\n    return ys\n"
    result = degrade(source, "mixed")
    assert result is not None and "async for" in result

    async def numbers():
        for n in range(3):
            yield n

    for text in (source, result):
        scope: dict = {}
        exec(text, scope)
        assert asyncio.run(scope["f"](numbers)) == [0, 1, 2]


def functions_of(files: list[Path]) -> list[str]:
    found = []
    for file in files:
        text = file.read_text("utf-8", "replace")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, Function):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                source = textwrap.dedent("\n".join(text.split("\n")[first - 1 : node.end_lineno])) + "\n"
                try:
                    parsed(source)
                except ValueError:  # a string at the margin hinders dedent
                    continue
                found.append(source)
    return found


def every_way(sources: list[str]) -> dict[str, list[str | None]]:
    """`degrade` raises where a check fails, and so this is the test."""
    return {name: [degrade(source, name) for source in sources] for name in STRATEGIES}


def test_real_functions_pass_every_check_and_the_ways_differ() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    sources = functions_of(
        [library / name for name in ("textwrap.py", "shlex.py", "bisect.py", "json/encoder.py")]
    )
    made = every_way(sources)
    check_distinct(made)
    assert all(sum(text is not None for text in made[name]) > 5 for name in STRATEGIES if name != "loops")


@pytest.mark.slow
def test_every_function_of_the_library_passes_every_check() -> None:
    sources = functions_of(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    assert len(sources) > 5000
    check_distinct(every_way(sources))


def test_threads_parse_while_the_collector_runs() -> None:
    """CPython 3.11.7 gives up with a SystemError where a collection lets another thread parse."""

    def collected(phase: str, info: dict[str, int]) -> None:
        sum(range(50))  # Python code, in which threads change

    texts = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))]
    before = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    gc.callbacks.append(collected)
    try:
        with ThreadPoolExecutor(4) as pool:
            trees = list(pool.map(syntax_tree, texts * 8))
    finally:
        gc.callbacks.remove(collected)
        sys.setswitchinterval(before[0])
        gc.set_threshold(*before[1])
    assert [type(tree) for tree in trees] == [ast.Module] * len(texts) * 8
