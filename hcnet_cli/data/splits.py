"""What a data format hands to a task: the training and the validation samples, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hcnet_cli.console import UserError
from hcnet_cli.data import loader
from hcnet_cli.data.images import Size, shown_size
from hcnet_cli.runs import DataInfo

SIZES_READ = 200  # image files whose headers are read for the typical size


@dataclass(kw_only=True)
class DataSplits:
    """The two splits of a data set. A format may subclass it to hand its task more (see tasks/detection/coco.py).

    `img_size` (height, width): what MACs and images/s are given for. `groups` [len(train)]: samples of two groups never
    share a batch. `shards`: the files whose order training follows. `class_counts` [num_classes]: training images of
    each class, or objects or pixels where each of these has one.
    """

    info: DataInfo
    train: loader.TrainDataset
    val: loader.RequestDataset
    class_names: Sequence[str]
    img_size: tuple[int, int]
    collate: loader.Collate | None = None  # of training samples; None: loader.collate_items
    val_collate: loader.Collate | None = None
    groups: NDArray[np.int64] | None = None
    shards: loader.Shards | None = None
    class_counts: NDArray[np.int64] | None = None
    class_unit: str = "images"  # what `class_counts` counts

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps in one pass over the training samples."""
        return loader.steps_per_epoch(len(self.train), batch_size, self.groups)


def training_sizes(data: DataSplits) -> list[Size]:
    """The sizes (height, width) of at most SIZES_READ training images, evenly spaced."""
    sizes = []
    count = len(data.train)
    for number in range(min(count, SIZES_READ)):
        try:
            sizes.append(shown_size(data.train.sample_path(number * count // min(count, SIZES_READ))))
        except UserError:
            continue  # training says so when it meets the image
    return sizes
