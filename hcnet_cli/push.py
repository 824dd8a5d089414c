"""`hcnet push`: a run's weights as timm's folder, with its card, on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub.errors import HfHubHTTPError

from hcnet_cli.console import UserError, notice, out
from hcnet_cli.export import export_folder
from hcnet_cli.manage import in_units
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder, RunInfo


def push(folder: RunFolder, info: RunInfo, recipe: Recipe, name: str, *, private: bool, dry_run: bool) -> None:
    """Makes the folder, compares it with the run, lists its files, and (without `dry_run`) uploads it in one commit.

    UserError where the folder is not as the run, and where the hub refuses or cannot be reached: nothing is uploaded
    in part.
    """
    with tempfile.TemporaryDirectory(prefix="hcnet-push-") as place:
        made = Path(place) / "model"
        notice(export_folder(folder, info, recipe, made, f"hf-hub:{name}"))
        for file in sorted(made.iterdir()):
            out.print(f"{file.name:<18} {in_units(file.stat().st_size)}")
        if dry_run:
            notice(f"Nothing was uploaded (--dry-run); it would go to {name}.")
            return
        address = _upload(made, name, private, f"hcnet push: {folder.path.resolve().name}")
    notice(f"Uploaded: {address}")


def _upload(made: Path, name: str, private: bool, message: str) -> str:
    """The address of the repository, with the folder's files in a new commit."""
    api = hub.HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(f"{name} exists and is public, so nothing was uploaded.", hint="Leave out --private.")
        api.upload_folder(repo_id=name, folder_path=made, commit_message=message)
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"The hub refused the token for {name} ({status}): nothing was uploaded.",
                hint="It must be allowed to write there: https://huggingface.co/settings/tokens",
            ) from None
        raise UserError(f"The hub answered {status}, so nothing was uploaded: {_first_line(error)}") from None
    except Exception as error:  # of the libraries below, which differ by version
        raise UserError(f"The hub at {api.endpoint} cannot be reached: {_first_line(error)}") from None
    return str(address)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
