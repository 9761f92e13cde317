"""CodeBLEU (arXiv:2009.10297) of Python, Kotlin and Java.

It is the mean of four scores: shared n-grams, n-grams weighted by keywords, syntax trees and flow of data.
The arithmetic is that of the authors' code, from which published numbers come, also where the paper's
formulas differ: weighted n-grams are a recall without a penalty for brevity, keywords count 1 and other
words 0.2, in single words only; a subtree of the reference counts as found however often it is needed. The
differences from that code are:

- Tokens are `texts.code_tokens`; theirs are whatever stands between white space.
- An order of n-grams that a text is too short for is left out; in their code it counts against the text, so
  that three tokens against themselves have less than 100. Likewise a corpus whose references have no flow of
  data is scored on the other three parts; in their code this part is 0, in a later package 1.
- Comments, and docstrings in Python, are left out of trees and flow by the tree; their code removes comments
  by Java's marks, also in Python, where `//` divides.
- Names of one flow stand in the order of the text; theirs stand in that of a set, which changes from one run
  to the next.
- Their code does not know Kotlin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.bleu import ORDERS, precision_of_sums
from metrics.texts import KEYWORDS, Pair, code_tokens, ngrams
from metrics.trees import Tree, check_language, parse

WORD_WEIGHT = 0.2  # The weight of a token that is no keyword.
PARTS = ("ngram", "weighted", "syntax", "dataflow")
# Columns of a row: two lengths; the shared and all n-grams of each order; the same weighted; subtrees; flows.
_LENGTHS = slice(0, 2)
_SHARED, _OF = slice(2, 2 + ORDERS), slice(2 + ORDERS, 2 + 2 * ORDERS)
_WEIGHTED_SHARED, _WEIGHTED_OF = (slice(2 + n * ORDERS, 2 + (n + 1) * ORDERS) for n in (2, 3))
_TREES, _FLOWS = slice(2 + 4 * ORDERS, 4 + 4 * ORDERS), slice(4 + 4 * ORDERS, 6 + 4 * ORDERS)
COLUMNS = 6 + 4 * ORDERS


def codebleu(pairs: Sequence[Pair], language: str) -> np.ndarray:
    """Return the row of each pair that `codebleu_of_sums` reads, (pairs, COLUMNS).

    Raises:
        ValueError: The language has no grammar here.
    """
    check_language(language)
    rows = np.zeros((len(pairs), COLUMNS))
    for row, (prediction, reference) in zip(rows, pairs, strict=True):
        _count_ngrams(row, code_tokens(prediction), code_tokens(reference), KEYWORDS[language])
        found, wanted = parse(prediction, language), parse(reference, language)
        if wanted is None:
            continue
        known: dict[tuple[object, ...], int] = {}
        shapes = _subtrees(wanted, known)
        row[_TREES] = 0, len(shapes)
        flows = _flows(wanted, language)
        row[_FLOWS] = 0, flows.total()
        if found is not None:
            has = set(_subtrees(found, known))
            row[_TREES.start] = sum(shape in has for shape in shapes)
            row[_FLOWS.start] = (flows & _flows(found, language)).total()
    return rows


def codebleu_parts(sums: np.ndarray) -> np.ndarray:
    """Return each of PARTS, 0 to 1, (..., 4), from sums of rows, (..., COLUMNS).

    A part is NaN where there was nothing to find.
    """
    lengths, of = sums[..., _LENGTHS], sums[..., _WEIGHTED_OF]
    plain = precision_of_sums(lengths, sums[..., _SHARED], sums[..., _OF])
    # Equal lengths have no brevity penalty.
    weighted = precision_of_sums(np.ones_like(lengths), sums[..., _WEIGHTED_SHARED], of)
    nothing = lengths.sum(-1) == 0
    with np.errstate(invalid="ignore"):
        trees = sums[..., _TREES.start] / sums[..., _TREES.start + 1]
        flows = sums[..., _FLOWS.start] / sums[..., _FLOWS.start + 1]
    words = [np.where(nothing, np.nan, part) for part in (plain, weighted)]
    return np.stack([*words, trees, flows], axis=-1)


def codebleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return 100 times the mean of the parts that there are, (...), from sums of rows, (..., COLUMNS).

    It is 100 where there are none.
    """
    parts = codebleu_parts(sums)
    there = ~np.isnan(parts)
    return 100 * np.where(
        there.any(-1), np.where(there, parts, 0.0).sum(-1) / np.maximum(there.sum(-1), 1), 1.0
    )


def _count_ngrams(row: np.ndarray, found: list[str], wanted: list[str], keywords: frozenset[str]) -> None:
    row[_LENGTHS] = len(found), len(wanted)
    for order in range(1, ORDERS + 1):
        have, need = ngrams(found, order), ngrams(wanted, order)
        shared = {gram: min(count, need[gram]) for gram, count in have.items() if gram in need}
        row[_SHARED.start + order - 1] = sum(shared.values())
        row[_OF.start + order - 1] = max(0, len(found) - order + 1)
        if order == 1:
            weight = {gram: 1.0 if gram[0] in keywords else WORD_WEIGHT for gram in need}
            row[_WEIGHTED_SHARED.start] = sum(weight[gram] * count for gram, count in shared.items())
            row[_WEIGHTED_OF.start] = sum(weight[gram] * count for gram, count in need.items())
        else:
            row[_WEIGHTED_SHARED.start + order - 1] = sum(shared.values())
            row[_WEIGHTED_OF.start + order - 1] = max(0, len(wanted) - order + 1)


# --- syntax --------------------------------------------------------------------------------------------


def _subtrees(tree: Tree, known: dict[tuple[object, ...], int]) -> list[int]:
    """Return the number of the shape of each subtree that has children, and of the whole tree.

    A shape is the kinds and roles of the named nodes, as a tree's S-expression shows them; names and literals
    do not count. `known` holds the shapes' numbers, and takes those of new ones.
    """
    kinds, roles, named, children = tree.kinds, tree.roles, tree.named, tree.children
    shapes = [0] * len(kinds)
    for i in range(len(kinds) - 1, -1, -1):
        parts: list[object] = [kinds[i]]
        for child in children[i]:
            if named[child] or kinds[child].startswith("MISSING"):
                parts.append(roles[child])
                parts.append(shapes[child])
        shapes[i] = known.setdefault(tuple(parts), len(known))
    return [shapes[i] for i in range(len(kinds)) if i == 0 or children[i]]


# --- flow of data --------------------------------------------------------------------------------------


# Targets of an assignment that hold several names.
_SEVERAL = frozenset({"pattern_list", "tuple_pattern", "list_pattern", "multi_variable_declaration"})
_DEEPEST = 150  # Levels that are read with their structure; a deeper subtree is read as its leaves, in order.
_LOOPS = 3  # Nested loops that are passed twice; deeper ones are passed once, or passes would multiply.


@dataclass(frozen=True)
class _Kinds:
    """The kinds of node in a grammar, by what they do to data.

    Args:
        atoms: Nodes that are read as one leaf.
        binds: Nodes that give names a value, and the name of the edge that this makes.
        steps: Nodes such as x++.
        branches: Nodes whose first alternative ends at an `else`.
        each: Loops over a value, whose children are target, value and body.
        repeats: Other loops.
        first: Clauses that are read before what stands before them.
    """

    atoms: frozenset[str]
    binds: dict[str, str]
    steps: frozenset[str]
    branches: frozenset[str]
    each: frozenset[str]
    repeats: frozenset[str]
    first: frozenset[str]


def _kinds(
    atoms: str,
    declares: str,
    assigns: str,
    steps: str,
    branches: str,
    each: str,
    repeats: str,
    first: str = "",
) -> _Kinds:
    """Return the kinds of a grammar from words between spaces.

    Args:
        declares: Kinds of node that give a name the value beside them.
        assigns: Kinds of node that compute a name's value from the one beside them.

    It has eight parameters, a word list for each thing that a node can do to data; the others are fields of
    `_Kinds`.
    """
    binds = dict.fromkeys(declares.split(), "comesFrom") | dict.fromkeys(assigns.split(), "computedFrom")
    return _Kinds(
        frozenset(atoms.split()),
        binds,
        *(frozenset(s.split()) for s in (steps, branches, each, repeats, first)),
    )


KINDS = {
    "python": _kinds(
        atoms="string",
        declares="default_parameter typed_default_parameter named_expression",
        assigns="assignment augmented_assignment",
        steps="",
        branches="if_statement",
        each="for_statement for_in_clause",
        repeats="while_statement",
        first="for_in_clause",
    ),
    "java": _kinds(
        atoms="string_literal character_literal",
        declares="variable_declarator",
        assigns="assignment_expression",
        steps="update_expression",
        branches="if_statement",
        each="enhanced_for_statement",
        repeats="for_statement while_statement do_statement",
    ),
    "kotlin": _kinds(
        atoms="string_literal character_literal user_type",  # The name of a type is no variable.
        declares="property_declaration",
        assigns="assignment",
        steps="unary_expression",
        branches="if_expression",
        each="for_statement",
        repeats="while_statement do_while_statement",
    ),
}


def _flows(tree: Tree, language: str) -> Counter[tuple[int, str, tuple[int, ...]]]:
    """Count the flows of data: (variable, edge, variables that its value comes from).

    Variables are numbered in the order in which they stand in edges, so that names do not matter.
    """
    if not tree.kinds:
        return Counter()
    reader = _Reader(tree, KINDS[language])
    reader.read(0, 0)
    sources = {source for _, _, origins in reader.edges.values() for source in origins}
    numbers: dict[str, int] = {}
    flows: Counter[tuple[int, str, tuple[int, ...]]] = Counter()
    for i in sorted(reader.edges):
        name, edge, origins = reader.edges[i]
        if origins or i in sources:
            names = dict.fromkeys(tree.text(source) for source in sorted(origins))
            came = tuple(numbers.setdefault(name, len(numbers)) for name in names)
            flows[numbers.setdefault(name, len(numbers)), edge, came] += 1
    return flows


class _Reader:
    """A reader that goes through a tree in the order in which the program runs.

    `state` holds the leaves that last wrote each name, and `edges` a leaf's name, the kind of its edge, and
    the leaves that its value comes from.
    """

    def __init__(self, tree: Tree, kinds: _Kinds) -> None:
        self.tree, self.kinds = tree, kinds
        self.state: dict[str, frozenset[int]] = {}
        self.edges: dict[int, tuple[str, str, set[int]]] = {}
        self.loops = 0

    def edge(self, i: int, name: str, kind: str, origins: Iterable[int]) -> None:
        self.edges.setdefault(i, (name, kind, set()))[2].update(origins)

    def leaves(self, i: int) -> list[int]:
        """Return the leaves of a subtree that are no keyword or mark."""
        tree, atoms = self.tree, self.kinds.atoms
        found, at, end = [], i, tree.ends[i]
        while at < end:
            leaf = not tree.children[at] or tree.kinds[at] in atoms
            if leaf and tree.named[at] and tree.spans[at][0] < tree.spans[at][1]:
                found.append(at)
            at = tree.ends[at] if leaf else at + 1
        return found

    def read(self, i: int, depth: int) -> None:
        kinds, kind, children = self.kinds, self.tree.kinds[i], self.tree.children[i]
        if not children or kind in kinds.atoms or depth > _DEEPEST:
            for leaf in self.leaves(i):
                self.use(leaf)
        elif kind in kinds.binds:
            self.bind(children, kinds.binds[kind], depth)
        elif kind in kinds.steps and any(self.tree.kinds[c] in ("++", "--") for c in children):
            leaves = self.leaves(i)
            for leaf in leaves:
                self.write(leaf, "computedFrom", leaves)
        elif kind in kinds.branches:
            self.branch(children, depth)
        elif kind in kinds.each or kind in kinds.repeats:
            self.loops += 1
            for _ in range(2 if self.loops <= _LOOPS else 1):
                if kind in kinds.each:
                    self.each(children, depth)
                else:
                    self.all(children, depth)
            self.loops -= 1
        elif kinds.first and any(self.tree.kinds[c] in kinds.first for c in children):
            self.all(sorted(children, key=lambda c: self.tree.kinds[c] not in kinds.first), depth)
        else:
            self.all(children, depth)

    def all(self, children: list[int], depth: int) -> None:
        for child in children:
            self.read(child, depth + 1)

    def use(self, leaf: int) -> None:
        name = self.tree.text(leaf)
        written = self.state.get(name)
        if written is None and self.tree.kinds[leaf] == "identifier":
            self.state[name] = frozenset((leaf,))
        self.edge(leaf, name, "comesFrom", written or ())

    def write(self, leaf: int, kind: str, origins: Iterable[int]) -> None:
        name = self.tree.text(leaf)
        self.edge(leaf, name, kind, origins)
        self.state[name] = frozenset((leaf,))

    def bind(self, children: list[int], kind: str, depth: int) -> None:
        """Read the value of a binding, its last child, then write its names; there may be a type between."""
        parts = [c for c in children if self.tree.named[c]]
        marked = any(self.tree.kinds[c].endswith("=") for c in children)
        if not marked:  # It is a declaration without a value.
            for leaf in self.leaves(parts[0]) if parts else ():
                self.write(leaf, kind, ())
            return
        parts = [c for c in parts if not self.is_type(c)]
        if len(parts) < 2:
            self.all(children, depth)
        else:
            self.pairwise(parts[0], parts[-1], kind, depth)

    def is_type(self, i: int) -> bool:
        return self.tree.kinds[i] in ("type", "modifiers", "user_type", "type_parameters")

    def pairwise(self, target: int, value: int, kind: str, depth: int) -> None:
        """Read a, b = x, y element by element; else every name of the target comes from the whole value."""
        targets = values = []
        if self.tree.kinds[target] in _SEVERAL:
            targets, values = (
                [c for c in self.tree.children[node] if self.tree.named[c]] for node in (target, value)
            )
        if not targets or len(targets) != len(values):
            targets, values = [target], [value]
        self.all(values, depth)
        for left, right in zip(targets, values, strict=True):
            origins = self.leaves(right)
            for leaf in self.leaves(left):
                self.write(leaf, kind, origins)

    def each(self, children: list[int], depth: int) -> None:
        parts = [c for c in children if self.tree.named[c] and not self.is_type(c)]
        if len(parts) < 2:
            self.all(parts, depth)
            return
        self.pairwise(parts[0], parts[1], "computedFrom", depth)
        self.all(parts[2:], depth)

    def branch(self, children: list[int], depth: int) -> None:
        entry, ends, otherwise = dict(self.state), [], False
        for child in children:
            kind = self.tree.kinds[child]
            if kind == "else":
                ends.append(self.state)
                self.state, otherwise = dict(entry), True
            elif kind in ("elif_clause", "else_clause"):
                ends.append(self.state)
                self.state = dict(entry)
                self.read(child, depth + 1)
                otherwise = otherwise or kind == "else_clause"
            else:
                self.read(child, depth + 1)
        ends.append(self.state)
        if not otherwise:
            ends.append(entry)
        merged: dict[str, frozenset[int]] = {}
        for end in ends:
            for name, leaves in end.items():
                merged[name] = merged[name] | leaves if name in merged else leaves
        self.state = merged
