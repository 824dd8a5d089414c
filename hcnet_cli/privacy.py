"""What is masked before a command line is stored, and what a report for the public leaves out. Torch-free."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MASK = "***"
SECRET_NAME = r"(?:token|secret|passw(?:or)?d|pass|api[_-]?key|access[_-]?key|key|credentials?)"
NAMED = re.compile(rf"(?i)((?:^|[^a-z]){SECRET_NAME}\s*[=:]\s*)([^\s&,;'\"}}\]]+)")  # token=abc, {api_key: abc}
FLAG = re.compile(rf"(?i)--?(?:[a-z0-9]+[_-])*{SECRET_NAME}")  # the next argument is its value
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password
KNOWN = re.compile(  # tokens that are recognised by themselves: Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack, W&B
    r"\b(?:hf_[A-Za-z0-9]{8,}|gh[opsu]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{12,}"
    r"|xox[abp]-[\w-]{8,}|wandb_v1_\w{8,})"
)
HEX = re.compile(r"(?<![\w./-])[0-9a-f]{40}(?![\w./-])")  # an older key of W&B; elsewhere than in a flag, a commit
PLAIN_VALUE = re.compile(r"(?i)true|false|null|none|[-+]?[\d.]+(?:e[-+]?\d+)?")  # class_token=true is no secret
PATH = re.compile(r"(?<![\w.:/<&~])(?:~|\.\.)?(?:/[^\s/'\",;:()\[\]{}<>|`]+)+/?")  # absolute, or from a folder above

FLAGS = ("--data", "--out", "--results", "--init", "--output", "--published", "--image", "--check", "--compare")
AFTER_FLAG = re.compile(rf"((?:{'|'.join(FLAGS)})[ =]|\b(?:path|init): )([^\s,}}]+)")  # of a command, of a recipe


def command_line() -> list[str]:
    """The command that started this process, as it is stored: without secrets, with `~` for the home folder, and
    without --fresh, for it is there to go on with the run.
    """
    return [home(one).encode("utf-8", "backslashreplace").decode() for one in mask(sys.argv) if one != "--fresh"]


def same_command() -> str:
    """What goes on with the run that this process trains, as sentences name it."""
    return "the same command without --fresh" if "--fresh" in sys.argv else "the same command"


def mask(argv: Sequence[str]) -> list[str]:
    """Arguments with *** for passwords, tokens and keys, named or recognised by their form."""
    masked = [HEX.sub(MASK, mask_text(one)) for one in argv]
    for i in range(1, len(argv)):
        if FLAG.fullmatch(argv[i - 1]) and not argv[i].startswith("--"):
            masked[i] = MASK
    return masked


def mask_text(text: str) -> str:
    """Text with *** for the passwords, tokens and keys in it."""
    text = IN_ADDRESS.sub(MASK, text)
    text = NAMED.sub(lambda found: found[0] if PLAIN_VALUE.fullmatch(found[2]) else found[1] + MASK, text)
    return KNOWN.sub(MASK, text)


def home(text: str) -> str:
    """Text with `~` for the home folder where a path in it begins with that."""
    folder = os.path.expanduser("~")
    return re.sub(rf"(?<![\w./-]){re.escape(folder)}(?=/|$)", "~", text) if len(folder) > 1 else text


def host_id() -> str:
    """What records call this computer: a digest of its name, equal for runs of one computer."""
    return hashlib.sha256(f"hcnet {platform.node()}".encode()).hexdigest()[:12]


# --- for the public ---------------------------------------------------------------------------------------------------


def public(value: Any) -> Any:
    """Plain data with every text in it as `public_text` has it."""
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        shown = [public(one) for one in value]
        for i, before in enumerate(value[:-1], 1):
            if before in FLAGS and isinstance(shown[i], str):
                shown[i] = Path(shown[i]).name
        return type(value)(shown)
    return value


def public_text(text: str) -> str:
    """Text without secrets, folders, and the names of this computer and its user: a path is its last part alone."""
    text = AFTER_FLAG.sub(lambda found: found[1] + Path(found[2]).name, PATH.sub(_last_part, mask_text(text)))
    for name in {platform.node(), _user()} - {"", "root", "localhost"}:
        if len(name) > 2:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", MASK, text)
    return text


def _last_part(found: re.Match[str]) -> str:
    path = Path(found[0])
    of_run = path.name in ("best.safetensors", "last")  # which says nothing without the name of its run
    return f"{path.parent.name}/{path.name}" if of_run else path.name


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # neither a variable nor an entry names the user
        return ""
