"""Other wordings of the prompts of held-out examples, which show how much a score depends on the wording.

A row of examples may hold, beside the prompt that is trained on, others in a field
`{"prompts": {"verbose": ..., "simple": ...}}`. `python eval.py --run RUN --prompts verbose,simple`
evaluates the same examples with each wording, and so does `--suite examples` of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from data.documents import Document
from suites.scoring import Example


def variant_names(requested: str) -> list[str]:
    """Return the names in `requested`, between commas; ValueError if one is there twice."""
    names = [name.strip() for name in requested.split(",") if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--prompts names {twice[0]} twice: name each once")
    return names


def with_prompts(
    examples: Sequence[Example], documents: Iterable[Document], names: Sequence[str]
) -> dict[str, list[Example]]:
    """Return for each name the examples with their prompt of that name.

    Args:
        examples: Examples of these documents, whose `where` is the document's number.
        documents: The held-out documents of a run, in the order of its store, or those of a file.

    Raises:
        ValueError: An example has no prompt of a name, or it is not text.
    """
    wanted = {example.where for example in examples}
    rows = {number: document for number, document in enumerate(documents) if number in wanted}
    found: dict[str, list[Example]] = {}
    for name in names:
        found[name] = []
        for example in examples:
            document = rows[example.where]
            prompts = document.prompts or {}
            if not isinstance(prompts.get(name), str):
                has = ", ".join(sorted(map(str, prompts))) or "none"
                raise ValueError(
                    f"{document.where} has no prompt called {name!r} in its field prompts (it has {has}): "
                    'give each row {"prompts": {"NAME": "..."}}, or leave --prompts out'
                )
            found[name].append(replace(example, prompt=prompts[name]))
    return found
