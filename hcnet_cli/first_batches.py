"""Before step 1: a picture of the first training batches as the model gets them, and a card of the data."""

from __future__ import annotations

from hcnet_cli import engine, pictures, rng
from hcnet_cli.console import notice
from hcnet_cli.data.audit import distinct
from hcnet_cli.data.splits import DataSplits, training_sizes
from hcnet_cli.engine import to_device
from hcnet_cli.files import optional, replacing
from hcnet_cli.record import DataCard, data_card
from hcnet_cli.runs import RunFolder, RunInfo

BATCHES, SAMPLES = 3, 8  # that are drawn, and of each


def show_data(job: engine.Job, folder: RunFolder, info: RunInfo, earlier: RunInfo | None, data: DataSplits) -> None:
    """Draws the first batches of a run that begins, and puts the card into its record (main process, once a run)."""
    info.data.card = earlier.data.card if earlier else None
    if info.data.card is None:
        info.data.card = describe_data(data)
        if text := str(info.data.card):
            notice(f"Training data: {text}.")
    if not info.steps_done:
        draw_batches(job, folder)
        if folder.batches_file.exists():
            notice(f"The first batches, as the model gets them: {folder.batches_file}")


def draw_batches(job: engine.Job, folder: RunFolder) -> None:
    """Writes batches.png, unless it is there: the very samples of the first steps, augmented and mixed, with labels.

    For the main process. Training does not notice: a sample is a function of (seed, epoch, index), and the random
    generators are left as they were. A failure is a warning.
    """
    if folder.batches_file.exists():
        return
    with optional(folder.batches_file), rng.seeded(0):
        drawn = []
        for step, (batch, size) in enumerate(job.train.first(BATCHES, SAMPLES), 1):
            shown = len(batch["sample"])
            caption = f"Step {step}: {f'{shown} of {size}' if shown < size else size} images, as the model gets them"
            drawn.append(job.task.draw_batch(to_device(batch, job.device), caption))
        if images := [image for image in drawn if image is not None]:
            with replacing(folder.batches_file) as temporary:
                pictures.stacked(images).save(temporary, "PNG", compress_level=1)


def describe_data(data: DataSplits) -> DataCard:
    """The card of the training data: counts of the classes, and sizes of images spread evenly over them."""
    names = distinct(data.class_names)
    counts = {} if data.class_counts is None else dict(zip(names, data.class_counts.tolist(), strict=True))
    return data_card(data.class_unit, counts, training_sizes(data))
