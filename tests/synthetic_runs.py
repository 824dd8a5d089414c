"""Run folders as the trainer leaves them, made up: for tests of everything that reads runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from hcnet_cli.runs import DataInfo, RunInfo, record_text

DATA = {  # name -> task, protocol, training samples, validation samples, classes, image size, batch, steps
    "digits": ("pretrain", "pretrain/digits", 1438, 359, 10, 32, 64, 440),
    "imagenet-1k": ("pretrain", "pretrain/imagenet", 1281167, 50000, 1000, 224, 256, 1501200),
    "digit-scenes": ("finetune-det", "finetune-det/digit-scenes", 800, 200, 10, 128, 8, 600),
    "coco": ("finetune-det", "finetune-det/coco-1x", 117266, 5000, 80, 800, 16, 87948),
    "digit-stuff": ("finetune-seg", "finetune-seg/digit-stuff", 800, 200, 11, 128, 8, 600),
    "ade20k": ("finetune-seg", "finetune-seg/ade20k-160k", 20210, 2000, 150, 512, 16, 160000),
}
SIZES = {"pico": (1.66, 0.31), "t": (28.62, 4.22), "t-release": (27.99, 4.76), "s": (49.84, 8.16), "b": (87.22, 14.65)}
ADDED = {"pretrain": (0, 1.0), "finetune-det": (19.5, 60.0), "finetune-seg": (30.0, 220.0)}
GOOD = {"pretrain": 97.0, "finetune-det": 46.0, "finetune-seg": 49.0}


def make_run(
    results: Path, data: str = "digits", size: str = "pico", seed: int = 0, *, score: float | None = None,
    done: float = 1.0, status: str = "finished", log: bool = True, pictures: int = 0, name: str = "", **fields: Any,
) -> Path:  # fmt: skip
    """One run folder under results/runs. `score` is the primary metric; `fields` override those of run.json."""
    task, protocol, train, val, classes, img_size, batch, steps = DATA[data]
    seed_text = f"{data}{size}{seed}{fields.get('variant', '')}"
    draw = random.Random(seed_text)
    score = round(GOOD[task] + draw.gauss(0, 0.4), 4) if score is None else score
    params, macs = SIZES[size]
    plus, times = ADDED[task]
    scale = (img_size / 224) ** 2 if task == "pretrain" else 1
    values: dict[str, Any] = {
        "status": status,
        "task": task,
        "protocol": protocol,
        "size": size,
        "seed": seed,
        "fingerprint": f"{draw.getrandbits(32):08x}",
        "data": DataInfo(
            name=data, digest=f"{data}-digest", path=f"/data/{data}", num_train=train, num_val=val, num_classes=classes
        ),
        "steps_done": round(done * steps),
        "steps_total": steps,
        "batch_size": batch,
        "metrics": metrics(task, score) if done > 0.1 else {},
        "best_step": round(done * steps) if done > 0.1 else None,
        "params": round((params + plus) * 1e6),
        "macs": round(macs * scale * times * 1e9),
        "macs_input": f"3x{img_size}x{img_size}",
        "img_size": img_size,
        "images_per_second": round(400 / macs, 1),
        "speed_notes": "inference, batch 64, fp32, cpu, 2 threads",
        "train_images_per_second": 180.0,
        "data_wait_share": 0.02,
        "device": "cpu",
        "precision": "fp32",
        "init": {} if task == "pretrain" else {"source": f"results/runs/pretrain-digits-{size}-s{seed}-0123abcd"},
        "git_commit": "3f2a9c1d4b7e8f60718293a4b5c6d7e8f9012345",
        "argv": ["/home/me/.venv/bin/hcnet", task, "--size", size, "--seed", str(seed)],
        "versions": {"torch": "2.14.0", "python": "3.11.9", "hcnet": "0.1.0"},
        "machine": "example, Linux x86_64, 2 cores",
        "started": "2025-06-14T09:00:00+00:00",
        "finished": f"2025-06-14T09:{10 + seed % 50}:00+00:00" if status == "finished" else "",
        "train_seconds": 64.0,
    }
    info = RunInfo(**(values | fields))
    shape = f"-{info.variant}" if info.variant else ""
    path = results / "runs" / (name or f"{task}-{data}-{size}{shape}-s{seed}-{info.fingerprint}")
    path.mkdir(parents=True)
    (path / "run.json").write_text(record_text(info) if info.config else info.model_dump_json(indent=2) + "\n")
    (path / "recipe.yaml").write_text(f"task: {task}\nprotocol: {protocol}\nmodel: {{size: {size}}}\n")
    if log:
        write_log(path, task, info.steps_done, steps, score, draw)
    for number in range(pictures):
        picture(path / "final" / "pictures" / f"{number:02d}.png", number)
    return path


def metrics(task: str, score: float) -> dict[str, float]:
    if task == "pretrain":
        return {"top1": score, "top5": 100 - (100 - score) * 0.2}
    if task == "finetune-det":
        box = {"box_AP": score, "box_AP50": score + 20, "box_AP75": score + 4}
        return box | {name.replace("box", "mask"): value - 5 for name, value in box.items()}
    return {"mIoU": score, "mIoU_ms": score + 1.2, "mAcc": score + 10, "aAcc": score + 30}


def write_log(path: Path, task: str, done: int, total: int, score: float, draw: random.Random) -> None:
    """Losses that fall and metrics that rise, cosine learning rate with warm-up, as engine.fit writes them."""
    primary = next(iter(metrics(task, score)))
    lines = []
    for number in range(1, 61):
        step = round(number * total / 60)
        if step > done:
            break
        x = step / total
        lr = 2e-3 * min(1.0, x / 0.1) * (0.5 + 0.5 * math.cos(math.pi * x))
        loss = 0.5 + 1.9 * math.exp(-4 * x) + draw.gauss(0, 0.05)
        lines.append({"step": step, "lr": lr, "cls": loss, "loss": loss, "grad_norm": 1.3, "images_per_second": 181.2})
        if number % 3 == 0:
            value = score * (1 - math.exp(-6 * x)) / (1 - math.exp(-6)) - (1 - x) * abs(draw.gauss(0, 2))
            lines.append({"step": step, primary: value})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(path: Path, number: int, size: tuple[int, int] = (520, 260)) -> None:
    """Ground truth and prediction side by side, as the tasks draw them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (40 + number * 13 % 100, 70, 110))
    pen = ImageDraw.Draw(image)
    for side in (0, size[0] // 2):
        pen.rectangle((side + 30, 40, side + 120, 150 + number * 5 % 60), outline=(250, 200, 60), width=3)
        pen.ellipse((side + 140, 90, side + 230, 200), fill=(200, 90, 80))
    image.save(path)
