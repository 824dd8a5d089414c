"""Whether the numbers of a run's record can be true. A record with numbers that cannot is not read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hcnet_cli.tasks import TASKS

AT_LEAST = {  # smallest value of a field, where it has one
    **dict.fromkeys(("seed", "steps_done", "steps_total", "unreadable_images", "train_seconds"), 0),
    **dict.fromkeys(
        ("steps_per_epoch", "params", "params_trained", "macs", "images_per_second", "train_images_per_second"), 0
    ),
    **dict.fromkeys(("data.num_train", "data.num_val", "data.num_classes", "best_step"), 0),
    **dict.fromkeys(("batch_size", "img_size", "processes"), 1),
}
LARGEST = 2.0**63  # of any number; squares and sums of such are still finite


def implausible(record: Mapping[str, Any]) -> str:
    """The first thing in a record (run.json as plain data) that cannot be true, as a clause; "" if there is none."""
    flat = {**record, **{f"data.{key}": value for key, value in record["data"].items()}}
    for key, least in AT_LEAST.items():
        value = flat.get(key)
        if value is not None and not (math.isfinite(value) and value >= least):
            return f"{key} is {value}"
    for key, value in flat.items():
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            return f"{key} is {value:g}"
    done, total, best = record["steps_done"], record["steps_total"], record["best_step"]
    if done > total:
        return f"steps_done is {done}, of {total} steps"
    if best is not None and total and best > total:
        return f"best_step is {best}, of {total} steps"
    spec = TASKS.get(record["task"])
    percent = tuple(metric.key for metric in spec.metrics) if spec else ()
    for name, value in record["metrics"].items():
        if value is None or not math.isfinite(value) or not 0 <= value <= LARGEST:  # a NaN is written as null
            return f"{name} is {value}"
        if value > 100 and (name in percent or name.startswith(tuple(f"{key}_" for key in percent))):
            return f"{name} is {value:g} per cent"
    return ""
