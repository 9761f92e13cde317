"""Train a small base of a published family's architecture: `python recipes/base.py --family phi`.

It is for machines without published weights. The model has every part of its family, at a small size; it
learns the interpreter's standard library within a budget, with a byte-level BPE tokenizer of the same files.
Its folder opens in transformers and as any `--base`. Figures that are measured on it are those of a small
base, never those of the published weights. small_base.py trains it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # `python recipes/base.py` has recipes/ on its path instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import one_sentence
from recipes.base_config import parse_settings


def main(argv: list[str]) -> None:
    """Train the base that the command line names."""
    settings = parse_settings(argv)
    with one_sentence():
        # Imported after the command line was understood, since these import torch.
        from pretrained import load_pretrained
        from recipes.small_base import make_base

        folder = make_base(settings)
        load_pretrained(folder)
        print(f"a small {settings.family} base, trained here on {settings.source}, is in {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
