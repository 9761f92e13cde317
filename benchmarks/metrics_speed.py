"""Time each metric of texts on pairs of functions of the standard library.

    python benchmarks/metrics_speed.py [--pairs 10000] [--seed 0]

References are functions of 4 to 30 lines. Predictions are such as models make: the function truncated, with
other names, without a line, another function, nothing, or the very same. Metrics that share their work are
timed together, and beside each stands the time for an interval of its most expensive metric. All runs in one
process; on a busy machine the CPU seconds vary less. docs/metrics.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics.registry import METRICS, Metric, Rows, score
from metrics.texts import Pair, cleaned, code_tokens


def functions(folder: Path | None = None) -> Iterator[str]:
    """Yield the functions of 4 to 30 lines of the Python files under a folder, dedented, by name of file."""
    for path in sorted((folder or Path(sysconfig.get_path("stdlib"))).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text("utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                body = lines[node.lineno - 1 : node.end_lineno]
                if 4 <= len(body) <= 30:
                    yield textwrap.dedent("\n".join(body))


def changed(text: str, others: list[str], draw: random.Random) -> str:
    """Return a text that a model might have written for it."""
    kind = draw.random()
    lines = text.split("\n")
    if kind < 0.05:
        return text
    if kind < 0.07:
        return ""
    if kind < 0.25:
        return draw.choice(others)
    if kind < 0.5:
        return "\n".join(lines[: draw.randrange(1, len(lines))])
    if kind < 0.7:
        del lines[draw.randrange(len(lines))]
        return "\n".join(lines)
    names = [token for token in set(code_tokens(text)) if token.isidentifier()]
    for name in draw.sample(sorted(names), min(3, len(names))):
        text = text.replace(name, draw.choice(["value", "x", "result", name[::-1]]))
    return text


def realistic_pairs(n: int, seed: int = 0, folder: Path | None = None) -> list[Pair]:
    """Return n pairs of prediction and reference; functions repeat if there are too few."""
    draw = random.Random(seed)
    known = list(functions(folder))
    references = [draw.choice(known) for _ in range(n)]
    return cleaned([changed(text, known, draw) for text in references], references, "plain")


def main(n: int, seed: int) -> None:
    pairs = realistic_pairs(n, seed)
    characters = sum(len(prediction) + len(reference) for prediction, reference in pairs)
    print(f"{n:,} pairs, {characters:,} characters\n")
    score(list(METRICS), pairs[:2])  # loads imports and grammars
    groups: dict[Rows, list[Metric]] = {}
    for metric in METRICS.values():
        groups.setdefault(metric.rows, []).append(metric)
    print(f"{'seconds':>8} {'CPU':>6} {'interval':>9} {'score':>7}  metric")
    wall = cpu = 0.0
    for metrics in groups.values():
        started, used = time.perf_counter(), time.process_time()
        found = score([metric.name for metric in metrics], pairs)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        wall, cpu = wall + seconds, cpu + used
        started = time.perf_counter()
        found[metrics[-1].name].interval()
        took = time.perf_counter() - started
        print(f"{seconds:8.2f} {used:6.2f} {took:9.2f} {found[metrics[0].name].value:7.2f}  ", end="")
        print(", ".join(metric.name for metric in metrics), flush=True)
    print(f"{wall:8.2f} {cpu:6.2f} {'':17}  all {len(METRICS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.pairs, arguments.seed)
