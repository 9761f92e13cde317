"""Compare the behaviour of two functions: both run in the sandbox on inputs made for the first.

    context = context_of(module_text, source)          # the statements of its module that the function needs
    agreement(source, rewritten, context)              # Judgement("agrees", "", 11)

Inputs are made from hints, defaults, the function's own literal values, and its use of its parameters. An
input that the first function cannot take ends in an error of both functions, and the errors are compared too;
a function counts as run if it returned from at least one input. The comparison is of data: the value, the
arguments afterwards, the printed text, or the type of the error. Some functions are not judged: those that
behave differently the second time, need more than their module's statements and the standard library, hang,
or have an object as their first parameter (methods).

No function runs in this process: see sandbox/process.py.
"""

from __future__ import annotations

import ast
import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import sandbox
from recipes.functions import parsed, syntax_tree, unwritable
from sandbox.child import encode

LIMITS = replace(sandbox.LIMITS, cpu=10, wall=60.0)
INPUTS = 16  # inputs made for each function
CONTEXT_BYTES = 100_000
LITERALS = 12  # most literal values of a function that become inputs
Input = tuple[tuple[Any, ...], dict[str, Any]]


class Judgement(NamedTuple):
    """The judgement on a function and another that should do the same.

    Args:
        kind: "agrees", or why not; "not run" means that nothing was learned.
        reason: Why it is not "agrees"; one line.
        inputs: Number of inputs from which the first function returned.
    """

    kind: Literal["agrees", "differs", "not run"]
    reason: str
    inputs: int


# --- what a function needs -----------------------------------------------------------------------


def context_of(module: str, source: str) -> str:
    """Return the top-level statements of a module that a function needs, and all that these need, in order.

    Statements that are `unwritable` are left out, so that a function that needs one is not run.

    Raises:
        ValueError: the module does not parse.
    """
    try:
        statements = syntax_tree(module).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the module does not parse: {error}") from None
    own = parsed(source).name
    bound: dict[str, list[int]] = {}
    for number, statement in enumerate(statements):
        if getattr(statement, "name", None) != own:
            for name in _bound(statement):
                bound.setdefault(name, []).append(number)
    future = [
        n for n, s in enumerate(statements) if isinstance(s, ast.ImportFrom) and s.module == "__future__"
    ]
    # Defaults, decorators and hints use the module's names, though these are not free in the function.
    chosen, wanted = set(future), [n.id for n in ast.walk(parsed(source)) if isinstance(n, ast.Name)]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        for number in set(bound.get(name, ())) - chosen:
            chosen.add(number)
            wanted += [n.id for n in ast.walk(statements[number]) if isinstance(n, ast.Name)]
    shown = (statements[number] for number in sorted(chosen))
    return "".join(f"{ast.unparse(one)}\n" for one in shown if not unwritable(one))


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of the top level binds, inside an `if`, `try` or `with` too."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for node in ast.iter_child_nodes(statement):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _bound(node)  # pyright: ignore  # A handler has children as a statement has.
        else:
            yield from (
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            )


# --- inputs --------------------------------------------------------------------------------------

POOLS: dict[type, list[Any]] = {
    int: [0, 1, 2, 3, 7, -1, 10, 64],
    str: ["", "a", "abc", "Hello, World", "a b  c", "key=value", "12", "one\ntwo\n", "/usr/lib/a.txt"],
    list: [[], [1, 2, 3], [3, 1, 2, 2], ["b", "a"], [[1, 2], [3]], [("a", 1), ("b", 2)], [0.5, -1.5]],
    float: [0.0, 1.0, 0.5, -2.25, 1e6],
    dict: [{}, {"a": 1}, {"a": 1, "b": [2]}, {1: "x", 2: "y"}],
    bytes: [b"", b"abc", b"\x00\xff\n"],
    tuple: [(), (1, 2), ("a", "b"), (3, 1, 2)],
    set: [set(), {1, 2, 3}, {"a"}],
    bool: [True, False],
    type(None): [None],
}
HINTS: dict[str, tuple[type, ...]] = {
    **{kind.__name__: (kind,) for kind in POOLS},
    "None": (type(None),),
    **dict.fromkeys(("List", "Sequence", "Iterable", "Iterator", "Collection", "MutableSequence"), (list,)),
    **dict.fromkeys(("Dict", "Mapping", "MutableMapping", "OrderedDict"), (dict,)),
    **dict.fromkeys(("Set", "FrozenSet", "frozenset", "AbstractSet"), (set,)),
    **dict.fromkeys(("Text", "AnyStr", "PathLike", "Path", "LiteralString"), (str,)),
    **dict.fromkeys(("Tuple",), (tuple,)),
    **dict.fromkeys(("bytearray", "ByteString", "ReadableBuffer", "memoryview"), (bytes,)),
    **dict.fromkeys(("Number", "Real", "complex"), (float, int)),
}
OBJECTS = ("self", "cls", "mcs", "metacls")


def inputs_for(source: str, n: int = INPUTS, seed: int = 0) -> list[Input]:
    """Return arguments to call a function with, the same for the same text; none if it takes an object."""
    function = parsed(source)
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in OBJECTS:
        return []
    draw = random.Random(f"{seed} {source}")
    literals = _literals(function)
    first_default = len(positional) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [None] * first_default + list(arguments.defaults)
    kinds = [_kinds(a, d, function) for a, d in zip(positional, defaults, strict=True)]
    named = [
        (a, d, _kinds(a, d, function))
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    found: list[Input] = []
    for number in range(4 * n):
        # Half of the inputs are of one type where that is possible: f(a, b) is seldom called with (1, "b").
        theme = list(POOLS)[number // 2 % len(POOLS)] if number % 2 else None
        given = len(positional) if number % 3 else first_default
        args = tuple(_value(kind, theme, literals, draw) for kind in kinds[:given])
        if arguments.vararg and number % 4 == 1:
            args += tuple(_value(tuple(POOLS)[:3], theme, literals, draw) for _ in range(2))
        keywords = {
            a.arg: _value(kind, theme, literals, draw) for a, d, kind in named if d is None or number % 3 == 2
        }
        if (args, keywords) not in found:
            found.append((args, keywords))
        if len(found) == n:
            break
    return found


def _literals(function: ast.AST) -> dict[type, list[Any]]:
    found: dict[type, list[Any]] = {}
    for node in ast.walk(function):
        value = node.value if isinstance(node, ast.Constant) else None
        # A number above a thousand may be a length to allocate, and a long text is a docstring.
        if isinstance(value, str | bytes):
            small = len(value) <= 40
        else:
            small = type(value) in (int, float) and isinstance(value, int | float) and abs(value) <= 1000
        values = found.setdefault(type(value), [])
        if small and value not in values and len(values) < LITERALS:
            values.append(value)
    return found


def _value(
    kinds: Sequence[type], theme: type | None, literals: dict[type, list[Any]], draw: random.Random
) -> Any:
    kind = theme if theme is not None and theme in kinds else draw.choice(kinds)
    pool = literals[kind] if literals.get(kind) and draw.random() < 0.3 else POOLS[kind]
    return _copied(draw.choice(pool))


def _copied(value: Any) -> Any:
    if isinstance(value, list | tuple | set):
        return type(value)(_copied(item) for item in value)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _kinds(argument: ast.arg, default: ast.expr | None, function: ast.AST) -> tuple[type, ...]:
    """Return the types that a parameter may have, by its hint, else by its default, else by its use."""
    kinds = tuple(_hinted(argument.annotation))
    if kinds:
        return kinds
    if isinstance(default, ast.Constant) and type(default.value) in POOLS and default.value is not None:
        return (type(default.value),)
    if isinstance(default, ast.List | ast.Tuple | ast.Dict):
        return ({ast.List: list, ast.Tuple: tuple, ast.Dict: dict}[type(default)],)
    return _used(argument.arg, function) + ((type(None),) if default is not None else ())


def _hinted(hint: ast.AST | None) -> Iterator[type]:
    match hint:
        case ast.Constant(value=str(text)):
            with contextlib.suppress(SyntaxError, ValueError):
                yield from _hinted(syntax_tree(text, "eval").body)
        case ast.Constant(value=None):
            yield type(None)
        case ast.BinOp(left=left, right=right):
            yield from _hinted(left)
            yield from _hinted(right)
        case ast.Subscript(value=ast.Name(id="Optional") | ast.Attribute(attr="Optional"), slice=inner):
            yield from _hinted(inner)
            yield type(None)
        case ast.Subscript(
            value=ast.Name(id="Union") | ast.Attribute(attr="Union"), slice=ast.Tuple(elts=parts)
        ):
            for part in parts:
                yield from _hinted(part)
        case ast.Subscript(value=value):
            yield from _hinted(value)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield from HINTS.get(name, ())


def _used(name: str, function: ast.AST) -> tuple[type, ...]:
    """Return the types that have every attribute that the function uses of a parameter; all where none has.

    A parameter that the function indexes or iterates over needs the methods of these operations.
    """
    needed: set[str] = set()

    def of(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Name) and node.id == name

    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and of(node.value):
            needed.add(node.attr)
        elif isinstance(node, ast.Subscript) and of(node.value):
            needed.add("__getitem__")
        elif isinstance(node, ast.For | ast.comprehension | ast.Starred) and of(
            getattr(node, "iter", getattr(node, "value", None))
        ):
            needed.add("__iter__")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and any(map(of, node.args)):
            needed |= {
                "len": {"__len__"},
                "sorted": {"__iter__"},
                "sum": {"__iter__"},
                "iter": {"__iter__"},
            }.get(node.func.id, set())
        elif isinstance(node, ast.BinOp) and (of(node.left) or of(node.right)):
            needed |= {ast.Sub: {"__sub__"}, ast.Div: {"__truediv__"}, ast.BitAnd: {"__and__"}}.get(
                type(node.op), set()
            )
    fitting = tuple(kind for kind in POOLS if all(hasattr(kind, attribute) for attribute in needed))
    plain = tuple(kind for kind in fitting if kind not in (bool, type(None)))
    return plain or fitting or tuple(POOLS)


# --- running -------------------------------------------------------------------------------------

# The program that runs in the sandbox; its function `observe` is called with data.
DRIVER = '''
import builtins, contextlib, hashlib, inspect, io, signal, sys, types

class Slow(BaseException):
    pass

def ring(*_):
    raise Slow

signal.signal(signal.SIGALRM, ring)
signal.signal(signal.SIGPROF, ring)

def plain(value, room, depth=0):
    """The value as data, with what is no data described; room[0] counts down the parts it may have."""
    room[0] -= 1
    kind = type(value)
    if room[0] < 0 or depth > 12:
        return ("more",)
    if value is None or kind in (bool, int, float, complex):
        return value if kind is not int or abs(value) < 1 << 4096 else ("int", hash(value))
    if kind in (str, bytes, bytearray):
        data = value.encode("utf-8", "surrogatepass") if kind is str else bytes(value)
        return value if len(data) < 2000 else (kind.__name__, len(data), hashlib.sha256(data).hexdigest())
    if kind in (list, tuple):
        return [kind.__name__, *(plain(item, room, depth + 1) for item in value)]
    if kind in (set, frozenset):
        return [kind.__name__, *sorted((plain(item, room, depth + 1) for item in value), key=repr)]
    if isinstance(value, dict):
        items = [[plain(k, room, depth + 1), plain(v, room, depth + 1)] for k, v in dict.items(value)]
        return [kind.__name__, *items]
    if inspect.iscoroutine(value):
        try:
            value.send(None)
        except StopIteration as end:
            return ["coroutine", plain(end.value, room, depth + 1)]
        return ["coroutine that waits"]
    if hasattr(kind, "__next__"):
        items = []
        for item, _ in zip(value, range(200)):
            items.append(plain(item, room, depth + 1))
        return ["iterator", *items]
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
        return [kind.__name__, str(getattr(value, "__qualname__", value.__name__))]
    inner = getattr(value, "__dict__", None)
    if isinstance(inner, dict) and inner:
        return [kind.__name__, plain(inner, room, depth + 1)]
    text = repr(value)
    return [kind.__name__, "" if " at 0x" in text else text[:2000]]

def observe(number, source, context, name, inputs):
    """Each call's outcome, or the text of why the function cannot be had."""
    module = sys.modules["module%d" % number] = types.ModuleType("module%d" % number)
    try:
        exec(compile(context, "context", "exec", dont_inherit=True), module.__dict__)
        exec(compile(source, "function", "exec", dont_inherit=True), module.__dict__)
        function = module.__dict__[name]
    except BaseException as error:
        return "%s: %s" % (type(error).__name__, str(error)[:200])
    outcomes = []
    for args, kwargs in inputs:
        hangs = outcomes.count(["slow"]) > 1
        outcomes.append(["slow"] if hangs else called(function, args, kwargs))
    return outcomes

def called(function, args, kwargs):
    printed = io.StringIO()
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, 0.25)  # Other load on the machine does not count.
            signal.setitimer(signal.ITIMER_REAL, 10.0)  # a sleep
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                value = function(*args, **kwargs)
                room = [2000]
                seen = ["returned", plain(value, room), plain([*args, kwargs], room)]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Slow:
        return ["slow"]
    except BaseException as error:
        seen = ["raised", type(error).__name__]
    return [*seen, printed.getvalue()[:2000]]
'''


def observe(
    sources: Sequence[str], context: str, inputs: Sequence[Input], allow_unsafe: bool = False
) -> list[list[Any] | str]:
    """Run each function on each input, all in one sandbox, each in a module of its own.

    Returns:
        For each function its outcomes, or one line that says why there are none.

    Raises:
        ValueError: nothing isolates here, and `allow_unsafe` is false.
    """
    sandbox.isolation(allow_unsafe)
    seen: list[list[Any] | str] = []
    try:
        with sandbox.calls(DRIVER, LIMITS, allow_unsafe) as call:
            for number, source in enumerate(sources):
                made = call("observe", number, source, context, parsed(source).name, list(inputs))
                whole = isinstance(made, list) and len(made) == len(inputs)
                told = whole and all(isinstance(o, list) and o and isinstance(o[0], str) for o in made)
                seen.append(made if told else str(made)[:200])
    except Exception as error:  # a CandidateError, or any builtin exception that the program raises
        seen += [f"{type(error).__name__}: {str(error)[:200]}"] * (len(sources) - len(seen))
    return seen


def agreements(
    source: str, others: Sequence[str], context: str, apart: bool = False, allow_unsafe: bool = False
) -> list[Judgement]:
    """Judge for each of several functions whether it does what a function does.

    Args:
        source: The function, without indentation.
        others: Functions of the same name.
        context: The statements that `context_of` returns.
        apart: Run the others in a sandbox of their own, which the work of strangers and models needs: in one
            process it could read the expected outcomes.
        allow_unsafe: Run even where nothing isolates.

    Raises:
        ValueError: nothing isolates here, and `allow_unsafe` is false.
    """
    inputs = inputs_for(source)
    if not inputs or len(context) > CONTEXT_BYTES:
        reason = "its context is too long" if inputs else "it takes an object"
        return [Judgement("not run", reason, 0)] * len(others)
    name = parsed(source).name
    able = [other for other in others if _named(other) == name]
    if apart:
        first, again = observe([source, source], context, inputs, allow_unsafe)
        theirs = [observe([other], context, inputs, allow_unsafe)[0] for other in able]
    else:
        first, *theirs, again = observe([source, *able, source], context, inputs, allow_unsafe)
        if isinstance(again, str) and not isinstance(first, str):  # another function ended the process
            return agreements(source, others, context, True, allow_unsafe)
    made = iter(theirs)
    return [
        _judged(first, again, next(made)) if _named(other) == name
        else Judgement("differs", f"it is no function {name}", 0)
        for other in others
    ]  # fmt: skip


def agreement(source: str, other: str, context: str, allow_unsafe: bool = False) -> Judgement:
    """Judge whether another function, which a stranger or a model wrote, does what the first does."""
    return agreements(source, [other], context, apart=True, allow_unsafe=allow_unsafe)[0]


def _named(source: str) -> str | None:
    try:
        return parsed(source).name
    except ValueError:
        return None


def _judged(first: list[Any] | str, again: list[Any] | str, other: list[Any] | str) -> Judgement:
    if isinstance(first, str) or isinstance(again, str):
        return Judgement("not run", str(first if isinstance(first, str) else again), 0)
    if [encode(one) for one in first] != [encode(one) for one in again]:
        return Judgement("not run", "it does not do the same twice", 0)
    usable = [n for n, outcome in enumerate(first) if outcome[0] != "slow"]
    returned = sum(first[n][0] == "returned" for n in usable)
    if not returned:
        return Judgement("not run", "it returns from none of the inputs", 0)
    if isinstance(other, str):
        return Judgement("differs", other, returned)
    for n in usable:
        if encode(first[n]) != encode(other[n]):
            told = (f"{o[0]} {o[1]!r}"[:60] for o in ([*first[n], ""], [*other[n], ""]))
            return Judgement("differs", "input {}: {} and not {}".format(n, *list(told)[::-1]), returned)
    return Judgement("agrees", "", returned)
