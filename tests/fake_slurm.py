"""Stands in for sbatch, squeue and scontrol: `install(folder)` writes them, as scripts, into a folder for PATH.

`sbatch.txt` in the folder keeps each command line of sbatch, a JSON list a line; jobs are numbered from 100.
`queue.txt` is what squeue prints; without it squeue fails, as without a controller.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

SBATCH = """
import json, sys
from pathlib import Path
place = Path({folder!r})
if (place / "refuse.txt").exists():
    sys.exit("sbatch: error: invalid partition specified: nowhere\\nsbatch: error: Batch job submission failed")
log = place / "sbatch.txt"
number = 100 + (len(log.read_text().splitlines()) if log.exists() else 0)
with log.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print(f"{{number}};test")
"""
SQUEUE = """
import sys
from pathlib import Path
queue = Path({folder!r}) / "queue.txt"
if not queue.exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
print(queue.read_text(), end="")
"""
SCONTROL = """
print("MaxArraySize            = {size}")
"""


def install(folder: Path, max_array_size: int = 1001) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        file = folder / name
        file.write_text(f"#!{sys.executable} -IS\n{text.format(folder=str(folder), size=max_array_size)}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (folder / "queue.txt").touch()
    return folder


def submitted(folder: Path) -> list[list[str]]:
    file = folder / "sbatch.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
