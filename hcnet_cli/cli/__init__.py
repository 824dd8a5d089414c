"""The command line: thin commands that turn flags into a recipe and call one function. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

import hcnet_cli
from hcnet_cli.cli import (
    ablate,
    bench,
    card,
    evaluate,
    export,
    inspect,
    options,
    predict,
    push,
    recipes,
    report,
    runs,
    studies,
    training,
)
from hcnet_cli.cli.base import require_text
from hcnet_cli.console import (
    DISK_FULL,
    UserError,
    is_main_process,
    notice,
    open_output,
    out,
    print_error,
    visible,
    warn,
)
from hcnet_cli.tasks import TASKS

OF_STUDIES = {  # flags of training that `hcnet ablate` lacks -> what to give instead
    "--seed": "Seeds: --seeds 0,1,2.",
    "--init": "Weights: init, under runs in a study.",
}
USAGE_ERROR: Any = typer.BadParameter.__base__  # of every mistake in flags; Typer has no public name for it


class Program(typer.core.TyperGroup):
    """The commands. Typer ends an interrupted one without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            notice("Stopped.")
            raise


app = typer.Typer(
    cls=Program,
    help="Train, fine-tune, ablate and report HcNet, the vision backbone that conducts heat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
training.register(app)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(export.export)
app.command()(card.card)
app.command()(push.push)
app.command()(inspect.check)
app.command()(inspect.shards)
app.command()(ablate.ablate)
app.command()(studies.studies)
app.command()(report.report)
app.command()(inspect.explain)
app.command()(inspect.replay)
app.command()(inspect.track)
app.command()(inspect.doctor)
app.add_typer(runs.app, name="runs")
app.add_typer(recipes.app, name="recipes")
app.add_typer(bench.app, name="bench")


def _version(value: bool) -> None:
    if value:
        out.print(f"hcnet {hcnet_cli.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Runs the program; a user's mistake ends in one sentence and exit code 2, never in a traceback."""
    if sys.argv[1:2] != ["bench"]:  # which measures PyTorch as it comes
        # Read when torch is loaded, so set before any command runs; what the user has set stays.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # waiting threads spin briefly: two runs can share the cores
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors in huge pages: far fewer page faults
    open_output()
    try:
        try:
            for word in sys.argv[1:]:
                require_text(word, "An argument")
            program = typer.main.get_command(app)
            warn_of_repeated(program, sys.argv[1:])
            code = program(prog_name="hcnet", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except USAGE_ERROR as error:  # a flag, or the value of one
        if message := error.format_message():  # empty: the help was printed instead
            command = error.ctx.command_path if error.ctx else "hcnet"
            hint = option_hint(message, command) or places_hint(message, error.ctx) or f"See {command} --help."
            print_error(usage_sentence(message), hint=hint)
        code = UserError.exit_code
    except UserError as error:
        if os.environ.get("HCNET_TRACEBACK"):
            raise
        print_error(str(error), error.hint)
        _report_to_torchrun(f"error: {error}", error.hint)
        code = error.exit_code
    except typer.Abort:
        code = 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        _close_output()
        code = 0
    except OSError as error:
        code = UserError.exit_code
        if error.errno in DISK_FULL and error.filename is None:
            _close_output()
            print_error("The disk is full: what is printed here could not be written.")
        elif sentence := file_sentence(error):
            print_error(sentence, hint="HCNET_TRACEBACK=1 shows where this comes from.")
            _report_to_torchrun(f"error: {sentence}", "")
        else:
            raise
    sys.exit(code)


def file_sentence(error: OSError) -> str:
    """What the system says of a file, such as one that may not be read; "" where it names none, or all is wanted."""
    if not isinstance(error.filename, str | bytes) or not error.strerror or os.environ.get("HCNET_TRACEBACK"):
        return ""
    return f"{os.fsdecode(error.filename)}: {error.strerror}."


def _report_to_torchrun(message: str, hint: str) -> None:
    """Hands the sentence to torchrun, which ends what it prints with it, after a traceback of its own.

    torchrun ends all processes once one has ended, so the others leave the main process a second to speak.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    if is_main_process():
        with contextlib.suppress(OSError):
            content = {
                "message": "\n".join(filter(None, (visible(message), visible(hint)))),
                "timestamp": int(time.time()),
            }
            Path(file).write_text(json.dumps(content))
    else:
        time.sleep(1)


def usage_sentence(message: str) -> str:
    """Typer's words for what is wrong with a flag, which are pydantic's where its value is wrong, as a sentence."""
    takes = {"integer": "a whole number", "number": "a number"}
    message = re.sub(
        r"Input should be a valid (\w+).*", lambda found: f"it takes {takes.get(found[1], found[1])}", message
    )
    message = re.sub(r"Input should be greater than or equal to (.*)", r"it takes numbers of at least \1", message)
    return message if message.endswith((".", "?")) else f"{message}."


def warn_of_repeated(command: Any, words: Sequence[str]) -> None:
    """Says so where an option that takes one value is given several times: the last one counts."""
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command, words = inner, words[1:]
    for option in command.params:
        names = {*option.opts, *option.secondary_opts}
        given = [word.partition("=")[0] for word in words if word.partition("=")[0] in names]
        if len(given) > 1 and not getattr(option, "multiple", True):
            warn(f"{' and '.join(dict.fromkeys(given))}: given {len(given)} times; the last one counts.")


def option_hint(message: str, command: str) -> str:
    """What to type instead of an option that a command does not have, or that lacks a value; "" if unknown."""
    if "--compare" in message and "requires 2 arguments" in message:
        return "For example: hcnet report --compare results/runs/RUN results/runs/OTHER"
    found = re.search(r"No such option: (--[\w-]+)", message)
    if found and command.endswith(" ablate") and found[1] in OF_STUDIES:
        return OF_STUDIES[found[1]]
    fields = dict(options.RECIPE_KEYS.values())
    if not found or found[1] not in fields or command.split()[-1] not in (*TASKS, "ablate"):
        return ""
    return f"Use --set {fields[found[1]]}=..."


def places_hint(message: str, ctx: Any) -> str:
    """The options of a command that name places, for who typed another one, or none; "" for other mistakes."""
    if not ctx or not re.search(r"unexpected extra argument|No such option: --(out|output|results)\b", message):
        return ""
    named = {name: param.help for param in ctx.command.params for name in param.opts}
    found = [f"{name}: {named[name]}" for name in ("--data", "--results", "--out", "--output") if name in named]
    return " ".join([*found, f"See {ctx.command_path} --help."]) if found else ""


def _unwrap_help(one: typer.Typer) -> None:
    """Makes a line of each paragraph of the help texts, so that they are broken where the terminal ends."""
    registered = [info.callback for info in (*one.registered_commands, one.registered_callback) if info]
    for callback in registered:
        if callback is not None and callback.__doc__:
            paragraphs = re.split(r"\n\s*\n", callback.__doc__.strip())
            callback.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for group in one.registered_groups:
        if group.typer_instance is not None:
            _unwrap_help(group.typer_instance)


_unwrap_help(app)


def _close_output() -> None:
    """What is still to be printed goes nowhere, instead of failing once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
