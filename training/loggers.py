"""The loggers of a run beside its metrics.jsonl: TensorBoard, and on request Weights & Biases and MLflow.

    --log tensorboard,wandb,mlflow

A logger decides nothing of a run, so that none may end or delay one. Each works in a thread of its own; when
it fails, or its server does not answer, that is one warning, and training goes on without it. Nothing leaves
the machine unless the user's environment says so: wandb is offline unless WANDB_MODE says otherwise, mlflow
writes files into the run's folder unless MLFLOW_TRACKING_URI names a server, and neither reports on itself.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from tqdm import tqdm

from config import Config, write_atomically
from config.console import for_shell, one_line
from config.schema import flat

PATIENCE = 30.0  # Seconds that the end of a run waits for a logger to take what is left.
MLFLOW_PARAMETERS = 100  # The most settings that MLflow takes at a time.


class Logger(Protocol):
    """What takes the values of a run; it is made, called and closed in a thread of its own."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def summarise(self, step: int, values: Mapping[str, float]) -> None:
        """Take the closing scores, of the checkpoint of a step."""
        ...

    def close(self, failed: bool) -> None: ...


class TensorBoardLogger:
    """Event files in RUN/tensorboard; closing scores stand in eval.json alone."""

    def __init__(self, folder: Path, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def summarise(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandbLogger:
    """A run of Weights & Biases in RUN/wandb, of the values alone: no code, machine or output is recorded."""

    def __init__(self, folder: Path, config: Config, step: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # It is read when wandb is imported.
        import wandb  # pyright: ignore[reportMissingImports]

        # The folder of each stretch of a run is named by its second: two in one second would be one.
        while [*folder.glob(f"wandb/*-{time.strftime('%Y%m%d_%H%M%S')}-*")]:
            time.sleep(0.1)
        known = saved_id(folder, "wandb")
        self.run = wandb.init(
            dir=str(folder),
            id=known or uuid.uuid4().hex,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "plumb"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
            config=config.to_dict(),
            allow_val_change=True,
            reinit="create_new",  # A notebook may have a run of its own.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        save_id(folder, "wandb", self.run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def summarise(self, step: int, values: Mapping[str, float]) -> None:
        self.run.summary.update({"step": step, **values})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MlflowLogger:
    """A run of MLflow, in the files of RUN/mlruns or on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, config: Config, step: int):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # It is read when mlflow is imported.
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # Of MLflow 3, which prefers a database.
            uri = str((folder / "mlruns").resolve())
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient(uri)
        known = saved_id(folder, "mlflow")
        if known is not None:
            self.id = known
            self.client.update_run(self.id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "plumb")
        found = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if found is None else found.experiment_id
        run_name = os.environ.get("MLFLOW_RUN_NAME", folder.resolve().name)
        self.id = self.client.create_run(experiment, run_name=run_name).info.run_id
        save_id(folder, "mlflow", self.id)
        # Only here: of a run that goes on MLflow would refuse a setting that was changed.
        settings = [Param(key, str(value)) for key, value in flat(config).items()]
        for start in range(0, len(settings), MLFLOW_PARAMETERS):
            self.client.log_batch(self.id, params=settings[start : start + MLFLOW_PARAMETERS])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(key, value, now, step) for key, value in values.items()])

    def summarise(self, step: int, values: Mapping[str, float]) -> None:
        self.write(step, values)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


# By name, as `--log` has it, what makes the logger of a run's folder and settings after some steps.
LOGGERS: dict[str, Callable[[Path, Config, int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def refuse_unusable(names: Iterable[str]) -> None:
    """Raise a ValueError for a logger that nobody knows, or whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            near = "".join(difflib.get_close_matches(name, LOGGERS, n=1))
            meant = f"; did you mean {near}?" if near else ""
            raise ValueError(f"log holds {name!r}, and the loggers are {', '.join(LOGGERS)}{meant}")
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # A folder ./wandb, as wandb makes them, has no origin.
            raise ValueError(
                f"--log {name} needs the package {name}, which is not installed: pip install {name}, or "
                f"leave {name} out of --log"
            )


def places(names: Collection[str], folder: Path) -> list[str]:
    """Return the lines that say where the loggers of a run are looked at."""
    lines = {"tensorboard": f"TensorBoard  tensorboard --logdir {for_shell(str(folder / 'tensorboard'))}"}
    run = for_shell(str(folder))
    if os.environ.get("WANDB_MODE", "offline") == "offline":
        lines["wandb"] = f"wandb        wandb sync {run}/wandb/offline-run-*"
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        lines["mlflow"] = (
            f"mlflow       MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {run}/mlruns"
        )
    return [line for name, line in lines.items() if name in names]


# --- the id by which a resumed run goes on in the same run of a logger -----------------------------


def saved_id(folder: Path, name: str) -> str | None:
    """Return the id that the run has in a logger; None before it has one.

    Raises:
        ValueError: The file holds something else; it may be a stranger's.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text("utf-8"))
    known = values.get("id") if isinstance(values, dict) else None
    if not isinstance(known, str) or not re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
        raise ValueError(f"{path} holds no id; remove it, and the run begins anew there")
    return known


def save_id(folder: Path, name: str, known: str) -> None:
    """Write down the id that the run has in a logger."""
    write_atomically(folder / f"{name}.json", json.dumps({"id": known}))


# --- a logger in a thread of its own ---------------------------------------------------------------


class Courier:
    """A logger in a thread of its own. It may fail, once, and what comes after that is not logged there.

    Args:
        name: The name of the logger.
        start: Makes it.
    """

    def __init__(self, name: str, start: Callable[[], Logger]):
        self.name, self.failed = name, False
        self._jobs: SimpleQueue[Callable[[Logger], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"log-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on what was logged of a step."""
        self._tell(lambda logger: logger.write(step, values))

    def summarise(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the closing scores."""
        self._tell(lambda logger: logger.summarise(step, values))

    def finish(self, failed: bool) -> None:
        """Say that nothing more comes."""
        self._tell(lambda logger: logger.close(failed))
        self._jobs.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the logger has taken everything, but for no more than so many seconds."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._fail(f"it has not taken everything after {PATIENCE:.0f} s")

    def _tell(self, job: Callable[[Logger], None]) -> None:
        if not self.failed:
            self._jobs.put(job)

    def _work(self, start: Callable[[], Logger]) -> None:
        try:
            logger = start()
            for job in iter(self._jobs.get, None):
                job(logger)
        except (Exception, SystemExit) as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            words = f"warning: the logger {self.name} failed, and training goes on without it: "
            tqdm.write(f"{words}{one_line(without_secrets(reason))}", file=sys.stderr)


def couriers(
    names: Iterable[str], folder: Path, config: Config, step: int, leave_out: Collection[str] = ()
) -> list[Courier]:
    """Start the loggers of these names, but for some."""
    return [
        Courier(name, partial(LOGGERS[name], folder, config, step))
        for name in dict.fromkeys(names)
        if name not in leave_out
    ]


def close(couriers: Collection[Courier], failed: bool) -> None:
    """Wait until all loggers have taken everything, but for no more than PATIENCE seconds together."""
    for one in couriers:
        one.finish(failed)
    deadline = time.monotonic() + PATIENCE
    for one in couriers:
        one.wait(deadline - time.monotonic())


def log_scores(
    folder: Path, config: Config, step: int, scores: dict[str, Any], leave_out: Collection[str]
) -> None:
    """Hand the closing scores of a run to its loggers.

    Args:
        step: That of the checkpoint that was scored.
        scores: What eval.json holds.
        leave_out: Names of loggers that failed before.
    """
    loggers = couriers(config.train.log, folder, config, step, {"tensorboard", *leave_out})
    for one in loggers:
        one.summarise(step, closing_values(scores))
    close(loggers, failed=False)


def closing_values(scores: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation by their tags: `test/loss`, `test/n-gram/loss`, `next_line/...`."""
    found = {scores["side"]: {name: scores[name] for name in ("model", "base", "n-gram") if name in scores}}
    for record in [scores[key] for key in ("suite",) if key in scores] + scores.get("more_suites", []):
        found[record["suite"]] = {
            system: {name: one["mean"] for name, one in by_name.items()}
            for system, by_name in record["scores"].items()
        }
    return {
        "/".join([group, *([] if system == "model" else [system]), name]): float(value)
        for group, systems in found.items()
        for system, by_name in systems.items()
        for name, value in by_name.items()
        if isinstance(value, int | float)
    }


def without_secrets(text: str) -> str:
    """Return a text without the passwords of addresses, and without the secrets of the environment."""
    secret = "key|token|pass|secret|credential"
    # The longest values first: one may be the beginning of another.
    for name, value in sorted(os.environ.items(), key=lambda pair: -len(pair[1])):
        if len(value) >= 6 and re.search(secret, name, re.IGNORECASE):
            text = text.replace(value, "***")
    text = re.sub(r"://\S*@", "://***@", text)  # Up to the last @: a password may hold one, or a slash.
    text = re.sub(rf"(?i)([?&][^=&\s]*({secret}|pwd|auth)[^=&\s]*=)[^&\s]+", r"\1***", text)
    return re.sub(r"(?i)(authorization\W+)(\w+\s+)?[^\s'\"]+", r"\1\2***", text)
