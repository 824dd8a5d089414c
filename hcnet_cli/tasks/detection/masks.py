"""The masks of a COCO file, checked before pycocotools' C code sees them: it trusts what it is given.

A checked mask is bytes: polygons as a letter for their numbers ("f" or "d": float32 or float64), the number of rings,
the values of each and all coordinates; an RLE as "R" and its compressed counts.
"""

from __future__ import annotations

import contextlib
import reprlib
import struct
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

FAR = 100  # times the longer side of the image: no coordinate lies further away
LONGEST_OUTLINE = 1_000_000  # pixels, of all polygons of an object; C needs memory and time for each of them


def pack_polygons(entry: dict[str, Any], number: str) -> dict[str, Any]:
    """Turns the polygons of an annotation into bytes while JSON is read: as lists, COCO's take gigabytes.

    What is no list of polygons stays as it is, for `pack` to refuse. A ring of fewer than 3 points is no polygon.
    """
    rings = entry.get("segmentation")
    if isinstance(rings, list) and rings and all(isinstance(ring, list) and len(ring) % 2 == 0 for ring in rings):
        rings = [ring for ring in rings if len(ring) >= 6]
        head = array("i", [len(rings), *map(len, rings)])
        with contextlib.suppress(TypeError, OverflowError):  # not numbers
            entry["segmentation"] = b"".join(
                [number.encode(), head.tobytes(), *(array(number, ring).tobytes() for ring in rings)]
            )
    return entry


def pack(segmentation: Any, height: int, width: int) -> bytes:
    """The mask of an object in an image of this size; b"" for polygons of fewer than 3 points.

    `segmentation`: what `pack_polygons` left of it, not empty. ValueError says what is wrong with it.
    """
    if isinstance(segmentation, bytes):
        _check_polygons(segmentation, height, width)
        return segmentation if _num_rings(segmentation) else b""
    if isinstance(segmentation, dict):
        return b"R" + _compressed(segmentation, height, width).encode()
    if isinstance(segmentation, list) and all(isinstance(ring, list) for ring in segmentation):
        if any(len(ring) % 2 for ring in segmentation):
            raise ValueError("a polygon with an odd number of coordinates")
        raise ValueError("a polygon whose coordinates are not all numbers")
    raise ValueError('a "segmentation" that is neither a list of polygons nor an RLE')


def unpack(mask: bytes, height: int, width: int) -> Any:
    """COCO's polygons, or its compressed RLE."""
    if mask[:1] == b"R":
        return {"size": [height, width], "counts": mask[1:].decode()}
    lengths, points = _parts(mask)
    if mask[:1] == b"f":
        points = points.round(3)  # restores the file's own numbers for any image below 8192 pixels
    return [ring.tolist() for ring in np.split(points, np.cumsum(lengths)[:-1])]


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """COCO's polygons, or its RLE of either kind -> [height, width] of 0 and 1."""
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return np.asarray(rle.decode(segmentation))


def bounds(mask: bytes, height: int, width: int) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of what a checked mask covers of its image; zeros for one that covers nothing."""
    if mask[:1] == b"R":
        x, y, w, h = rle.toBbox(unpack(mask, height, width)).tolist()
        return x, y, x + w, y + h
    points = _parts(mask)[1].reshape(-1, 2).clip(0, (width, height))
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x1, y1, x2, y2


# --- polygons ---------------------------------------------------------------------------------------------------------


def _num_rings(mask: bytes) -> int:
    return int(struct.unpack_from("i", mask, 1)[0])


def _parts(mask: bytes) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The number of values of each ring, and the values of all."""
    number = _num_rings(mask)
    lengths = np.frombuffer(mask, dtype=np.int32, count=number, offset=5)
    return lengths, np.frombuffer(mask, dtype=mask[:1].decode(), offset=5 + 4 * number).astype(np.float64)


def _check_polygons(mask: bytes, height: int, width: int) -> None:
    lengths, values = _parts(mask)
    if not len(values):
        return
    furthest = float(np.abs(values).max())
    if not furthest <= FAR * max(height, width):  # nor is a value that is no number
        raise ValueError(f"a polygon with a point far outside its image of height {height}, width {width}")
    if len(values) * 2 * furthest <= LONGEST_OUTLINE:
        return  # nearly all, without a closer look
    outline = 0.0
    for ring in np.split(values, np.cumsum(lengths)[:-1]):
        points = ring.reshape(-1, 2)
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
    if outline > LONGEST_OUTLINE:
        raise ValueError(f"polygons whose outline is {outline:,.0f} pixels long, more than {LONGEST_OUTLINE:,}")


# --- run lengths ------------------------------------------------------------------------------------------------------


def _compressed(mask: dict[str, Any], height: int, width: int) -> str:
    """The counts of an RLE, compressed. They fill the image exactly."""
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        raise ValueError(f"a mask of size {reprlib.repr(size)} in an image of height {height}, width {width}")
    if not isinstance(counts, list | str):
        raise ValueError('an RLE whose "counts" are neither a list nor text')
    runs = counts if isinstance(counts, list) else _runs(counts)
    if not all(type(run) in (int, float) and 0 <= run <= height * width and run == int(run) for run in runs):
        raise ValueError('a mask whose "counts" are not all whole numbers from 0 to the pixels of its image')
    if sum(runs) != height * width:
        raise ValueError(f"a mask of {sum(runs):.0f} pixels in an image of {height * width}")
    if isinstance(counts, str):
        return counts
    plain = {"size": [height, width], "counts": [int(run) for run in runs]}
    return str(rle.frPyObjects(plain, height, width)["counts"].decode())


def _runs(counts: str) -> list[int]:
    """The run lengths of a compressed RLE (COCO's rleFrString); [-1] for a text that is none."""
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode("utf-8", "replace"):
        code -= 48
        if not 0 <= code < 64 or shift > 30:  # no run has more than 32 bits, with its sign 33
            return [-1]
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else [-1]
