"""Protects the further trackers: each real library, offline, holds every logged number once, in one run."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
from pathlib import Path

import pytest
from test_track import Points, entries, logged, write

from hcnet_cli.runs import RunFolder
from hcnet_cli.track.sending import send, where


def of_wandb(folder: Path) -> Points:
    """The history in the one file that `wandb sync` uploads: LevelDB's log format, a protobuf message a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("*.wandb")
    content, place, whole = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    points: Points = {}
    runs = set()
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.display_name))
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for tag in values:
                if not tag.startswith("_"):
                    points.setdefault(tag, []).append((json.loads(values["_step"]), json.loads(values[tag])))
    assert len(runs) == 1
    return points


def of_trackio(folder: Path) -> Points:
    points: Points = {}
    with sqlite3.connect(folder / "hcnet.db") as file:
        rows = file.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    for _, step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            points.setdefault(tag, []).append((step, value))
    return points


def of_mlflow(folder: Path) -> Points:
    points: Points = {}
    with sqlite3.connect(folder / "mlflow.db") as file:
        assert file.execute("SELECT count(*), status FROM runs").fetchall() == [(1, "FINISHED")]
        assert file.execute("SELECT value FROM params WHERE key = 'optim.lr'").fetchall() == [("0.1",)]
        for tag, step, value in file.execute("SELECT key, step, value FROM metrics ORDER BY step"):
            points.setdefault(tag, []).append((step, value))
    return points


READERS = {"wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow}
ENVIRONMENT = (
    *(
        "WANDB_MODE",
        "WANDB_ERROR_REPORTING",
        "WANDB_PROJECT",
        "TRACKIO_DIR",
        "TRACKIO_SPACE_ID",
        "TRACKIO_SERVER_URL",
        "HF_HUB_OFFLINE",
    ),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY"),
)


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_goes_on_stays_one_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent up to step 8 without its evaluation; gone on with from step 5; finished; then the note is lost."""
    if importlib.util.find_spec(name) is None:  # Trackio reads its variables when it is imported
        pytest.skip(f"pip install 'hcnet[{name}]'")
    for variable in ENVIRONMENT:
        monkeypatch.setenv(variable, "")  # so that what is set inside is taken back
        monkeypatch.delenv(variable)
    run = RunFolder(tmp_path / "a-run")
    run.path.mkdir()
    run.recipe_file.write_text("optim: {lr: 0.1}\n")
    for lines in (entries(8)[:-1], entries(5), entries(13)):
        write(run, lines)
        send(run, name)
    (run.path / "track" / f"{name}.json").write_text("[]")
    assert send(run, name) == len(entries(13))
    found, expected = READERS[name](run.path / "track" / name), logged(entries(13))
    assert {tag: sorted(points) for tag, points in found.items()} == expected
    assert str(run.path) in where(run, name)
