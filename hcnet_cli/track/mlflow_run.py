"""MLflow: a SQLite file in the run folder, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcnet_cli.files import writing
from hcnet_cli.track.tracked import PROJECT, About

MOST_VALUES = 1000  # that MLflow takes at once
MOST_PARAMS = 100
LONGEST_PARAM = 500  # letters


class MlflowRun:
    """One run, found again by its tag `hcnet.id`. Steps that MLflow has of a value are not sent to it again."""

    whole = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db"
        self.waiting: list[Any] = []
        self.steps: dict[str, set[int]] = {}

    def begin(self, step: int, about: About) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.metric, self.client = Metric, MlflowClient(tracking_uri=self.uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self.client.create_experiment(name)
        found = self.client.search_runs([place], f"tags.`hcnet.id` = '{about.id}'")
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, "RUNNING", about.name)
        else:
            self.id = self.client.create_run(place, run_name=about.name, tags={"hcnet.id": about.id}).info.run_id
            params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in about.settings().items()]
            for start in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(self.id, params=params[start : start + MOST_PARAMS])

    def send(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        for tag, value in values.items():
            if tag not in self.steps:
                self.steps[tag] = {one.step for one in self.client.get_metric_history(self.id, tag)}
            if step not in self.steps[tag]:
                self.steps[tag].add(step)
                self.waiting.append(self.metric(tag, value, now, step))

    def flush(self) -> None:
        while self.waiting:
            self.client.log_batch(self.id, self.waiting[:MOST_VALUES])
            del self.waiting[:MOST_VALUES]

    def close(self) -> None:
        self.client.set_terminated(self.id)

    def where(self) -> str:
        return f"pip install mlflow && mlflow ui --backend-store-uri {shlex.quote(self.uri)}"  # -skinny has no pages
