"""Protects the shape of the program: imports point strictly down, and the light layers stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hcnet_cli"
# From the top; a module may import what stands on lines below its own. Modules of one line do not know each other.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["bench_data"],
    ["train", "explain", "bench", "check"],
    ["build"],
    ["engine", "tasks"],
    ["kernels"],
    ["models", "data", "metrics", "optim", "profile", "checkpoint", "weights"],
    ["dist", "rng"],
    ["report", "study"],
    ["ablations"],
    ["results"],
    ["runs"],
    ["recipe"],
    ["console"],
    ["names"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH_FREE = ["cli", "study", "report", "study", "results", "ablations", "runs", "recipe", "console", "names"]
RECIPE_STOPS_AT = "build"


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def place(path: Path) -> str:
    """hcnet_cli/models/hcnet.py -> "models"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[tuple[str, int]]:
    """(dotted module, line) of every import in a file, those inside functions included."""
    package = ".".join(("hcnet_cli", *path.relative_to(PACKAGE).parts[:-1]))
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {(f"{module}.{alias.name}", node.lineno) for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    assert {place(path) for path in modules()} <= set(LEVEL)


def test_imports_point_strictly_down() -> None:
    violations = []
    for path in modules():
        for name, line in sorted(imported(path)):
            parts = name.split(".")
            if parts[0] != "hcnet_cli" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            here, there = place(path), parts[1]
            same_folder = here == there and (PACKAGE / here).is_dir()
            if same_folder and path.name == "__init__.py":
                continue  # a folder's front door gathers its files
            if same_folder and here == "report":
                continue  # one renderer in several files
            if LEVEL[there] <= LEVEL[here]:
                violations.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not violations, "\n".join(violations)


def test_the_recipe_stops_at_build() -> None:
    below = [path for path in modules() if LEVEL[place(path)] in range(LEVEL[RECIPE_STOPS_AT] + 1, LEVEL["report"])]
    knowing = [p.name for p in below if any(name.startswith("hcnet_cli.recipe") for name, _ in imported(p))]
    assert not knowing


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_do_not_load_torch(module: str) -> None:
    code = f"import sys, hcnet_cli.{module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_loads_next_to_nothing() -> None:
    """--help must answer at once: neither torch nor pandas is loaded for it."""
    code = (
        "import sys; sys.argv = ['hcnet', 'pretrain', '--help']\n"
        "from hcnet_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'pandas', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout
