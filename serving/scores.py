"""What is known of how good the served model is: the part of its card on scores, as Markdown.

Of a run it is made from eval.json; of an exported model and of an adapter it stands in README.md, which may
be a stranger's: it is text for the page and nothing else.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from training.model_card import CARD, scores_of_card, scores_of_run
from training.run import TrainedRun

LARGEST, LONGEST = 10_000_000, 20_000  # characters of a card, and of what is shown of it


def known_scores(folder: str, run: TrainedRun | None = None, held: str = "full") -> str:
    """Return what is known of a model or an adapter, in Markdown.

    Args:
        folder: Where its card would be.
        run: The run that the model is of, if it is of one.
        held: The format that the weights are held in. An adapter's are as it was trained on them: `full`.
    """
    text = "" if run is None else scores_of_run(run)
    if run is None:
        path = Path(folder) / CARD
        with contextlib.suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8") as file:
            text = scores_of_card(file.read(LARGEST))
    if not text:
        return "No scores of this model are known here: its folder has no card that Plumb wrote.\n"
    if held != "full":
        text = f"The scores are of weights in their own format; here they are held in {held}.\n\n{text}"
    return text[:LONGEST]
