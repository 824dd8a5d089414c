"""`hcnet push`: the one command that uploads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer

from hcnet_cli.cli import complete, options
from hcnet_cli.cli.export import check_timm
from hcnet_cli.console import UserError, loading

# The hub's rule for the name of a repository.
NAME = re.compile(
    r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<![.-])(?<!\.git)", re.ASCII
)  # of the hub


def push(
    run: Annotated[
        str,
        typer.Argument(
            help=f"A run with weights: {options.A_RUN}",
            autocompletion=complete.runs,
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="The model's name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; reach no network.")] = False,
    data: options.DataPath = None,
    out_dir: options.Out = Path("results"),
) -> None:
    """Upload a classifier's weights to the Hugging Face hub, as the folder of `hcnet export --format timm`.

    The folder is compared with the run first; its README.md is the run's card. The token is that of `hf auth login`, or
    $HF_TOKEN.
    """
    from hcnet_cli.runs import find_run, with_weights

    folder = find_run(run, out_dir)
    info, recipe = with_weights(folder, None, data)
    check_timm(recipe)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("Pushing needs huggingface_hub.", hint="pip install 'hcnet[hub]'")
    import huggingface_hub as hub

    if len(to) > 96 or not NAME.fullmatch(to):
        raise UserError(f'--to takes USER/NAME in letters, digits, dots, underscores and hyphens, not "{to}".')
    if not dry_run and hub.get_token() is None:
        raise UserError("No token of the Hugging Face hub is known.", hint="hf auth login, or set $HF_TOKEN.")
    with loading():
        from hcnet_cli.push import push as upload

    upload(folder, info, recipe, to, private=private, dry_run=dry_run)
