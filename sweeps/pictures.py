"""Pictures of a study as PNG, one page that holds them all, and the trials for TensorBoard's hparams."""

from __future__ import annotations

import base64
import html
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from config import write_atomically
from sweeps.settings import SweepSettings
from sweeps.study import chosen_of
from sweeps.verdict import short

# Complete trials from which on importances are drawn: with four, a setting that did nothing had 94%.
IMPORTANCES = 10
# Entries of the longest legend, each in its own colour: with 150 trials it was seven times as high as the
# plot.
NAMED = 20


def draw(
    settings: SweepSettings, study: optuna.Study, slots: Mapping[int, FrozenTrial], texts: list[str]
) -> list[Path]:
    """Write pictures/NAME.png, report.html and tensorboard/ into the study's folder; return the PNG paths."""
    folder = settings.sweep.folder
    told = _told(study, slots)
    paths, missing = [], []
    (folder / "pictures").mkdir(exist_ok=True)
    for name, plot in _plots(settings, told).items():
        try:
            path = folder / "pictures" / f"{name}.png"
            _save(plot, path)
            paths.append(path)
        # There may be too few trials for a plot.
        except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
            missing.append(f"{name}: not drawn ({' '.join(str(error).split())})")
    write_atomically(folder / "report.html", page(settings.sweep.name, texts + missing, paths))
    write_hparams(settings, slots, folder / "tensorboard")
    return paths


def _told(study: optuna.Study, slots: Mapping[int, FrozenTrial]) -> optuna.Study:
    """Return a study in memory with one record for each slot, without attempts that were left behind."""
    told = optuna.create_study(directions=study.directions)
    for record in slots.values():
        told.add_trial(record)
    return told


def _plots(settings: SweepSettings, study: optuna.Study) -> dict[str, Callable[[], Any]]:
    from optuna.visualization import matplotlib as plot

    names = list(settings.sweep.objectives)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=True)

    def first(trial: FrozenTrial) -> float:
        return trial.values[0]

    target = first if len(names) > 1 else None
    plots: dict[str, Callable[[], Any]] = {
        "history": lambda: plot.plot_optimization_history(study, target=target, target_name=names[0]),
        "parallel": lambda: plot.plot_parallel_coordinate(study, target=target, target_name=names[0]),
        "slices": lambda: plot.plot_slice(study, target=target, target_name=names[0]),
    }
    whole = sum(trial.state == TrialState.COMPLETE for trial in study.trials)
    if whole >= IMPORTANCES:
        plots["importances"] = lambda: plot.plot_param_importances(
            study, evaluator=evaluator, target=target, target_name=names[0]
        )
    if len(names) == 1:
        plots["intermediate"] = lambda: plot.plot_intermediate_values(study)
    elif len(names) < 4:
        plots["front"] = lambda: plot.plot_pareto_front(study, target_names=names)
    return plots


def _save(plot: Callable[[], Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that the plots are experimental.
        try:
            plot()
            figure = pyplot.gcf()
            if not figure.axes or not any(axes.has_data() for axes in figure.axes):
                raise ValueError("there are too few trials")
            for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
                if len(legend.get_texts()) > NAMED:
                    legend.remove()
            figure.savefig(path, dpi=110, bbox_inches="tight")
        finally:
            pyplot.close("all")


def page(title: str, texts: list[str], pictures: list[Path]) -> str:
    """Return one HTML file that needs no other: the texts, then the pictures."""
    shown = "".join(f"<pre>{html.escape(text)}</pre>\n" for text in texts if text)
    images = "".join(
        f'<h2>{html.escape(path.stem)}</h2>\n<img alt="{html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">\n'
        for path in pictures
    )
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto}pre{overflow-x:auto}img{max-width:100%}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{style}</style>\n<h1>{html.escape(title)}</h1>\n{shown}{images}</html>\n"
    )


def write_hparams(settings: SweepSettings, slots: Mapping[int, FrozenTrial], folder: Path) -> None:
    """Write a TensorBoard run for each trial that has values, with its settings and results."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for slot, record in slots.items():
            if record.state != TrialState.COMPLETE:
                continue
            values = {f"sweep/{n}": v for n, v in zip(settings.sweep.objectives, record.values, strict=True)}
            chosen = chosen_of(settings, record.params).items()
            plain = {k: v if isinstance(v, (bool, int, float, str)) else short(v) for k, v in chosen}
            writer.add_hparams(plain, values, run_name=f"{slot:04}")
