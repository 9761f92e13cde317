"""Pictures of a run from its metrics.jsonl: loss, learning rate, gradient norm, accuracy."""

from __future__ import annotations

import json
from pathlib import Path

# By file name the label of the y axis, and the tags whose values are drawn.
CURVES = {
    "loss": ("nats a token", ("train/loss", "eval/loss")),
    "learning_rate": ("learning rate", ("train/learning_rate",)),
    "grad_norm": ("gradient norm before clipping", ("train/grad_norm",)),
    "accuracy": ("top-1 accuracy on validation", ("eval/top1",)),
}


def draw_curves(folder: Path) -> list[Path]:
    """Write `curves/NAME.png` for each of CURVES that has data; return their paths."""
    from matplotlib.figure import Figure  # Without pyplot, whose backend and figures are a notebook's own.

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    (folder / "curves").mkdir(exist_ok=True)
    paths = []
    for name, (label, tags) in CURVES.items():
        series = {tag: [(row["step"], row[tag]) for row in rows if tag in row] for tag in tags}
        if not any(series.values()):
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for tag, points in series.items():
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=tag)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / "curves" / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths
