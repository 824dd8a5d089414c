"""What a process of fresh.py runs; it imports nothing of the program, which may be a copy in another folder."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys


def program(arguments: list[str], variables: dict[str, str], folder: str, out: str, err: str) -> None:
    multiprocessing.set_start_method(None, force=True)  # data workers start as they do anywhere
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv = ["hcnet", *arguments]
        runpy.run_module("hcnet_cli", run_name="__main__", alter_sys=True)
