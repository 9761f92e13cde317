"""Rewrite a Python function worse, in five ways that keep what it computes.

    source = "def twice(xs):\\n    return [x * 2 for x in xs]\\n"
    degrade(source, "loops")     # a string, or None where this way finds nothing to change

Each way edits the text at the places that the syntax tree gives, so that all other text stays byte for byte.
Code that cannot be changed with certainty stays as it is.

    names       local variables lose their names; parameters do not, since callers may spell them
    hints       annotations and docstrings are removed
    loops       comprehensions become loops, whose variables get names that are free in the function
    formatting  no optional blank is left, indentation is one column; the tree stays the same
    redundant   needless steps, and constants of the module as bare numbers
    mixed       all of these that apply, one after the other

`degrade` checks the tree of each result and the names that it uses, so that a rewrite that uses a variable of
another scope is an error here and not a training example.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

from recipes.functions import (
    Edits,
    Function,
    Scope,
    fresh_names,
    globals_of,
    identifiers,
    own_identifiers,
    parsed,
    plain_locals,
)

Constants = Mapping[str, int | float]

MOST_EQUAL = 0.1  # largest share of functions that two ways may make equal; on real functions it is 0

# A function that uses one of these names may read its own names, annotations or docstring.
REFLECTION = frozenset(
    {"locals", "vars", "eval", "exec", "globals", "dir", "__doc__", "__annotations__", "inspect", "sys"}
)


# --- the ways ----------------------------------------------------------------------------------------


def _names(source: str, constants: Constants) -> str | None:
    function, edits = parsed(source), Edits(source)
    fresh = fresh_names(function, "var")
    new = {name: next(fresh) for name in plain_locals(function)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in new:
            edits.replace(*edits.span(node), new[node.id])
    return edits.done()


def _hints(source: str, constants: Constants) -> str | None:
    function, edits = parsed(source), Edits(source)
    functions = [node for node in ast.walk(function) if isinstance(node, Function)]
    if any(node.decorator_list for node in functions) or any(
        isinstance(node, ast.ClassDef) for node in ast.walk(function)
    ):
        return None  # A decorator or a class may read hints.
    for node in functions:
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg) and argument.annotation:
                start = edits.place(argument.lineno, argument.col_offset + len(argument.arg.encode()))
                _cut(edits, start, argument.annotation)
        if node.returns:
            head = edits.text(edits.span(node)[0], edits.span(node.returns)[0])
            before = head[: head.rindex("->")].rstrip()
            _cut(edits, edits.span(node)[0] + len(before.encode()), node.returns)
        _without_docstring(node, edits)
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and node.value:
            _cut(edits, edits.span(node.target)[1], node.annotation)
    return edits.done()


def _cut(edits: Edits, start: int, hint: ast.expr) -> None:
    """Remove a hint from `start` on, with the brackets around it, which are no part of its node."""
    first, end = edits.span(hint)
    for _ in range(edits.text(start, first).count("(")):
        end += len(re.match(r"\s*\)?", edits.text(end, edits.size))[0])  # pyright: ignore
    edits.replace(start, end, "")


def _without_docstring(node: Function, edits: Edits) -> None:
    if ast.get_docstring(node, clean=False) is None:
        return
    docstring = node.body[0]
    if len(node.body) == 1:
        edits.replace(*edits.span(docstring), "pass")
    elif not _is_text(node.body[1]) and edits.indent(docstring) is not None:
        first, last = edits.line(docstring.lineno)[0], edits.line(docstring.end_lineno or 0)[1]
        edits.replace(first, last, "")


def _is_text(node: ast.stmt) -> bool:
    """Return whether a statement would be the docstring if it came first."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _loops(source: str, constants: Constants) -> str | None:
    function, edits = parsed(source), Edits(source)
    if any(isinstance(node, ast.ClassDef) for node in ast.walk(function)):
        return None  # A loop's variables would become attributes of a class.
    step = _step(function)
    names = identifiers(function)
    results, targets = fresh_names(function, "result"), fresh_names(function, "item")
    for statement in ast.walk(function):
        if not isinstance(statement, ast.Assign | ast.Return) or statement.value is None:
            continue
        value, indent = statement.value, edits.indent(statement)
        if not isinstance(value, ast.ListComp | ast.DictComp | ast.SetComp) or indent is None:
            continue
        start, end = edits.span(statement)
        before, after = edits.span(value)
        if (
            after != end
            or not re.fullmatch(r"return |(?s:.*)= ", edits.text(start, before))
            or not _plain(value)
        ):
            continue
        # The first iterable is evaluated outside of the comprehension.
        inside = Counter(identifiers(value)) - Counter(identifiers(value.generators[0].iter))
        bound = {n.id for g in value.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        # A loop's variable is the function's own, so it may not be another variable of the function.
        renamed = {name: next(targets) for name in sorted(bound) if names.count(name) > inside[name]}
        result = next(results)
        lines = _loop(value, edits, renamed, result, step)
        lines.append(edits.text(start, before) + result)
        edits.replace(start, end, f"\n{indent}".join(lines))
    return edits.done()


def _plain(value: ast.ListComp | ast.DictComp | ast.SetComp) -> bool:
    """Return whether nothing in a comprehension has a scope, binding or order that a loop would change."""
    refused = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.JoinedStr, *Scope.__args__)
    nodes = [node for child in ast.iter_child_nodes(value) for node in ast.walk(child)]
    if any(isinstance(node, refused) for node in nodes) or any(g.is_async for g in value.generators):
        return False
    targets = [node for g in value.generators for node in ast.walk(g.target)]
    return all(
        isinstance(t, ast.Name | ast.Tuple | ast.List | ast.Starred | ast.expr_context) for t in targets
    )


def _loop(
    value: ast.ListComp | ast.DictComp | ast.SetComp,
    edits: Edits,
    renamed: dict[str, str],
    result: str,
    step: str,
) -> list[str]:
    """Return the lines that fill `result` as a comprehension does."""

    def text(node: ast.expr, names: dict[str, str]) -> str:
        start, end = edits.span(node)
        inner, at = [], start
        for name in sorted((n for n in ast.walk(node) if isinstance(n, ast.Name)), key=edits.span):
            first, last = edits.span(name)
            inner += [edits.text(at, first), names.get(name.id, name.id)]
            at = last
        whole = "".join([*inner, edits.text(at, end)])
        return f"({whole})" if "\n" in whole else whole

    empty = {ast.ListComp: "[]", ast.DictComp: "{}", ast.SetComp: "{*()}"}[type(value)]
    lines, depth = [f"{result} = {empty}"], ""  # A variable may shadow `set`.
    for number, generator in enumerate(value.generators):
        over = text(generator.iter, renamed if number else {})  # The first is evaluated outside.
        lines.append(f"{depth}for {text(generator.target, renamed)} in {over}:")
        depth += step
        for condition in generator.ifs:
            lines.append(f"{depth}if {text(condition, renamed)}:")
            depth += step
    if isinstance(value, ast.DictComp):
        # The key must be evaluated first; `result[key] = value` evaluates the value first.
        lines.append(f"{depth}{result}.update([({text(value.key, renamed)}, {text(value.value, renamed)})])")
    else:
        method = "append" if isinstance(value, ast.ListComp) else "add"
        lines.append(f"{depth}{result}.{method}({text(value.elt, renamed)})")
    return lines


def _step(function: Function) -> str:
    """Return one level of the function's indentation."""
    first = function.body[0]
    return " " * (first.col_offset - function.col_offset) if first.lineno > function.lineno else "    "


def _formatting(source: str, constants: Constants) -> str | None:
    words = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING)
    pieces: list[str] = []
    depth, last = 0, ""  # the last token's kind: word, number, other, or "" at the beginning of a line
    inside = 0  # number of open brackets
    for kind, text in _tokens(source):
        if kind in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if kind == tokenize.INDENT else -1
        elif kind in (tokenize.NEWLINE, tokenize.NL):
            if last:  # Blank lines are left out.
                pieces.append("\n")
            last = ""
        elif text:
            word = kind in words
            if not last and not inside:
                pieces.append(" " * depth)
            elif (word and last in ("word", "number")) or (text[0] == "." and last == "number"):
                pieces.append(" ")
            pieces.append(text)
            inside += (text in "([{") - (text in ")]}") if kind == tokenize.OP else 0
            last = "number" if kind == tokenize.NUMBER else "word" if word else "other"
    text = "".join(pieces) + ("\n" if last else "")
    return text if text != source else None


def _tokens(source: str) -> Iterator[tuple[int, str]]:
    """Yield (kind, text) of the source's tokens, an f-string as one token, as before Python 3.12."""
    start, end = (getattr(tokenize, f"FSTRING_{which}", -1) for which in ("START", "END"))
    lines, open_strings, began = source.splitlines(keepends=True), 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == start:
            began = began if open_strings else token.start
            open_strings += 1
        elif token.type == end:
            open_strings -= 1
            if not open_strings:
                (first, column), (row, after) = began, token.end
                rows = [*lines[first - 1 : row - 1], lines[row - 1][:after]]
                yield tokenize.STRING, "".join(rows)[column:]
        elif not open_strings:
            yield token.type, token.string


def _redundant(source: str, constants: Constants) -> str | None:
    with_numbers = _bare_numbers(source, constants) or source
    result = _needless_steps(with_numbers) or with_numbers
    return result if result != source else None


def _bare_numbers(source: str, constants: Constants) -> str | None:
    function, edits = parsed(source), Edits(source)
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    bound |= {
        n for node in ast.walk(function) if not isinstance(node, ast.Name) for n in own_identifiers(node)
    }
    texts = (node for node in ast.walk(function) if isinstance(node, ast.JoinedStr))
    in_text = {id(inner) for text in texts for inner in ast.walk(text)}
    with_attribute = {
        id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute)
    }  # no `50.real`
    for name in names:
        if name.id in constants and name.id not in bound and id(name) not in in_text:
            value = repr(constants[name.id])
            edits.replace(
                *edits.span(name),
                value if value.isdigit() and id(name) not in with_attribute else f"({value})",
            )
    return edits.done()


def _needless_steps(source: str) -> str | None:
    function, edits = parsed(source), Edits(source)
    fresh, step = fresh_names(function, "answer"), _step(function)
    for node in ast.walk(function):
        if isinstance(node, ast.If):
            edits.replace(*edits.span(node.test), f"({edits.text(*edits.span(node.test))}) and True")
        elif isinstance(node, ast.Return) and node.value and (indent := edits.indent(node)) is not None:
            start, end = edits.span(node)
            before, after = edits.span(node.value)
            value = edits.text(before, after)
            if after != end or edits.text(start, before) != "return " or "\n" in value:
                continue
            if _is_truth(node.value):
                lines = [f"if {value}:", f"{step}return True", "else:", f"{step}return False"]
            elif not isinstance(node.value, ast.Name | ast.Constant):
                answer = next(fresh)
                lines = [f"{answer} = {value}", f"return {answer}"]
            else:
                continue
            edits.replace(start, end, f"\n{indent}".join(lines))
    return edits.done()


def _is_truth(node: ast.expr) -> bool:
    """Return whether an expression is True or False for operands of any class."""
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn)
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _mixed(source: str, constants: Constants) -> str | None:
    result, applied = source, 0
    for name in ("hints", "names", "loops", "redundant", "formatting"):
        changed = STRATEGIES[name](result, constants)
        result, applied = changed or result, applied + (changed is not None)
    return result if applied > 1 else None


STRATEGIES: dict[str, Callable[[str, Constants], str | None]] = {
    "names": _names,
    "hints": _hints,
    "loops": _loops,
    "formatting": _formatting,
    "redundant": _redundant,
    "mixed": _mixed,
}


# --- checks of every result --------------------------------------------------------------------------


def degrade(source: str, strategy: str, constants: Constants | None = None) -> str | None:
    """Rewrite a function worse; return None where this way changes nothing, or the function reads itself.

    Args:
        source: One function, without indentation, and not `unwritable`.
        strategy: A key of STRATEGIES.
        constants: Name -> number, of the numbers that the function's module names.

    Raises:
        ValueError: `source` is not one function; or `check` finds that the result would not be this function.
    """
    function = parsed(source)
    seen = set(identifiers(function)) | {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
    if REFLECTION & seen:
        return None
    result = STRATEGIES[strategy](source, constants or {})
    if result is None or result == source:
        return None
    check(source, result, strategy)
    return result


def check(source: str, result: str, strategy: str) -> None:
    """Raise a ValueError if a rewritten function is not what its way may make of the original.

    It must parse, take no other names from outside, and have the original's tree: the same (formatting), the
    same but for hints (hints), or the same but for a one-to-one renaming (names).
    """
    try:
        function = parsed(result)
    except ValueError as error:
        raise ValueError(f"degradation-broken: {strategy} gives what is {error}") from None
    outside = globals_of(result) - globals_of(source)
    if outside:
        raise ValueError(
            f"degradation-out-of-scope: {strategy} takes {', '.join(sorted(outside))} from outside the "
            "function, which the first one does not"
        )
    first = parsed(source)
    if strategy == "names":
        same = _renamed_alike(first, function)
    elif strategy == "formatting":
        same = ast.dump(first) == ast.dump(function)
    elif strategy == "hints":
        same = ast.dump(_Stripped().visit(first)) == ast.dump(_Stripped().visit(function))
    else:
        same = True  # behaviour.py compares the others by running them
    if not same:
        raise ValueError(f"degradation-changes-meaning: {strategy} gives another syntax tree")


class _Stripped(ast.NodeTransformer):
    """A transformer that removes hints and docstrings from a tree."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        while ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # pyright: ignore  # Both nodes have these fields.


def _renamed_alike(one: ast.AST, other: ast.AST) -> bool:
    """Return whether two trees differ in names of variables alone, and these one to one."""
    there: dict[str, str] = {}
    back: dict[str, str] = {}
    pairs = [(one, other)]
    for a, b in pairs:
        if type(a) is not type(b):
            return False
        for field, value in ast.iter_fields(a):
            mine, theirs = ([v] if not isinstance(v, list) else v for v in (value, getattr(b, field)))
            if len(mine) != len(theirs):
                return False
            for x, y in zip(mine, theirs, strict=True):
                if isinstance(x, ast.AST):
                    pairs.append((x, y))
                elif isinstance(a, ast.Name) and field == "id":
                    if there.setdefault(x, y) != y or back.setdefault(y, x) != x:
                        return False
                elif x != y or type(x) is not type(y):
                    return False
    return True


def check_distinct(results: Mapping[str, list[str | None]]) -> None:
    """Raise a ValueError if two ways often give the same result: one would be a copy of the other.

    The share is of the functions that the rarer way changes, and may be MOST_EQUAL. (As a share of those that
    either changes, it would be small for a rare way, even if that were a copy throughout.)

    Args:
        results: Way -> its results for the same functions, in order.
    """
    for pair in combinations(results.items(), 2):
        changed = {name: sum(text is not None for text in made) for name, made in pair}
        rarer = min(changed, key=lambda name: changed[name])
        (one, mine), (other, theirs) = pair
        same = sum(a is not None and a == b for a, b in zip(mine, theirs, strict=True))
        if same > MOST_EQUAL * changed[rarer]:
            raise ValueError(
                f"degradation-is-a-copy: {one} and {other} give the same for {same} of the {changed[rarer]} "
                f"functions that {rarer} changes, and {MOST_EQUAL:.0%} is the most"
            )
    for name, made in results.items():
        if not any(text is not None for text in made):
            raise ValueError(
                f"degradation-does-nothing: {name} changes none of {len(made)} functions: give more of them, "
                f"or leave {name} out of --strategies"
            )
