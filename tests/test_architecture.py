"""Protects the shape of the program: imports point strictly down, light layers stay light, tasks are named once."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hcnet_cli.tasks import TASKS

PACKAGE = Path(__file__).parent.parent / "hcnet_cli"
# From the top; a place may import what stands on lines below its own. Places of one line do not know each other.
# A place is a module, or a folder, whose files may import each other in one direction.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["bench", "push"],
    ["evaluate", "predict", "export", "verify", "explain", "replay", "check", "doctor"],
    ["run"],
    ["rehearsal"],
    ["plan", "previous", "reading", "first_batches", "scores", "origin"],
    ["trial"],
    ["build"],
    ["task modules"],  # tasks/*/task.py, tasks/*/predict.py, tasks/*/export.py
    ["task parts"],  # tasks/*/: data formats, heads, metrics
    ["engine"],
    ["kernels", "foreign"],
    ["models", "data", "optim", "profile", "checkpoint", "weights", "device"],
    ["dist", "rng"],
    ["report", "manage"],
    ["study"],
    ["finished", "evaluation_request", "failure", "track"],
    ["inputs"],
    ["results", "recipe_reference", "pretrained"],
    ["published", "statistics", "calibration", "grouping", "charts"],
    ["pictures"],
    ["table", "runs", "last_step"],
    ["recipe", "record"],
    ["plausible"],
    ["declarations", "header", "model_names", "cache"],  # tasks/__init__.py, tasks/spec.py, tasks/*/spec.py
    ["schema", "plain_json", "own_model"],
    ["values", "locks"],
    ["files", "privacy", "plain_yaml"],
    ["console", "sizes", "cores"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH_FREE = [
    *("cli", "recipe", "recipe_reference", "tasks", "sizes", "schema", "runs", "files", "console", "table", "values"),
    *("header", "plain_json", "plausible", "pretrained", "record", "grouping", "privacy", "inputs", "pictures"),
    "last_step",
    *(
        "own_model",
        "cores",
        "model_names",
        "cache",
        "finished",
        "failure",
        "evaluation_request",
        "bench.choices",
        "published",
    ),
    *(
        "statistics",
        "calibration",
        "results",
        "manage",
        "track",
        "track.sending",
        "study.design",
        "study.runner",
        "study.table",
    ),
    *("report", "report.card"),
]
LINES = 450  # of a room at most


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    """hcnet_cli/models/hcnet.py -> "models.hcnet"; hcnet_cli/models/__init__.py -> "models"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in modules()}


def place(module: str) -> str:
    """The place of a module in LAYERS."""
    parts = module.split(".")
    if parts[0] != "tasks":
        return parts[0]
    if len(parts) == 1 or parts[-1] == "spec":
        return "declarations"
    return "task modules" if parts[-1] in ("task", "predict", "export") else "task parts"


def imported(path: Path) -> set[tuple[str, int]]:
    """(module of this package, line) of every import in a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["hcnet_cli", *path.relative_to(PACKAGE).parts[: -node.level]] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("hcnet_cli."):
                module = name.removeprefix("hcnet_cli.")
                while module not in NAMES and "." in module:  # a name in a module
                    module = module.rpartition(".")[0]
                if module in NAMES:
                    found.add((module, node.lineno))
    return found


def test_every_module_has_a_place() -> None:
    assert {place(name) for name in NAMES} <= set(LEVEL)


def test_imports_point_strictly_down() -> None:
    violations = []
    for path in modules():
        here = dotted(path)
        for name, line in sorted(imported(path)):
            together = place(name) == place(here)
            if together and place(here).startswith("task "):
                together = name.split(".")[1] == here.split(".")[1]  # of one task
            if not together and LEVEL[place(name)] <= LEVEL[place(here)]:
                violations.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not violations, "\n".join(violations)


def test_no_two_files_import_each_other() -> None:
    graph = {dotted(path): {name for name, _ in imported(path)} - {dotted(path)} for path in modules()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_recipe_stops_at_build() -> None:
    """What lies between build and the torch-free part takes plain arguments and sections, never a whole recipe."""
    between = range(LEVEL["build"] + 1, LEVEL["report"])
    below = [path for path in modules() if LEVEL[place(dotted(path))] in between]
    assert not [path.name for path in below if any(name == "recipe" for name, _ in imported(path))]


def test_the_name_of_a_task_stands_in_its_folder_alone() -> None:
    """Adding a task is a folder and a line. Help texts and hints may show an example command."""
    names = "|".join(re.escape(name) for name in [*TASKS, *(spec.table for spec in TASKS.values())])
    found = []
    for path in modules():
        if "tasks" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(names, node.value):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value!r}")
    assert not found, "\n".join(found)


def test_rooms_stay_small() -> None:
    large = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in modules()}
    assert not {name: lines for name, lines in large.items() if lines > LINES}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_do_not_load_torch(module: str) -> None:
    code = f"import sys, hcnet_cli.{module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_loads_next_to_nothing() -> None:
    """--help must answer at once: nothing that computes is loaded for it."""
    code = (
        "import sys; sys.argv = ['hcnet', 'pretrain', '--help']\n"
        "from hcnet_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout
