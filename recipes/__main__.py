"""Run a recipe from its data to its table: `python -m recipes NAME [--base FOLDER_OR_HUB_ID] [flags]`.

Examples are built, a model is trained on them by the training loop with the settings of recipes/NAME.yaml,
adapter and merged model are written, and the test split is scored beside the base. A step that was finished
from the same inputs is not repeated, so that a run that was killed goes on.
"""

from __future__ import annotations

import sys

from config import one_sentence

RECIPES = {
    "completion": "next tokens of Python files, by a transformer trained from scratch",
    "refactor": "a degraded Python function -> the function as it was",
    "kotlin": "a piece of a Kotlin file -> how it goes on",
    "fastapi": "lines around a gap in FastAPI's documentation code -> the line",
    "summaries": "a Python class -> its docstring",
    "repository": "a git checkout -> what is written in it next",
}


def usage() -> str:
    rows = "\n".join(f"  {name:<12}{what}" for name, what in RECIPES.items())
    return (
        "usage: python -m recipes NAME [--base FOLDER_OR_HUB_ID] [flags of the recipe and of training]\n\n"
        f"{rows}\n\npython -m recipes NAME --help lists the flags of a recipe."
    )


def main(argv: list[str]) -> int:
    """Run the recipe that the command line names; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *words = argv
    if name.startswith("-"):
        print(
            f"error: {name} comes before the recipe's name; write python -m recipes NAME {name} ..., with "
            f"one of {', '.join(RECIPES)}",
            file=sys.stderr,
        )
        return 2
    if name not in RECIPES:
        import difflib

        near = difflib.get_close_matches(name, RECIPES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        print(f"error: there is no recipe {name}; there are {', '.join(RECIPES)}{meant}", file=sys.stderr)
        return 2
    from recipes.pipeline import in_own_words, parse_words, run

    recipe = parse_words(name, words)
    with one_sentence(), in_own_words():
        return run(recipe)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
