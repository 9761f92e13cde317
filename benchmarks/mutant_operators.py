"""Mutation operators: small mechanical changes of a Python file, each of which may be a fault.

    for mutant in mutants(tree):  # every change that an operator makes of a file
        code = mutant.compiled(tree, path)

The operators are those of mutation testing (DeMillo, Lipton and Sayward 1978; the set of Offutt et al. 1996,
and for tensors the axis). They leave alone what decides no number: docstrings, annotations, imports, raised
errors and their texts, asserts, printed text, names of files, and functions that only refuse.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

SPEAKING = {"print", "say", "warn", "say_damaged", "format_warning", "set_description_str"}  # They print.
REFUSING = ("refuse", "_refuse", "check_", "_check")  # Functions that only raise begin so.
AXIS_KEYWORDS = {"dim", "axis", "dims", "start_dim", "end_dim", "keepdim", "keepdims"}
AXIS_METHODS = """
    softmax log_softmax logsumexp sum mean norm cat concatenate stack transpose argmax argmin amax amin
    unsqueeze squeeze flatten gather scatter split chunk size cumsum topk argsort sort repeat_interleave
    index_select select flip roll any all unbind narrow
"""
UNVISITED = {"annotation", "returns", "decorator_list", "type_comment", "ctx", "bases"}  # Of any node.
PAIRS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True, eq=False)
class Site:
    """A node that may be changed, and where it stands.

    Attributes:
        parent: The node that holds it, in the list `field` at `index`, or alone in `field`.
        statement: The statement that it belongs to.
        function: The innermost function whose body it is in, if any.
        is_default: It is the default of a parameter or of a field.
    """

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    statement: ast.stmt
    function: ast.FunctionDef | ast.AsyncFunctionDef | None
    is_default: bool = False


@dataclass(frozen=True, eq=False)
class Mutant:
    """A change of one node of a tree. The tree is as it was except while `compiled` and `shown` run."""

    operator: str
    site: Site
    replacement: ast.AST

    @property
    def line(self) -> int:
        return _located(self.site).lineno

    @property
    def lines(self) -> range:
        """The lines of which one must be executed for the change to be reached."""
        if self.site.is_default and self.site.function is not None:  # Run when the function is made.
            body = self.site.function.body
            return range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)
        node = _located(self.site)
        return range(node.lineno, (node.end_lineno or node.lineno) + 1)

    @property
    def is_of_module(self) -> bool:
        """Whether the change runs as the module is imported."""
        return self.site.function is None

    def compiled(self, tree: ast.Module, path: str) -> CodeType:
        """Compile the tree with the change in it."""
        before = _swap(self.site, self.replacement)
        try:
            return compile(tree, path, "exec")
        finally:
            _swap(self.site, before)

    def shown(self) -> tuple[str, str]:
        """Return the source of what is changed, before and after, each in one line."""
        node = self._visible()
        old = _one_line(node)
        before = _swap(self.site, self.replacement)
        try:
            # A visible part that is itself replaced is not in the tree any more.
            return old, _one_line(self.replacement if node is before else node)
        finally:
            _swap(self.site, before)

    def _visible(self) -> ast.AST:
        """Return the simple statement, or of a compound one (an `if`, a `def`) the part that is changed."""
        statement = self.site.statement
        if not hasattr(statement, "body") or self.site.node is statement:
            return statement
        of_parts = (child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt))
        return next((part for part in of_parts if self.site.node in ast.walk(part)), self.site.node)


def mutants(tree: ast.Module) -> Iterator[Mutant]:
    """Yield every change that the operators make of a file, in the order of its source.

    Each change gives other code, and code that compiles.
    """
    for site in _sites(tree):
        for name, operator in OPERATORS.items():
            for replacement in operator(site):
                if not isinstance(replacement, ast.operator | ast.cmpop | ast.boolop):
                    ast.copy_location(replacement, _located(site))
                    ast.fix_missing_locations(replacement)
                yield Mutant(name, site, replacement)


# --- where ----------------------------------------------------------------------------------------


def _sites(tree: ast.Module) -> Iterator[Site]:
    for index, statement in enumerate(tree.body):
        if not _is_left_alone(statement):
            yield from _inside(Site(statement, tree, "body", index, statement, None))


def _inside(site: Site) -> Iterator[Site]:
    """Yield a site and those in it."""
    yield site
    node = site.node
    for field, value in ast.iter_fields(node):
        if field in UNVISITED or (isinstance(node, ast.ClassDef) and field == "keywords"):
            continue
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp) and field == "op":
            continue  # The operators change the node that has it.
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _is_left_alone(child):
                yield from _inside(_site_in(site, child, field, index))


def _site_in(site: Site, child: ast.AST, field: str, index: int | None) -> Site:
    node = site.node
    function, is_default = site.function, site.is_default
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node
    if isinstance(node, ast.arguments):
        is_default = field in ("defaults", "kw_defaults")
    elif isinstance(node, ast.AnnAssign) and field == "value":
        is_default = site.function is None
    elif isinstance(child, ast.stmt):
        is_default = False
    statement = child if isinstance(child, ast.stmt) else site.statement
    return Site(child, node, field, index, statement, function, is_default)


def _is_left_alone(node: ast.AST) -> bool:
    """Return whether a node, and all in it, decides nothing that a run leaves."""
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.FunctionDef):
        return node.name.startswith(REFUSING) or node.name in ("__repr__", "__str__")
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # A docstring.
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id == "__all__"
    return isinstance(node, ast.Call) and _called(node) in SPEAKING


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _located(site: Site) -> Any:
    """Return the node, or the nearest one around it that has a line."""
    for node in (site.node, site.parent):
        if hasattr(node, "lineno"):
            return node
    return site.statement


def _swap(site: Site, new: ast.AST) -> ast.AST:
    """Put a node in the place of another; return that one."""
    if site.index is None:
        old = getattr(site.parent, site.field)
        setattr(site.parent, site.field, new)
    else:
        values = getattr(site.parent, site.field)
        old, values[site.index] = values[site.index], new
    return old


def _one_line(node: ast.AST) -> str:
    text = ast.unparse(node)
    if isinstance(node, ast.stmt) and hasattr(node, "body"):
        text = f"{text.splitlines()[0]} ..."
    return " ".join(text.split())


# --- operators ------------------------------------------------------------------------------------


def sign(site: Site) -> Iterator[ast.AST]:
    """Change an arithmetic operator into its opposite, or leave a minus out."""
    node = site.node
    if isinstance(node, ast.BinOp) and type(node.op) in PAIRS and not isinstance(node.left, ast.JoinedStr):
        yield ast.BinOp(node.left, PAIRS[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in PAIRS:
        yield ast.AugAssign(node.target, PAIRS[type(node.op)](), node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert):
        yield node.operand


def constant(site: Site) -> Iterator[ast.AST]:
    """Change a number by one, double a fraction, negate a truth value."""
    if not site.is_default and not _is_index(site) and not _is_axis(site):
        yield from _other_constant(site.node)


def default(site: Site) -> Iterator[ast.AST]:
    """Change the default of a parameter or of a field."""
    if site.is_default:
        yield from _other_constant(site.node)


def _other_constant(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, float):
            yield ast.Constant(2 * node.value if node.value else 1.0)


def comparison(site: Site) -> Iterator[ast.AST]:
    """Let a comparison hold at its limit where it did not, or be the opposite of an equality."""
    if isinstance(site.node, ast.cmpop):
        yield PAIRS[type(site.node)]()


def index(site: Site) -> Iterator[ast.AST]:
    """Move an index, or an end of a slice, by one."""
    if _is_index(site):
        value = _integer(site.node)
        if value is not None:
            yield _number(value + 1 if value >= 0 else value - 1)
    elif isinstance(site.parent, ast.Slice) and site.field != "step" and isinstance(site.node, ast.expr):
        yield _plus(site.node, 1 if site.field == "lower" else -1)


def _is_index(site: Site) -> bool:
    """Return whether a node is a number that an element is taken by."""
    in_index = isinstance(site.parent, ast.Subscript) and site.field == "slice"
    in_tuple = isinstance(site.parent, ast.Tuple) and isinstance(site.node, ast.Constant | ast.UnaryOp)
    return (in_index or (in_tuple and _is_tuple_index(site))) and _integer(site.node) is not None


def _is_tuple_index(site: Site) -> bool:
    """Return whether the tuple around a node is an index, as in `x[:, 0]`."""
    return any(
        isinstance(node, ast.Subscript) and node.slice is site.parent for node in ast.walk(site.statement)
    )


def arguments(site: Site) -> Iterator[ast.AST]:
    """Swap the first two arguments of a call."""
    node = site.node
    if not isinstance(node, ast.Call) or _called(node) in ("isinstance", "max", "min"):
        return
    match node.args:
        case [ast.Starred(), *_] | [_, ast.Starred(), *_]:
            return
        case [first, second, *others] if ast.dump(first) != ast.dump(second):
            yield ast.Call(node.func, [second, first, *others], node.keywords)


def keyword(site: Site) -> Iterator[ast.AST]:
    """Leave an argument out that is given by its name."""
    node = site.node
    if isinstance(node, ast.Call):
        for left_out in node.keywords:
            if left_out.arg not in (None, "strict"):  # `strict` of zip is a check.
                yield ast.Call(
                    node.func, node.args, [other for other in node.keywords if other is not left_out]
                )


def statement(site: Site) -> Iterator[ast.AST]:
    """Leave a statement out that only has an effect: a call, an assignment to what is there, a jump."""
    node = site.node
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if not _called(node.value).startswith((*REFUSING, *SPEAKING)):
            yield ast.Pass()
    elif isinstance(node, ast.AugAssign | ast.Continue | ast.Break):
        yield ast.Pass()
    elif isinstance(node, ast.Assign):
        held = isinstance(node.targets[0], ast.Attribute | ast.Subscript)
        if held or (isinstance(node.targets[0], ast.Name) and _is_assigned_before(site, node.targets[0].id)):
            yield ast.Pass()
    elif isinstance(node, ast.If) and not node.orelse and not isinstance(node.body[0], ast.Raise):
        yield ast.Pass()


def _is_assigned_before(site: Site, name: str) -> bool:
    if site.function is None:
        return False
    names = [*site.function.args.args, *site.function.args.kwonlyargs]
    earlier = (
        node.id
        for node in ast.walk(site.function)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and node.lineno < site.statement.lineno
    )
    return name in {argument.arg for argument in names} or name in earlier


def axis(site: Site) -> Iterator[ast.AST]:
    """Let an operation on a tensor run along the next axis."""
    value = _integer(site.node)
    if _is_axis(site) and value is not None:
        yield _number(value - 1 if value else 1)


def _is_axis(site: Site) -> bool:
    if _integer(site.node) is None:
        return False
    call = site.parent
    if isinstance(call, ast.keyword):
        return call.arg in AXIS_KEYWORDS
    if not isinstance(call, ast.Call) or site.field != "args" or not isinstance(call.func, ast.Attribute):
        return False
    return _called(call) in AXIS_METHODS.split()


def logic(site: Site) -> Iterator[ast.AST]:
    """Exchange `and` and `or`, leave a `not` out, or turn a condition around."""
    node = site.node
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(PAIRS[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(site.parent, ast.If | ast.IfExp) and site.field == "test":
        is_one_comparison = isinstance(node, ast.Compare) and len(node.ops) == 1
        if not is_one_comparison and isinstance(node, ast.expr):  # `comparison` turns those around.
            yield ast.UnaryOp(ast.Not(), node)


def returned(site: Site) -> Iterator[ast.AST]:
    """Change the value of a function, in a way that its annotation allows."""
    node = site.node
    if not isinstance(node, ast.Return) or node.value is None or site.function is None:
        return
    if isinstance(node.value, ast.Tuple) and len(node.value.elts) >= 2:
        first, second, *others = node.value.elts
        if ast.dump(first) != ast.dump(second):
            yield ast.Return(ast.Tuple([second, first, *others], ast.Load()))
        return
    kind = ast.unparse(site.function.returns) if site.function.returns else ""
    if kind == "bool":
        yield ast.Return(ast.UnaryOp(ast.Not(), node.value))
    elif kind == "int":
        yield ast.Return(_plus(node.value, 1))
    elif kind in ("float", "Tensor", "torch.Tensor", "np.ndarray"):
        yield ast.Return(ast.BinOp(node.value, ast.Mult(), ast.Constant(2)))
    elif kind == "str" or kind.startswith(("list[", "tuple[")):
        last = ast.Slice(None, ast.UnaryOp(ast.USub(), ast.Constant(1)))
        yield ast.Return(ast.Subscript(node.value, last, ast.Load()))


def _integer(node: ast.AST) -> int | None:
    """Return the number of a constant such as 2 or -1."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _integer(node.operand)
        return None if value is None else -value
    return None


def _number(value: int) -> ast.expr:
    return ast.Constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))


def _plus(node: ast.expr, by: int) -> ast.expr:
    """Return `node + by`, as a number where it is one."""
    value = _integer(node)
    if value is not None:
        return _number(value + by)
    return ast.BinOp(node, ast.Add() if by > 0 else ast.Sub(), ast.Constant(abs(by)))


OPERATORS: dict[str, Callable[[Site], Iterator[ast.AST]]] = {
    "sign": sign,
    "constant": constant,
    "default": default,
    "comparison": comparison,
    "index": index,
    "arguments": arguments,
    "keyword": keyword,
    "statement": statement,
    "axis": axis,
    "logic": logic,
    "returned": returned,
}
