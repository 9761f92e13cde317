"""The largest gaps of every published family, for docs/models.md.

    python benchmarks/families.py

The configurations are those of tests/test_pretrained.py and tests/test_codegen2.py, small and with every
parameter scrambled. In fp32 logits, the output of every layer and all gradients are compared with
transformers, relative to the largest number where that is above 1; in fp64 logits with reference/.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from reference.forward import Rows, logits_of
from reference.published import PublishedWeights
from reference.published_settings import settings_of

test_pretrained, test_codegen2 = map(importlib.import_module, ("test_pretrained", "test_codegen2"))


def gap_to_reference(pair: Any) -> float:
    """Return the largest difference of logits in fp64, relative to the largest, or to 1."""
    model, stored, config = pair.ours.double(), PublishedWeights(pair.folder), settings_of(pair.folder)
    names = [name for name, _ in model.named_parameters()]
    weights = {name: stored.rows(name, 0, stored.shape(name)[0]).double() for name in names}
    tokens = test_pretrained.tokens_of(model)
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        found = logits_of(config, weights, Rows(tokens, positions, torch.zeros_like(tokens)))
        return test_pretrained.gap(model(tokens), found)


def main() -> None:
    gaps: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (family, _)) in enumerate(test_pretrained.CONFIGS.items()):
            pair = test_pretrained.make_pair(name, Path(folder) / str(number))
            largest = max(test_pretrained.parity(pair).values())
            gaps[family].append((largest, gap_to_reference(pair)))
        for number, settings in enumerate(({}, *test_codegen2.OTHERS)):
            pair = test_codegen2.make_pair(Path(folder) / f"codegen2 {number}", **settings)
            largest = max(test_codegen2.parity_of(pair).values())
            gaps["codegen2"].append((largest, gap_to_reference(pair)))
    print("| family | configurations | fp32, transformers | fp64, reference |\n|---|---|---|---|")
    for family, found in gaps.items():
        of_transformers, of_reference = (max(column) for column in zip(*found, strict=True))
        print(f"| `{family}` | {len(found)} | {of_transformers:.0e} | {of_reference:.0e} |")


if __name__ == "__main__":
    main()
