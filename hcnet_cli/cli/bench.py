"""`hcnet bench`: models and the input pipeline, timed side by side; and what a model needs at least, on paper."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hcnet_cli.cli import options
from hcnet_cli.console import UserError, loading
from hcnet_cli.privacy import command_line
from hcnet_cli.tasks.classification.spec import SPEC

app = typer.Typer()


@app.callback(invoke_without_command=True)
def bench(
    ctx: typer.Context,
    models: Annotated[
        str,
        typer.Option(
            help="Comma list: sizes, names of timm, reference (the literal form); SIZE:plain: without kernels."
        ),
    ] = "hcnet_tiny,reference",
    mode: Annotated[str, typer.Option(help="Comma list of infer and train.")] = "infer",
    precision: Annotated[str, typer.Option(help="Comma list of fp32, bf16 and fp16.")] = "fp32",
    compile_models: Annotated[bool, typer.Option("--compile", help="Each also compiled, beside eager.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    img_size: Annotated[int, typer.Option(min=8, help="Height and width of the images.")] = 224,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")] = None,
    device: options.Device = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender; figures are medians over them.")] = 7,
    output: options.Output = None,
) -> None:
    """Time models side by side: images/s, latency, peak memory, share of what the machine can multiply.

    Every model in every mode and precision is a contender; they take turns in one process, so that what else this
    machine does slows all alike, and ratios hold. `hcnet bench data` times the input pipeline.
    """
    if ctx.invoked_subcommand is not None:
        if given := [name for name in ctx.params if "COMMANDLINE" in str(ctx.get_parameter_source(name))]:
            raise UserError(
                f"--{given[0].replace('_', '-')} times models, and {ctx.invoked_subcommand} times something else.",
                hint=f"See hcnet bench {ctx.invoked_subcommand} --help.",
            )
        return
    from hcnet_cli.bench.choices import check_output, choices
    from hcnet_cli.inputs import check_device

    check_output(output)
    choices(models, mode, precision)  # before PyTorch is loaded, which takes seconds
    check_device(device)
    with loading():
        from hcnet_cli.bench import models as timing
        from hcnet_cli.bench import tables
        from hcnet_cli.files import write_output
        from hcnet_cli.report import render

    settings = timing.settings(batch_size, img_size, rounds, device, threads)
    known = tables.facts(settings.device, command_line(), settings.threads)
    made = timing.measure(timing.contenders(models, mode, precision, compile_models), settings)
    sys.stdout.write(render(tables.tables(made), "rich"))
    if output is not None:
        write_output(output, (tables.json_text if output.suffix == ".json" else tables.page)(made, known))
    if made.stopped:
        raise typer.Exit(128 + made.stopped)
    if all(contender.error for contender in made.contenders):
        raise typer.Exit(1)


@app.command("data")
def bench_data(
    data: Annotated[str | None, typer.Option(help="An image folder (default: synthetic JPEGs).")] = None,
    recipe: Annotated[str, typer.Option(help="The pretrain recipe whose augmentation is timed.")] = SPEC.default_recipe,
    img_size: Annotated[int | None, typer.Option(min=8, help="Height and width (default: the recipe's).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data; 0: this one.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each pipeline; figures are medians over them.")] = 5,
    output: options.Output = None,
) -> None:
    """Time the training input pipeline alone, beside timm's on the same folder with the same augmentation."""
    from hcnet_cli.bench.choices import check_output

    check_output(output)  # before PyTorch is loaded, which takes seconds
    from hcnet_cli.bench import data as bench_data
    from hcnet_cli.bench import tables
    from hcnet_cli.device import pick_device
    from hcnet_cli.files import write_output
    from hcnet_cli.report import render

    bench_data.read_recipe(recipe, data or SPEC.embedded, img_size)  # before pictures are made for it
    known = tables.facts(pick_device("cpu"), command_line(), threads=1)
    with bench_data.folder(data) as (root, name):
        made = bench_data.measure(
            bench_data.read_recipe(recipe, root, img_size),
            root,
            name,
            batch_size=batch_size,
            workers=workers,
            rounds=rounds,
        )
    sys.stdout.write(render([bench_data.table(made)], "rich"))
    if output is not None:
        write_output(output, (bench_data.json_text if output.suffix == ".json" else bench_data.page)(made, known))
    if made.stopped:
        raise typer.Exit(128 + made.stopped)


@app.command("roofline")
def bench_roofline(
    models: Annotated[
        str, typer.Option(help="Comma list: sizes and names of timm.")
    ] = "hcnet_tiny,swin_tiny_patch4_window7_224,convnext_tiny",
    mode: Annotated[str, typer.Option(help="Comma list of infer and train.")] = "infer",
    precision: Annotated[str, typer.Option(help="Of weights and activations: fp32, bf16 or fp16.")] = "bf16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    img_size: Annotated[int, typer.Option(min=8, help="Height and width of the images.")] = 224,
    bandwidth: Annotated[
        float, typer.Option(min=0.001, help="TB/s of the device's memory (default: an H100's).")
    ] = 3.35,
    rate: Annotated[
        float, typer.Option(min=0.001, help="TFLOP/s of dense matrix products (default: an H100's in bf16).")
    ] = 989,
    output: options.Output = None,
) -> None:
    """Estimate on paper: operations and bytes of each kind of layer, and the time that a device needs at least."""
    from hcnet_cli.bench.choices import check_output, choices

    check_output(output)
    asked = choices(models, mode, precision)  # before PyTorch is loaded, which takes seconds
    if len(asked.precisions) > 1 or "reference" in asked.models:
        raise UserError("An estimate is of one precision, and of sizes and names of timm.")
    from hcnet_cli.bench import roofline
    from hcnet_cli.files import write_output
    from hcnet_cli.report import render

    machine = roofline.Machine(1e12 * bandwidth, 1e12 * rate, asked.precisions[0])
    made = [roofline.table(asked.models, one, batch_size, img_size, machine) for one in asked.modes]
    sys.stdout.write(render(made, "rich"))
    if output is not None:
        write_output(output, (roofline.json_text if output.suffix == ".json" else roofline.page)(made))
