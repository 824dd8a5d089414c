"""The tasks by name. To add one, add its folder and its line here (docs/extending.md)."""

from hcnet_cli.tasks.classification.spec import SPEC as CLASSIFICATION
from hcnet_cli.tasks.detection.spec import SPEC as DETECTION
from hcnet_cli.tasks.segmentation.spec import SPEC as SEGMENTATION
from hcnet_cli.tasks.spec import Spec

TASKS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        CLASSIFICATION,
        DETECTION,
        SEGMENTATION,
    )
}
FIRST_TASK = next(name for name, spec in TASKS.items() if not spec.starts_from)  # trains from random weights
