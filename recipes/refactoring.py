"""Refactor a file with a model of the recipe: `python generate.py --recipe refactor --file F`.

Each function is asked for as in training, and the answer takes its place if it is one function of that name
and, where both can be run, does what the function does. Otherwise the function stays as it was. The
difference is printed as a unified diff; the file is written only with --write.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from config import make_parser, one_sentence, write_atomically
from recipes import refactor
from recipes.behaviour import agreement, context_of
from recipes.degradations import parsed
from recipes.pipeline import Asked
from recipes.refactor import Piece, holds_text_over_lines, pieces, prompt_of


@dataclass(frozen=True)
class RefactorConfig:
    """What is refactored, and by what.

    Args:
        file: The Python file.
        model: A run folder, a model folder or a hub id, as for generate.py; not given, the recipe's own run.
        adapter: A PEFT folder for `model`, which is then a published one.
        write: Write the file instead of only showing what would change.
        max_new_tokens: Most tokens of an answer.
        batch_size: Functions at a time.
        check_behaviour: Run both functions in the sandbox, where that is possible.
        recipe: The recipe that the model was trained by.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    file: str
    model: str = ""
    adapter: str = ""
    write: bool = False
    max_new_tokens: int = 512
    batch_size: int = 8
    check_behaviour: bool = True
    recipe: Literal["refactor"] = "refactor"
    device: str = "auto"


def parse_settings(argv: Sequence[str]) -> RefactorConfig:
    """The RefactorConfig of a command line; a mistake prints one sentence and exits with 2."""
    words = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        words += [word, "true"] if word == "--write" and following.startswith("-") else [word]
    parser = make_parser({"": RefactorConfig}, "Refactor a Python file, function by function.")
    values = parser.parse_args(words).clone(with_meta=False).as_dict()
    values.pop("config", None)
    settings = RefactorConfig(**values)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.model:
        return settings
    if settings.adapter:
        parser.error("no --model is given, and --adapter is for a published one: give its --model")
    run = Asked(settings.recipe, refactor, refactor.Settings(), []).run
    if not run.is_dir():
        parser.error(
            f"no --model is given, and there is no run of the recipe in {run}: train one by "
            "`python -m recipes refactor`, or give --model"
        )
    return replace(settings, model=str(run))


def refactored(
    text: str, answer: Callable[[list[str]], list[str]], check_behaviour: bool = True
) -> tuple[str, Counter[str]]:
    """A file with every function that has a better answer replaced, and what became of each function.

    Args:
        text: Of the file.
        answer: The answers of a model to prompts; it may leave some out with "".
        check_behaviour: Take no answer that, run on generated inputs, does something else.

    Raises:
        ValueError: The file does not parse; or nothing isolates here, and `check_behaviour` is set.
    """
    left_out: Counter[str] = Counter()
    found = pieces(text, left_out)
    became = Counter({"cannot be taken out": left_out.total()}) if left_out else Counter()
    lines = text.split("\n")
    new = answer([prompt_of(piece.source) for piece in found])
    for piece, code in list(zip(found, new, strict=True))[::-1]:  # so that lines above keep their numbers
        put, told = _taken(piece, code, text, check_behaviour)
        became[told] += 1
        if put is not None:
            lines[piece.first - 1 : piece.last] = put
    result = "\n".join(lines)
    ast.parse(result)
    return result, became


def _taken(piece: Piece, code: str, text: str, check_behaviour: bool) -> tuple[list[str] | None, str]:
    """The lines that take a function's place, or None; and what became of it."""
    if not code.strip():
        return None, "too long for the model"
    try:
        function = parsed(code)
    except ValueError:
        return None, "the answer does not parse"
    if function.name != piece.name.rpartition(".")[2]:
        return None, "the answer is another function"
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


def main(argv: Sequence[str]) -> None:
    """Print the diff on the standard output, and on the standard error what became of the functions."""
    settings = parse_settings(argv)
    with one_sentence():
        path = Path(settings.file)
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
        try:
            n = len(pieces(text))
        except ValueError as error:
            raise ValueError(f"{path} cannot be refactored: {error}") from None
        if not n:
            raise ValueError(f"{path} holds no function that can be refactored")
        result, became = refactored(text, _model(settings), settings.check_behaviour)
        names = (str(path), str(path))
        shown = difflib.unified_diff(text.splitlines(True), result.splitlines(True), *names)
        _write("".join(line if line.endswith("\n") else f"{line}\n" for line in shown))
        changed = sum(count for told, count in became.items() if told.startswith("changed"))
        kept = became.total() - changed
        print(f"{became.total()} functions: {changed} changed, {kept} kept as they were", file=sys.stderr)
        for told, count in became.most_common():
            print(f"{count:>6}  {told}", file=sys.stderr)
        if settings.write and changed:
            write_atomically(path, result)
            print(f"written to {path}", file=sys.stderr)


def _write(text: str) -> None:
    from generate import printable

    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _model(settings: RefactorConfig) -> Callable[[list[str]], list[str]]:
    from generate import CommandConfig, GenerationConfig, generate, open_model, prompt_ids

    asked = CommandConfig(
        model=settings.model, prompt=("",), adapter=settings.adapter, device=settings.device
    )
    model, tokenizer = open_model(asked)
    room = model.config.block_size

    def answer(prompts: list[str]) -> list[str]:
        answers = [""] * len(prompts)
        lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
        # An answer is about as long as its question: what leaves no room for that is not asked.
        able = sorted((n for n, length in enumerate(lengths) if 2 * length <= room), key=lambda n: lengths[n])
        for start in range(0, len(able), settings.batch_size):
            batch = able[start : start + settings.batch_size]
            most = min(settings.max_new_tokens, room - max(lengths[n] for n in batch))
            texts = generate(
                model, tokenizer, [prompts[n] for n in batch], GenerationConfig(max_new_tokens=most)
            )
            for n, completion in zip(batch, texts, strict=True):
                answers[n] = completion.text
        return answers

    return answer
