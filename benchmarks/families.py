"""The largest gaps of every published family, and what is equal beside them, for docs/models.md.

    python benchmarks/families.py [FAMILY ...]

The configurations are those of tests/test_pretrained.py and tests/test_codegen2.py, small and with every
parameter scrambled. In fp32 logits, the output of every layer and all gradients are compared with
transformers, relative to the largest number where that is above 1; in fp64 logits with reference/.

tokens      how many of them choose the tokens of transformers, greedily and by three beams
adapters    exchanges with PEFT of tests/test_adapter.py, in either direction, with equal logits and gradients
GGUF        models of tests/gguf_models.py in 16 bits, read by the llama-server on the PATH with equal ids,
            and greedy tokens that are the model's or within rounding of it; `-` where llama.cpp has no form
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from guards.faults import Fault
from guards.llama_server import SERVER
from reference.forward import Rows, logits_of
from reference.published import PublishedWeights
from reference.published_settings import settings_of

test_pretrained, test_codegen2, test_families, test_adapter, test_llama_cpp, gguf_models = map(
    importlib.import_module,
    ("test_pretrained", "test_codegen2", "test_families", "test_adapter", "test_llama_cpp", "gguf_models"),
)


LEAST_TOKENS = 10  # A search of transformers by three beams needs some tokens to choose from.


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


def holds(check: Callable[..., object], *arguments: Any) -> bool:
    """Return whether a test passes; what is wrong goes to the standard error."""
    try:
        check(*arguments)
    except (AssertionError, ValueError, Fault) as error:
        print(f"{check.__name__}: {error}", file=sys.stderr)
        return False
    return True


def same_tokens(pair: Any) -> bool:
    """Return whether greedy tokens and those of beams are transformers'."""
    check = test_families.test_greedy_and_beam_tokens_are_those_of_transformers
    return holds(check, "", lambda _: pair)


def adapters_exchanged(family: str, folder: Path) -> list[bool]:
    """Return for each exchange of an adapter with PEFT, in either direction, whether it is the same."""
    found = []
    if family == "codegen2":
        (place := folder / "adapter").mkdir()
        return [holds(test_codegen2.test_an_adapter_means_the_same_both_ways, place)]

    def bases(name: str) -> Any:
        oracle = test_pretrained.make_oracle(name)
        oracle.save_pretrained(folder / name)
        opened = test_adapter.load_pretrained(folder / name)
        return test_adapter.Pair(test_pretrained.make_oracle(name), opened.model, opened.family)

    for case, (name, _) in test_adapter.CASES.items():
        if test_pretrained.CONFIGS[name][0] == family:
            for number, check in enumerate(
                (
                    test_adapter.test_an_adapter_of_peft_is_the_same_here,
                    test_adapter.test_an_adapter_of_ours_is_the_same_in_peft,
                )
            ):
                place = folder / f"{case} {number}"
                place.mkdir()
                found.append(holds(check, bases, place, case))
    return found


def read_by_llama_cpp(family: str, folder: Path) -> list[bool]:
    """Return for each model that is written as GGUF whether llama.cpp has its ids and tokens."""
    models = {name: settings for name, (own, settings) in gguf_models.MODELS.items() if own == family}
    return [
        holds(test_llama_cpp.asked, settings, folder / f"{name}.gguf", "f16", test_llama_cpp.SMALL, family)
        for name, settings in models.items()
    ]


def counted(found: list[bool]) -> str:
    """Return how many are true of how many."""
    return f"{sum(found)} of {len(found)}" if found else "-"


def pairs_of(family: str, folder: Path) -> list[Any]:
    """Return our model and transformers' of each configuration of a family."""
    if family == "codegen2":
        shapes = ({}, *test_codegen2.OTHERS)
        return [test_codegen2.make_pair(folder / f"{n}", **shape) for n, shape in enumerate(shapes)]
    names = [name for name, (own, _) in test_pretrained.CONFIGS.items() if own == family]
    return [test_pretrained.make_pair(name, folder / f"{n}") for n, name in enumerate(names)]


def main(families: list[str]) -> None:
    served = shutil.which(SERVER) is not None
    print(
        "| family | configurations | fp32, transformers | fp64, reference | tokens | adapters | GGUF |\n"
        "|---|---|---|---|---|---|---|"
    )
    known = dict.fromkeys([*(own for own, _ in test_pretrained.CONFIGS.values()), "codegen2"])
    for family in families or known:
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
            folder = Path(temporary)
            pairs = pairs_of(family, folder)
            parity = test_codegen2.parity_of if family == "codegen2" else test_pretrained.parity
            of_transformers = max(max(parity(pair).values()) for pair in pairs)
            tokens = [same_tokens(pair) for pair in pairs if pair.ours.config.vocab_size >= LEAST_TOKENS]
            of_reference = max(gap_to_reference(pair) for pair in pairs)  # It makes the models fp64.
            adapters = adapters_exchanged(family, folder)
            read = counted(read_by_llama_cpp(family, folder)) if served else "not asked"
        print(
            f"| `{family}` | {len(pairs)} | {of_transformers:.0e} | {of_reference:.0e} | {counted(tokens)} | "
            f"{counted(adapters)} | {read} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
