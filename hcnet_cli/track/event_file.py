"""TensorBoard's event files, by its own package and without TensorFlow or PyTorch."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcnet_cli.files import writing
from hcnet_cli.track.tracked import About


class EventFile:
    """A new event file in `folder`, which TensorBoard reads after the older ones there."""

    whole = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, step: int, about: About) -> None:
        """From now on TensorBoard forgets what older files say of `step` and of later ones; -1: of everything."""
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.events, self.summaries = event_pb2, summary_pb2
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            number = len(list(self.folder.iterdir()))
            name = f"events.out.tfevents.{time.time():010.0f}.{number:04}.hcnet"  # in this order they are read
            self.records = RecordWriter((self.folder / name).open("xb"))
        self._write(file_version="brain.Event:2")
        self._write(step=max(0, step), session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        text = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[_as_code(about.recipe).encode()])
        shown = {"metadata": summary_pb2.SummaryMetadata(plugin_data=plugin), "tensor": text}
        self._write(step=max(0, step), summary=summary_pb2.Summary(value=[self._value(tag="recipe", **shown)]))

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step, by their tags."""
        scalars = [self._value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self.summaries.Summary(value=scalars))

    def flush(self) -> None:
        self.records.flush()

    def close(self) -> None:
        self.records.close()

    def where(self) -> str:
        return f"tensorboard --logdir {shlex.quote(str(self.folder.parent))}"

    def _value(self, **fields: Any) -> Any:
        return self.summaries.Summary.Value(**fields)

    def _write(self, **fields: Any) -> None:
        self.records.write(self.events.Event(wall_time=time.time(), **fields).SerializeToString())


def _as_code(text: str) -> str:
    """As a block of code in Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
