"""recipes/behaviour.py: what two functions do is compared by running them, in the sandbox, on made inputs."""

from __future__ import annotations

import pytest

from recipes.behaviour import POOLS, agreement, agreements, context_of, inputs_for

isolated = pytest.mark.usefixtures("isolated")

TWICE = "def twice(xs: list[int]):\n    return [x * 2 for x in xs]\n"
LOOP = "def twice(xs):\n    r = []\n    for x in xs:\n        r.append(x * 2)\n    return r\n"

# A function, what should do the same, and the verdict.
CASES = [
    (TWICE, LOOP, "agrees"),
    (TWICE, LOOP.replace("* 2", "* 3"), "differs"),
    (TWICE, LOOP.replace("return r", "return tuple(r)"), "differs"),  # equal in no type
    (TWICE, LOOP.replace("    return r\n", ""), "differs"),
    (TWICE, LOOP.replace("twice", "thrice"), "differs"),
    (TWICE, "def twice(xs):\n    return [x * 2 for x in", "differs"),
    (TWICE, LOOP.replace("    r = []\n", "    r = []\n    print(len(xs))\n"), "differs"),  # it prints
    (TWICE, "def twice(xs):\n    import os\n    os._exit(0)\n", "differs"),
    (TWICE, "def twice(xs):\n    while True: pass\n", "differs"),
    # An argument that is changed in place differs too.
    ("def f(xs: list):\n    xs.sort(key=str)\n", "def f(xs: list):\n    xs.reverse()\n", "differs"),
    ("def f(n: int):\n    return 1 / n\n", "def f(n: int):\n    return 1 / n if n else 0\n", "differs"),
    ("def f(n: int):\n    return -0.0\n", "def f(n: int):\n    return 0.0\n", "differs"),
    ("def f(s: str):\n    yield from s\n", "def f(s: str):\n    for c in s: yield c\n", "agrees"),
    ("def f(s):\n    return set(s.split())\n", "def f(s):\n    return set(s.split()[::-1])\n", "agrees"),
    ("async def f(n: int):\n    return n\n", "async def f(n: int):\n    return n + 1\n", "differs"),
    ("def f(n: int):\n    return float('nan')\n", "def f(n: int):\n    return float('nan')\n", "agrees"),
    ("def f(self):\n    return 1\n", "def f(self):\n    return 2\n", "not run"),
    ("def f(n: int):\n    import time\n    return time.time_ns()\n", "def f(n): return 1\n", "not run"),
    ("def f(n: int):\n    return missing(n)\n", "def f(n: int):\n    return 1\n", "not run"),
    ("def f(n: int):\n    while True: pass\n", "def f(n: int):\n    return 1\n", "not run"),
]


@isolated
@pytest.mark.parametrize(("source", "other", "kind"), CASES)
def test_a_verdict(source: str, other: str, kind: str) -> None:
    found = agreement(source, other, "")
    assert found.kind == kind, found
    assert (found.reason == "") == (kind == "agrees")
    assert found.inputs >= 1 or kind == "not run" or "no function" in found.reason


@isolated
def test_one_that_ends_the_process_costs_no_other_its_verdict() -> None:
    ends = "def twice(xs):\n    import os\n    os._exit(0)\n"
    assert [j.kind for j in agreements(TWICE, [LOOP, ends, LOOP], "")] == ["agrees", "differs", "agrees"]


@isolated
def test_the_answer_cannot_be_read_off_what_is_expected() -> None:
    """A rewrite could call the first function in its own process; in another one it finds it nowhere."""
    cheat = (
        "def twice(xs):\n    import sys\n"
        "    for name, module in list(sys.modules.items()):\n"
        "        if name.startswith('module') and module is not sys.modules.get(__name__):\n"
        "            return module.twice(xs)\n"
    )
    assert agreements(TWICE, [cheat], "")[0].kind == "agrees"
    assert agreement(TWICE, cheat, "").kind == "differs"


@isolated
def test_a_context_that_python_cannot_write_is_left_out_and_the_function_not_run() -> None:
    """Python reads such a number, and such a sum, and writes neither."""
    for value in (f"0x{'F' * 5000}", "+".join(["1"] * 1500)):
        module = f"BIG = {value}\n\ndef f(n: int):\n    return n + BIG\n"
        source = "def f(n: int):\n    return n + BIG\n"
        assert context_of(module, source) == ""
        assert agreement(source, source, context_of(module, source)).kind == "not run"


@isolated
def test_context_is_what_the_function_needs_and_is_run_with_it() -> None:
    module = (
        "from __future__ import annotations\nimport re\nimport json\nLIMIT = 2\nOTHER = 3\n\n"
        "def helper(s):\n    return re.sub('a', 'b', s)[:LIMIT]\n\n"
        "def unused():\n    return OTHER\n\n"
        "def f(s: str, n=LIMIT):\n    return helper(s) * n\n\ndel re\n"
    )
    source = "def f(s: str, n=LIMIT):\n    return helper(s) * n\n"
    context = context_of(module, source)
    assert context == (
        "from __future__ import annotations\nimport re\nLIMIT = 2\n"
        "def helper(s):\n    return re.sub('a', 'b', s)[:LIMIT]\n"
    )
    assert agreement(source, source.replace("helper(s) * n", "(helper(s) * n)"), context).kind == "agrees"
    assert agreement(source, source.replace("* n", "* 2"), context).kind == "differs"
    with pytest.raises(ValueError, match="does not parse"):
        context_of("def f(:\n", source)


def test_inputs_follow_hints_defaults_literals_and_use_and_are_the_same_each_time() -> None:
    source = (
        "def f(a: str, b: 'int | None', c, d=0.5, *, e: dict[str, int], g=None):\n"
        "    if a == 'magic' or b == 421: return c.keys()\n"
    )
    made = inputs_for(source, 200)
    assert made == inputs_for(source, 200) and len(made) > 100
    assert {type(args[0]) for args, _ in made} == {str}
    assert {type(args[1]) for args, _ in made} == {int, type(None)}
    assert {type(args[2]) for args, _ in made} == {dict}
    assert {type(args[3]) for args, _ in made if len(args) == 4} == {float}
    assert {len(args) for args, _ in made} == {3, 4}
    assert {type(named["e"]) for _, named in made} == {dict}
    assert any(args[0] == "magic" for args, _ in made) and any(args[1] == 421 for args, _ in made)
    first = made[0][0][2]
    first["planted"] = 1
    assert all("planted" not in value for value in POOLS[dict])
    assert inputs_for("def f(self, x): return x\n") == []
    assert inputs_for("def f(): return 1\n") == [((), {})]
