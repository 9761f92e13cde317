"""The loggers of a run: what they get, and that none of them can end, delay or change a run."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_api import SETTINGS, interrupted_at, lines, numbers, weights, with_code

from config import Config, TrainConfig
from config.files import REPOSITORY
from training import loggers
from training.api import Run, train
from training.log import Log
from training.loggers import (
    LOGGERS,
    Courier,
    close,
    closing_values,
    refuse_unusable,
    saved_id,
    without_secrets,
)

pytestmark = pytest.mark.usefixtures("unguarded")

Rows = dict[int, dict[str, float]]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


with_wandb = pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")
with_mlflow = pytest.mark.skipif(not installed("mlflow"), reason="mlflow is not installed")


def logged(folder: Path) -> Rows:
    """The values of a run's metrics.jsonl by their step."""
    rows: Rows = {}
    for row in Run(folder).log:
        rows.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if k != "step"})
    return rows


# --- what they get ---------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log (blocks of 2**15 bytes) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # A record that is whole, or the last part of one.
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_run(folder: Path) -> tuple[Rows, dict[str, Any], dict[str, Any], set[str]]:
    """The history, the summary, the settings and the ids that a run left in its offline folders."""
    rows, summary, config, ids = {}, {}, {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                config |= {one.key: json.loads(one.value_json) for one in record.run.config.update if one.key}
            elif kind == "history":
                items = record.history.item
                found = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
                rows.setdefault(found.pop("_step"), {}).update(
                    {key: value for key, value in found.items() if not key.startswith("_")}
                )
            elif kind == "summary":
                items = record.summary.update
                summary |= {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
    return rows, summary, config, ids


def mlflow_run(folder: Path) -> tuple[Rows, Any]:
    """The metrics that a run left in its files of MLflow by their step, and the one run there."""
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient(str(folder / "mlruns"))
    experiment = client.get_experiment_by_name("plumb")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    rows: Rows = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            rows.setdefault(metric.step, {})[key] = metric.value
    return rows, run


def tensorboard_run(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    rows: Rows = {}
    for tag in found.Tags()["scalars"]:
        for event in found.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return rows


@with_wandb
@with_mlflow
def test_all_get_the_same_values_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(with_code(tmp_path / "plain"))
    train(**SETTINGS, log=[])
    assert not Path("run/tensorboard").exists()
    monkeypatch.chdir(with_code(tmp_path / "logged"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, step=1)
        train(**SETTINGS, log=list(LOGGERS))
    train(run="run", resume=True)
    run, expected = Path("run"), logged(Path("run"))
    assert sorted(expected) == [1, 2, 3, 4]

    assert lines(Path()) == lines(tmp_path / "plain"), "a logger changes nothing of a run"
    assert weights(Path()) == weights(tmp_path / "plain")
    closing = closing_values(Run(run).scores)
    assert closing == closing_values(numbers(Run(tmp_path / "plain" / "run").scores))
    assert {"test/loss", "test/n-gram/loss", "next_line/exact_match", "next_line/copy/exact_match"} <= {
        *closing
    }

    shown = tensorboard_run(run)
    assert {step: shown[step].keys() for step in shown} == {step: expected[step].keys() for step in expected}
    for step, row in expected.items():
        assert shown[step] == pytest.approx(row, rel=1e-6), "event files have single precision"

    rows, summary, config, ids = wandb_run(run)
    assert rows == expected and ids == {saved_id(run, "wandb")}
    assert closing.items() <= summary.items()
    assert config["model"]["n_embd"] == 16 and config["max_steps"] == 4

    rows, found = mlflow_run(run)
    steps = {step: {k: v for k, v in row.items() if k not in closing} for step, row in rows.items()}
    assert {step: row for step, row in steps.items() if row} == expected
    assert {k: v for row in rows.values() for k, v in row.items() if k in closing} == closing
    assert found.info.run_id == saved_id(run, "mlflow") and found.info.status == "FINISHED"
    assert found.data.params["model.n_embd"] == "16" and found.data.params["max_steps"] == "4"


# --- how they fail ---------------------------------------------------------------------------------

SECRET = "0123456789abcdef"
REASON = f"http://me:hunter22@host/x said no to {SECRET}"


class Fails:
    """A logger that fails in one of its four moments, or hangs in it until the test ends."""

    ended = threading.Event()

    def __init__(self, folder: Path, config: Config, step: int, moment: str, how: str):
        self.moment, self.how = moment, how
        self._at("start")

    def _at(self, moment: str) -> None:
        if moment == self.moment and self.how == "hangs":
            self.ended.wait()
        elif moment == self.moment:
            raise {"raises": RuntimeError, "full disk": OSError, "exits": SystemExit}[self.how](REASON)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._at("write")

    def summarise(self, step: int, values: Mapping[str, float]) -> None:
        self._at("summarise")

    def close(self, failed: bool) -> None:
        self._at("close")


def failing(patch: pytest.MonkeyPatch, moment: str, how: str) -> None:
    patch.setitem(LOGGERS, "wandb", lambda folder, config, step: Fails(folder, config, step, moment, how))
    if how == "hangs":
        patch.setattr(loggers, "PATIENCE", 0.1)
    patch.setattr(Fails, "ended", threading.Event())
    patch.setenv("SOME_API_KEY", SECRET)


def settings(*names: str) -> Config:
    return Config(train=TrainConfig(log=names))


@pytest.mark.parametrize("how", ["raises", "full disk", "exits", "hangs"])
@pytest.mark.parametrize("moment", ["start", "write", "close"])
def test_a_logger_that_fails_is_one_warning_without_secrets(
    moment: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, moment, how)
    others = () if how == "hangs" else ("tensorboard",)  # It has no time then, too.
    with Log(tmp_path, 0, settings(*others, "wandb")) as log:
        for step in (1, 2, 3):
            log.write(step, {"train/loss": float(step)})
    Fails.ended.set()
    assert [row["step"] for row in Run(tmp_path).log] == [1, 2, 3]
    assert not others or sorted(tensorboard_run(tmp_path)) == [1, 2, 3], "the others go on"
    assert log.failed_loggers() == {"wandb"}
    said = capsys.readouterr().err
    assert said.count("warning: the logger wandb failed, and training goes on without it: ") == 1
    assert said.count("\n") == 1 and "hunter22" not in said and SECRET not in said
    assert how == "hangs" or "://***@host/x said no to ***" in said


@pytest.mark.parametrize("moment", ["start", "summarise"])
def test_a_run_ends_well_whose_logger_fails(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, moment, "raises")
    monkeypatch.setattr(loggers, "refuse_unusable", lambda names: None)
    monkeypatch.setattr("training.beforehand.refuse_unusable", lambda names: None)
    monkeypatch.chdir(with_code(tmp_path / "here"))
    run = train(**SETTINGS, log=["wandb"])
    assert run.scores["step"] == 4
    assert capsys.readouterr().err.count("warning: the logger wandb failed") == 1


def test_a_full_disk_under_tensorboard_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with Log(tmp_path, 0, settings("tensorboard")) as log:
        log.write(1, {"train/loss": 1.0})
    assert capsys.readouterr().err.count("warning: the logger tensorboard failed") == 1


def test_how_a_run_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Told(Fails):
        def close(self, failed: bool) -> None:
            told.append(failed)

    monkeypatch.setitem(LOGGERS, "wandb", lambda folder, config, step: Told(folder, config, step, "", ""))
    with Log(tmp_path, 0, settings("wandb")):
        pass
    with pytest.raises(ValueError), Log(tmp_path, 0, settings("wandb")):
        raise ValueError
    assert told == [False, True]


def test_values_come_in_their_order_and_all_before_the_end() -> None:
    seen: list[int] = []

    class Slow(Fails):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            seen.append(step)

    one = Courier("slow", lambda: Slow(Path(), Config(), 0, "", ""))
    for step in range(1000):
        one.write(step, {})
    close([one], failed=False)
    assert seen == list(range(1000)) and not one.failed


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "DB_PASS", "AWS_CREDENTIAL", "my_api_key"])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Pool: https://user:pass@host:5000/api with swordfish", "Pool: https://***@host:5000/api with ***"),
        ("postgres://u:p@ss@host said no", "postgres://***@host said no"),
        ("mysql://u:pa/ss@host/db", "mysql://***@host/db"),
        ("GET https://host/api?api_key=abc&run=3", "GET https://host/api?api_key=***&run=3"),
        ("https://host/?run=3&sslpassword=abc def", "https://host/?run=3&sslpassword=*** def"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("a\nswordfish\nb", "a\n***\nb"),
        ("https://host/runs?x=1 is away", "https://host/runs?x=1 is away"),
    ],
)
def test_secrets_are_left_out(name: str, text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "swordfish")
    assert without_secrets(text) == shown


def test_loggers_that_hang_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what the others have left of the time."""
    waited: list[float] = []

    class Waits(Courier):
        def wait(self, seconds: float) -> None:
            waited.append(seconds)
            monkeypatch.setattr(loggers.time, "monotonic", lambda: 110.0 + 15 * len(waited))
            super().wait(0.0)

    monkeypatch.setattr(loggers.time, "monotonic", lambda: 110.0)
    monkeypatch.setattr(Fails, "ended", threading.Event())
    close([Waits(name, lambda: Fails(Path(), Config(), 0, "close", "hangs")) for name in "abc"], failed=False)
    Fails.ended.set()
    assert waited == [loggers.PATIENCE, loggers.PATIENCE - 15, loggers.PATIENCE - 30]


# --- what is refused -------------------------------------------------------------------------------


def test_a_mistake_is_told_before_the_corpus_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absent").mkdir()  # As wandb makes a folder of its name, which Python could import.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LOGGERS, "absent", LOGGERS["wandb"])
    with pytest.raises(
        ValueError, match=r"--log absent needs the package absent, .*: pip install absent, or"
    ):
        train(data={"source": "nowhere"}, log=["absent"])
    with pytest.raises(ValueError, match=r"log holds 'tensorbord', and .*; did you mean tensorboard\?"):
        train(data={"source": "nowhere"}, log=["tensorbord"])
    refuse_unusable(["tensorboard"])


@pytest.mark.parametrize("text", ['{"id": "../x"}', '{"id": 3}', "[]", '{"id": "a/b"}'])
def test_an_id_of_a_strangers_run_is_no_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text(text)
    with pytest.raises(ValueError, match="holds no id"):
        saved_id(tmp_path, "mlflow")


# --- the network -----------------------------------------------------------------------------------


def connections(environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Train with both, with a proxy that refuses; return how often it was asked, and what was said."""
    proxy = socket.create_server(("127.0.0.1", 0))
    asked = 0

    def refuse() -> None:
        nonlocal asked
        while True:
            try:
                connection, _ = proxy.accept()
            except OSError:
                return
            asked += 1
            connection.close()

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    variables = {f"{scheme}_proxy": address for scheme in ("http", "https")}
    variables |= {name.upper(): value for name, value in variables.items()}
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_", "no_proxy", "NO_PROXY"))
    }
    code = f"from training.api import train; train(**{SETTINGS | {'log': ['wandb', 'mlflow']}!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=kept | variables | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    proxy.close()
    assert done.returncode == 0, done.stderr
    return asked, done.stderr


@pytest.mark.slow
@with_wandb
@with_mlflow
def test_nothing_leaves_the_machine_unless_the_environment_says_so(tmp_path: Path) -> None:
    asked, said = connections({}, with_code(tmp_path / "unasked"))
    assert asked == 0 and "warning: the logger" not in said
    online = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_INIT_TIMEOUT": "5",
        "MLFLOW_TRACKING_URI": "http://me:hunter22@mlflow.invalid",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    asked, said = connections(online, with_code(tmp_path / "asked"))
    assert asked > 0, "or this test could not fail"
    assert (
        said.count("warning: the logger wandb failed") == said.count("warning: the logger mlflow failed") == 1
    )
    assert "hunter22" not in said and "0123456789" not in said
    assert Run(tmp_path / "asked" / "run").scores["step"] == 4
