"""Refactor a file with a model of the recipe: `python generate.py --recipe refactor --file F`.

The model gets each function in the prompt of training. Its answer replaces the function if it is one function
of that name with the same parameters and decorators, uses no name that the file does not have and, where both
can be run, does what the function does. Otherwise the function stays as it was. The difference is printed as
a unified diff; the file is written only with --write.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import io
import os
import symtable
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import config
import sandbox
from config import one_sentence, option, write_atomically
from config.console import printable, refuse
from recipes import refactor
from recipes.behaviour import agreement, context_of
from recipes.functions import Function, Scope, globals_of, parsed, unwritable
from recipes.pipeline import RequestedRecipe
from recipes.refactor import Piece, holds_text_over_lines, pieces, prompt_of


@dataclass(frozen=True)
class RefactorConfig:
    """Settings of the refactoring of a file.

    Args:
        file: The Python file.
        model: A run folder, a model folder or a hub id, as for generate.py; by default the recipe's own run.
        adapter: A PEFT folder for `model`, which is then a published one.
        write: Write the file instead of only showing what would change.
        max_new_tokens: Most tokens of an answer.
        batch_size: Number of functions that are completed at a time.
        check_behaviour: Run both functions in the sandbox, where that is possible.
        recipe: The recipe by which the model was trained.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    file: str
    model: str = option("", also=("run",))
    adapter: str = ""
    write: bool = False
    max_new_tokens: int = 512
    batch_size: int = 8
    check_behaviour: bool = True
    recipe: Literal["refactor"] = "refactor"
    device: str = "auto"


def parse_settings(argv: Sequence[str]) -> RefactorConfig:
    """Return the RefactorConfig of a command line; a mistake prints one sentence and exits with 2."""
    settings = config.parse_settings(RefactorConfig, argv, "Refactor a Python file, function by function.")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(settings, name) < 1:
            refuse(f"--{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.model:
        return settings
    if settings.adapter:
        refuse("no --model is given, and --adapter is for a published one: give its --model")
    run = RequestedRecipe(settings.recipe, refactor, refactor.RefactorSettings(), []).run
    if not run.is_dir():
        refuse(
            f"no --model is given, and there is no run of the recipe in {run}: train one by "
            "`python -m recipes refactor`, or give --model"
        )
    return replace(settings, model=str(run))


class Rewrite(NamedTuple):
    """A model's answer, or the reason why there is none."""

    code: str
    problem: str = ""


def plain(text: str) -> tuple[str, Callable[[str], str]]:
    """Return a file's text as `pieces` reads it, and a function that restores its mark and line ends."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    body = text.removeprefix(mark)
    end = "\r\n" if 0 < body.count("\r\n") == body.count("\n") == body.count("\r") else "\n"
    return body.replace(end, "\n"), lambda other: mark + other.replace("\n", end)


def taken_out(text: str) -> tuple[list[Piece], Counter[str]]:
    """Return the functions of a file, and the counts of those that cannot be taken out, by reason.

    Raises:
        ValueError: The file does not parse, or no function can be taken out.
    """
    left_out: Counter[str] = Counter()
    found = pieces(text, left_out)
    if not found:
        why = "".join(f"; {n} cannot be taken out: {reason}" for reason, n in left_out.items())
        raise ValueError(f"it holds no function that can be refactored{why}")
    return found, left_out


def refactored(
    text: str, answer: Callable[[list[str]], list[Rewrite]], check_behaviour: bool = True
) -> tuple[str, Counter[str]]:
    """Return a file with the functions that have an acceptable answer replaced, and counts of all outcomes.

    Args:
        text: The file's text.
        answer: A function that returns a model's answers to prompts.
        check_behaviour: Accept no answer that behaves differently on generated inputs.

    Raises:
        ValueError: The file does not parse, or has no function that can be taken out; or nothing isolates
            here, and `check_behaviour` is set.
    """
    text, restored = plain(text)
    found, left_out = taken_out(text)
    became = Counter({f"cannot be taken out: {reason}": n for reason, n in left_out.items()})
    lines = text.split("\n")
    new = answer([prompt_of(piece.source) for piece in found])
    for piece, one in list(zip(found, new, strict=True))[
        ::-1
    ]:  # The last place first: lines above keep their numbers.
        put, told = _taken(piece, one, text, check_behaviour)
        became[told] += 1
        if put is not None:
            lines[piece.first - 1 : piece.last] = put
    result = "\n".join(lines)
    ast.parse(result)
    return restored(result), became


def _taken(piece: Piece, answer: Rewrite, text: str, check_behaviour: bool) -> tuple[list[str] | None, str]:
    """Return the lines that replace a function, or None; and the outcome in words."""
    code = answer.code
    if answer.problem:
        return None, answer.problem
    if not code.strip():
        return None, "the answer is empty"
    try:
        function = parsed(code)
    except ValueError:
        return None, "the answer does not parse"
    if function.name != piece.name.rpartition(".")[2]:
        return None, "the answer is another function"
    if "\r" in code or "\f" in code:
        return None, "the answer has unusual line ends"
    if reason := unwritable(function):
        return None, f"the answer holds {reason}"
    if told := other_interface(parsed(piece.source), function):
        return None, told
    if globals_of(code) - globals_of(piece.source) - _names_of(text, code):
        return None, "the answer takes a name that the file does not have"
    if piece.indent and holds_text_over_lines(function):
        return None, "the answer holds text over lines"
    if code.rstrip() == piece.source.rstrip():
        return None, "the answer is the function as it was"
    told = "changed, and not run"
    if check_behaviour:
        judgement = agreement(piece.source, code, context_of(text, piece.source))
        if judgement.kind == "differs":
            return None, "the answer does something else"
        told = "changed, and does the same when run" if judgement.kind == "agrees" else told
    put = [piece.indent + line if line.strip() else line for line in code.rstrip().split("\n")]
    return put, told


def other_interface(before: Function, after: Function) -> str:
    """Return why another function cannot be called or used as the first one; "" if it can.

    The comparison is of names, kinds and order of parameters, which callers may spell, their defaults, the
    decorators, and whether a call returns a value, an iterator or a coroutine. Hints may differ.
    """

    def parameters(function: Function) -> list[list[str]]:
        a = function.args
        kinds = [a.posonlyargs, a.args, [a.vararg], a.kwonlyargs, [a.kwarg]]
        return [[one.arg for one in kind if one] for kind in kinds]

    def defaults(function: Function) -> list[str]:
        a = function.args
        return [ast.dump(one) if one else "" for one in [*a.defaults, *a.kw_defaults]]

    def decorators(function: Function) -> list[str]:
        return [ast.dump(one) for one in function.decorator_list]

    def gives(function: Function) -> tuple[bool, bool]:
        return isinstance(function, ast.AsyncFunctionDef), _yields(function)

    for what, of in {
        "other parameters": parameters,
        "other defaults": defaults,
        "other decorators": decorators,
    }.items():
        if of(before) != of(after):
            return f"the answer has {what}"
    return "" if gives(before) == gives(after) else "the answer gives a value, iterator or coroutine instead"


def _yields(function: Function) -> bool:
    below: list[ast.AST] = list(function.body)
    for node in below:
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, Scope):
            below += ast.iter_child_nodes(node)
    return False


def _names_of(text: str, code: str) -> set[str]:
    """Return the names that a function of a file may use: builtins, and the names that the module binds.

    Args:
        text: The file's text.
        code: The function's text. Where the module imports `*`, the result has all of its names.
    """
    symbols = symtable.symtable(text, "file", "exec").get_symbols()
    found = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Global):
            found.update(node.names)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= globals_of(code)
    return found | {*dir(builtins), "__file__", "__class__"}


def main(argv: Sequence[str]) -> None:
    """Print the diff on the standard output, and the outcome of each function on the standard error."""
    settings = parse_settings(argv)
    with one_sentence():
        path = Path(settings.file)
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
        try:
            taken_out(plain(text)[0])  # A file without functions is refused before a model is opened.
        except ValueError as error:
            raise ValueError(f"{path} cannot be refactored: {error}") from None
        if settings.check_behaviour:
            sandbox.isolation()
        result, became = refactored(text, _model(settings), settings.check_behaviour)
        _write(diff(text, result, str(path)))
        changed = sum(count for told, count in became.items() if told.startswith("changed"))
        kept = became.total() - changed
        print(f"{became.total()} functions: {changed} changed, {kept} kept as they were", file=sys.stderr)
        for told, count in became.most_common():
            print(f"{count:>6}  {told}", file=sys.stderr)
        if settings.write and changed:
            _replace(path, result)
            print(f"written to {path}", file=sys.stderr)


def diff(before: str, after: str, name: str) -> str:
    """Return a unified diff for `git apply`, in which lines end at line feeds alone."""
    one, other = (io.StringIO(text, newline="\n").readlines() for text in (before, after))
    lines = difflib.unified_diff(one, other, name, name)
    unended = "\n\\ No newline at end of file\n"
    return "".join(line if line.endswith("\n") else line + unended for line in lines)


def _replace(path: Path, text: str) -> None:
    """Write a file and keep its mode; of a link, write the file that it leads to."""
    path = path.resolve()
    mode = path.stat().st_mode
    write_atomically(path, text)
    os.chmod(path, mode)


def _write(text: str) -> None:
    shown = printable(text) if sys.stdout.isatty() else text
    sys.stdout.buffer.write(shown.encode("utf-8", "surrogatepass"))
    sys.stdout.flush()


def _model(settings: RefactorConfig) -> Callable[[list[str]], list[Rewrite]]:
    from generation.command import open_model
    from generation.settings import CommandConfig, GenerationConfig
    from generation.text import generate

    command = CommandConfig(
        model=settings.model, prompt=("",), adapter=settings.adapter, device=settings.device
    )
    model, tokenizer = open_model(command)
    room = model.config.block_size

    def answer(prompts: list[str]) -> list[Rewrite]:
        answers = [Rewrite("", "too long for the model")] * len(prompts)
        lengths = [len(tokenizer.prompt_ids(prompt)) for prompt in prompts]
        # An answer is about as long as its prompt: a prompt that leaves no room is not completed.
        able = sorted((n for n, length in enumerate(lengths) if 2 * length <= room), key=lambda n: lengths[n])
        for start in range(0, len(able), settings.batch_size):
            batch = able[start : start + settings.batch_size]
            most = min(settings.max_new_tokens, room - max(lengths[n] for n in batch))
            texts = generate(
                model, tokenizer, [prompts[n] for n in batch], GenerationConfig(max_new_tokens=most)
            )
            for n, completion in zip(batch, texts, strict=True):
                cut = "the answer is cut off, by --max_new_tokens or the model's context"
                answers[n] = Rewrite(completion.text, cut if completion.finish_reason == "length" else "")
        return answers

    return answer
