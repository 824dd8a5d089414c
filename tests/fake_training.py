"""Stands in for the training program where only its manners matter: arguments, exit codes, run folders, signals.

`FAKE` in the environment holds JSON: "fail" and "refuse" (labels such as "gate s1"), "killed" (label: last words),
"seconds" of work, "top1" by label, "commit".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.runs import DataInfo, RunFolder, RunInfo
from hcnet_cli.tasks import TASKS


def main() -> int:
    task, *rest = sys.argv[1:]
    given = dict(zip(rest[::2], rest[1::2], strict=False))
    fresh = "--fresh" in rest
    wanted = json.loads(os.environ.get("FAKE", "{}"))
    seed = int(given["--seed"])
    overrides = [("train.seed", seed, "--seed"), ("data.path", given["--data"], "--data")]
    recipe = rcp.resolve(Path(given["--recipe"]), [*overrides, ("init", given["--init"], "--init")]).recipe
    label = f"{'+'.join(recipe.model.disable) or 'full'} s{seed}"
    results = Path(given["--out"])
    with (results / "calls.txt").open("a") as calls:
        threads, cards = os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")
        calls.write(json.dumps([task, label, given["--init"], fresh, threads, cards]) + "\n")
    if label in wanted.get("refuse", ()):
        print("error: The data are not in order.\nMend them.", file=sys.stderr)
        return 2
    if label in wanted.get("killed", {}):
        print(wanted["killed"][label], file=sys.stderr)
        return 137
    digest = {"data": "colors-digest", **({"init": Path(given["--init"]).name} if recipe.init != "none" else {})}
    fingerprint = rcp.fingerprint(recipe, **digest)
    folder = RunFolder(results / "runs" / runs.run_name(recipe, "colors", fingerprint))
    folder.path.mkdir(parents=True, exist_ok=True)
    earlier = None if fresh else folder.read()
    if earlier is not None and earlier.status == "finished":
        print(f"This run is finished: {folder.path}", file=sys.stderr)
        return 0
    info = RunInfo(
        task=task,
        protocol=recipe.protocol,
        size=recipe.model.size,
        variant=rcp.variant(recipe),
        seed=seed,
        fingerprint=fingerprint,
        data=DataInfo(name="colors", digest="colors-digest", path="", num_train=24, num_val=10, num_classes=3),
        steps_total=10,
        steps_done=earlier.steps_done if earlier else 0,
        batch_size=8,
        git_commit=wanted.get("commit", ""),
        started=runs.now(),
        precision="fp32",
    )
    (folder.path / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
    folder.write(info)
    if label in wanted.get("fail", ()):
        folder.write(info.model_copy(update={"status": "failed", "steps_done": 4}))
        print("some words\nIt broke.", file=sys.stderr)
        return 1
    try:
        while info.steps_done < 10:
            time.sleep(wanted.get("seconds", 0) / 10)
            info.steps_done += 1
    except KeyboardInterrupt:
        folder.write(info.model_copy(update={"status": "interrupted"}))
        return 130
    value = wanted.get("top1", {}).get(label, 90.0 + seed)
    info.metrics = {TASKS[task].primary.key: value}
    folder.write(info.model_copy(update={"status": "finished", "finished": runs.now()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
