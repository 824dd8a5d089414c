"""The rows behind every table: what is averaged, what is compared with what, and published files with mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from scipy import stats
from synthetic_runs import make_run

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError
from hcnet_cli.published import read_published, shipped_published
from hcnet_cli.record import record_text
from hcnet_cli.results import Results, collect, metric_notes, tables
from hcnet_cli.table import Value
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.spec import Column, Metric

IMAGENET_INIT = {"source": "results/runs/pretrain-imagenet-1k-t-s0-0123abcd"}


def rows_of(found: Results, kind: str = "measured") -> list[Mapping[str, Value]]:
    return [row.values for row in found.rows if row.kind == row.values["kind"] == kind]


def measured(*folders: Path, kind: str = "measured") -> list[Mapping[str, Value]]:
    return rows_of(collect(folders), kind)


def test_seeds_are_one_row_with_mean_and_t_interval(tmp_path):
    """The mean and its 95 % interval over seeds are what scipy's t distribution gives."""
    values = [98.1, 98.9, 97.7, 98.6]
    for seed, value in enumerate(values):
        make_run(tmp_path, seed=seed, score=value)
    (row,) = measured(tmp_path)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert row["top1"] == pytest.approx(sum(values) / 4)
    assert row["top1_ci"] == pytest.approx((high - low) / 2)
    assert (row["n"], row["seeds"]) == (4, "0, 1, 2, 3")


def test_the_schedule_is_that_of_the_protocol_or_the_number_of_steps(tmp_path):
    """Not what the name of the data looks like, nor a protocol's length that was changed."""
    for number, (changes, schedule) in enumerate([({}, "1x"), ({"schedule.length": 3}, "87,948 steps")]):
        make_run(tmp_path / str(number), "coco", changes=changes)
        (row,) = measured(tmp_path / str(number))
        assert row["schedule"] == schedule
    folder = make_run(tmp_path / "own", "coco")
    info = runs.read_record(folder / "run.json")
    data = info.data.model_copy(update={"name": "10k-images"})
    (folder / "run.json").write_text(record_text(info.model_copy(update={"data": data})))
    assert measured(tmp_path / "own")[0]["schedule"] == "87,948 steps"


def test_one_seed_has_no_interval(tmp_path):
    make_run(tmp_path, score=98.2)
    (row,) = measured(tmp_path)
    assert row["top1"] == 98.2
    assert row["top1_ci"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"changes": {"optim.lr": 0.1}},
        {"variant": "no-gate"},
        {"steps_total": 880, "steps_done": 880},
        {"batch_size": 32},
        {"precision": "bf16"},
        {"protocol": "pretrain/other"},
        {"init": {"source": "weights.safetensors"}},
        {"img_size": 64},
        {"metric_notes": {"top1": "center crop"}},
        {"evaluated_only": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unlike_runs_are_not_averaged(tmp_path, change):
    """Each thing that shapes a result, when it differs, makes a row of its own."""
    make_run(tmp_path, seed=0, score=90)
    make_run(tmp_path, seed=1, score=92, **change)
    assert [row["n"] for row in measured(tmp_path)] == [1, 1]


def test_an_evaluation_of_ones_own_has_a_column_and_only_columns_are_explained(tmp_path):
    metrics = {"top1": 90.0, "top5": 99.0, "top1_large": 91.0, "top5_large": 99.5, "top1_95_lower": 88.0}
    notes = {"top1_large": "48 x 48, crop 1", "top1_95": "bootstrap", "ece": "15 bins"}
    make_run(tmp_path, metrics=metrics, metric_notes=notes)
    make_run(tmp_path, variant="no-gate")
    table = next(table for table in tables(collect([tmp_path]), "imagenet") if table.measured)
    (column,) = (column for column in table.columns if column.key == "top1_large")
    assert [table.show(row, column) for row in table.rows] == ["91.00", "–"]
    assert [note for note in table.notes if note.startswith("Evaluation")] == [
        "Evaluation: top1_large: 48 x 48, crop 1."
    ]
    (values,) = (row.values for row in table.rows if not row.values["variant"])
    assert (values["top1_large"], values["top5_large"]) == (91.0, 99.5)


def test_image_size_is_what_the_run_was_trained_at(tmp_path):
    """Older records of detection have the height that MACs are counted at; they are averaged with newer ones."""
    for seed, recorded in enumerate((800, 128)):
        run = make_run(tmp_path, "digit-scenes", seed=seed, img_size=recorded, macs_input="3x800x1280")
        recipe = rcp.resolve(rcp.recipe_file("finetune-det/digit-scenes"), [("data.img_scale", [192, 128], "")]).recipe
        (run / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
    (row,) = measured(tmp_path)
    assert (row["n"], row["img_size"], row["macs_input"]) == (2, 128, "3x800x1280")


def test_figures_beside_the_metrics_divide_no_row_and_are_averaged_where_they_are_made_alike(tmp_path):
    make_run(tmp_path, seed=0, score=90)  # from before the figure was computed
    titles = {column.title for table in tables(collect([tmp_path]), "imagenet") for column in table.columns}
    assert "ECE (%)" not in titles
    for seed, (ece, bins) in enumerate([(2.0, "15 bins"), (3.0, "15 bins"), (9.0, "10 bins")], 1):
        metrics = {"top1": 90.0, "top5": 99.0, "ece": ece}
        make_run(tmp_path, seed=seed, metrics=metrics, metric_notes={"ece": bins})
    (row,) = measured(tmp_path)
    assert (row["n"], row["ece"]) == (4, None)  # one lacks it
    for seed in (0, 3):
        shutil.rmtree(next((tmp_path / "runs").glob(f"*-s{seed}-*")))
    (row,) = measured(tmp_path)
    assert (row["n"], row["ece"]) == (2, 2.5)
    assert metric_notes({"ece": "15 bins", "ece_a": "15 bins", "top1_a": "A"}) == "ece: 15 bins; top1_a: A"
    table = next(one for one in tables(collect([tmp_path]), "imagenet") if one.measured)
    assert "ECE (%)" in [column.title for column in table.columns]
    make_run(tmp_path, seed=4, metrics={"top1": 90.0, "top5": 99.0, "ece": 9.0}, metric_notes={"ece": "10 bins"})
    (row,) = measured(tmp_path)
    assert (row["n"], row["ece"]) == (3, None)  # one has another protocol


def test_a_protocol_of_no_shipped_name_hides_no_difference(tmp_path):
    """Seeds at lr 3e-3, 1e-6, 3e-3 of a recipe of the user's own: two rows, and each says its learning rate."""
    digits = rcp.recipes_dir() / "pretrain" / "digits.yaml"
    for seed, lr in enumerate((3e-3, 1e-6, 3e-3)):
        recipe = rcp.resolve(digits, [("optim.lr", lr, ""), ("train.seed", seed, ""), ("protocol", "mine", "")]).recipe
        config = rcp.config_digest(recipe, "digits-digest", "")
        data, identity = "digits-digest", runs.run_fingerprint(recipe, "digits-digest", "")
        folder = make_run(tmp_path, seed=seed, protocol="mine", config=config, fingerprint=identity)
        info = runs.read_record(folder / "run.json").model_copy(update={"altered": False})
        assert info.data.digest == data
        (folder / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
        runs.RunFolder(folder).write(info)
    rows = measured(tmp_path)
    assert sorted((row["seeds"], row["changes"]) for row in rows) == [
        ("0, 2", "optim.lr=0.003"),
        ("1", "optim.lr=1e-06"),
    ]


def start(digest, seed=None):
    return {"source": "weights.safetensors", "digest": digest, "seed": seed}


@pytest.mark.parametrize(
    ("starts", "n"),
    [
        ([start("a"), start("a")], [2]),
        ([start("a"), start("b")], [1, 1]),
        ([start("a", 0), start("b", 1)], [2]),  # each from the pretraining of its own seed
        ([start("a", 5), start("b", 6)], [1, 1]),
    ],
)
def test_initial_weights_are_compared_by_digest(tmp_path, starts, n):
    for seed, one in enumerate(starts):
        make_run(tmp_path, "digit-scenes", seed=seed, init=one)
    rows = measured(tmp_path)
    assert [row["n"] for row in rows] == n
    assert len({row["changes"] for row in rows}) == len(n)


def test_equal_weights_under_two_seeds_are_one(tmp_path):
    for seed in range(3):
        make_run(tmp_path, seed=seed, weights="same" if seed < 2 else "other")
    found = collect([tmp_path])
    (row,) = rows_of(found)
    assert row["seeds"] == "0, 2"
    assert "to the byte" in found.notes[0]


def test_changes_are_written_as_set_takes_them(tmp_path):
    changes = {"data.auto_augment": None, "train.compile": True, "model.disable": ["gate", None], "optim.lr": 0.1}
    make_run(tmp_path, changes=changes)
    text = "data.auto_augment=null, train.compile=true, model.disable=[gate, null], optim.lr=0.1"
    assert measured(tmp_path)[0]["changes"] == text


def test_an_unfinished_run_has_the_epochs_that_it_did(tmp_path):
    make_run(tmp_path, steps_done=110, steps_total=440, steps_per_epoch=22, status="interrupted")
    (row,) = rows_of(collect([tmp_path]), "unfinished")
    assert row["epochs"] == 5


def test_epochs_are_those_of_the_loader(tmp_path):
    """Two aspect groups that each leave a remainder: 6 images, batch 2, but 2 steps an epoch."""
    make_run(tmp_path, "digit-scenes", steps_total=6, steps_done=6, best_step=6, batch_size=2, steps_per_epoch=2)
    assert measured(tmp_path)[0]["epochs"] == 3


def test_data_of_other_content_is_not_averaged(tmp_path):
    """Two data sets of one name but other files are two data sets."""
    make_run(tmp_path, seed=0)
    other = make_run(tmp_path, seed=1)
    record = json.loads((other / "run.json").read_text())
    record["data"]["digest"] = "something else"
    (other / "run.json").write_text(json.dumps(record))
    assert [row["n"] for row in measured(tmp_path)] == [1, 1]


def test_fine_tuning_seeds_from_pretraining_seeds_are_one_row(tmp_path):
    """Seed 0 from pretraining seed 0 and seed 1 from seed 1 are one experiment; without pretraining is another."""
    for seed in range(2):
        make_run(tmp_path, "digit-scenes", seed=seed)
        make_run(tmp_path, "digit-scenes", seed=seed, init={}, name=f"none-{seed}", fingerprint=f"none{seed}")
    rows = measured(tmp_path)
    assert [row["n"] for row in rows] == [2, 2]
    assert sorted(row["changes"] for row in rows) == ["", "not pretrained"]


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "finished"])
def test_unfinished_runs_are_labelled_and_never_averaged(tmp_path, status):
    """Also a record that says finished with steps missing."""
    make_run(tmp_path, seed=0, score=98)
    make_run(tmp_path, seed=1, score=10, done=0.5, status=status)
    (row,) = measured(tmp_path)
    assert (row["top1"], row["n"]) == (98, 1)
    (row,) = measured(tmp_path, kind="unfinished")
    assert row["status"] == ("cut short" if status == "finished" else status)


def test_the_same_run_in_two_folders_counts_once(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    make_run(a, seed=0)
    make_run(a, seed=1)
    shutil.copytree(a, b)
    found = collect([a, b, a])
    assert len(found.runs) == 2
    assert not found.notes
    assert [row["n"] for row in rows_of(found)] == [2]


@pytest.mark.parametrize("swap", [False, True])
def test_of_two_records_of_a_run_the_finished_one_is_used(tmp_path, swap):
    a, b = (tmp_path / name for name in (("b", "a") if swap else ("a", "b")))
    make_run(a, score=98, name="x", fingerprint="f")
    make_run(b, score=40, name="x", fingerprint="f", done=0.5, status="running")
    found = collect([tmp_path / "a", tmp_path / "b"])
    assert [run.folder.parent.parent for run in found.runs] == [a]
    assert "2 different records of x" in found.notes[0]


def test_a_repeated_seed_is_no_second_sample(tmp_path):
    """The same seed run again under another name must not narrow the interval."""
    make_run(tmp_path, seed=0, name="first")
    make_run(tmp_path, seed=0, name="again", fingerprint="ffffffff")
    found = collect([tmp_path])
    assert [row["n"] for row in rows_of(found)] == [1]
    assert "the same seed" in found.notes[0]


def test_a_mean_needs_the_metric_of_every_seed(tmp_path):
    make_run(tmp_path, "digit-stuff", seed=0)
    make_run(tmp_path, "digit-stuff", seed=1, metrics={"mIoU": 70.0})
    (row,) = measured(tmp_path)
    assert row["mIoU"] > 0
    assert row["mIoU_ms"] is None


def test_speeds_of_two_machines_are_not_averaged(tmp_path):
    make_run(tmp_path, seed=0, images_per_second=100.0)
    make_run(tmp_path, seed=1, images_per_second=300.0, machine="another")
    (row,) = measured(tmp_path)
    assert row["images_per_second"] is None


def test_another_backbone_is_a_row_of_its_own_under_its_name(tmp_path):
    """Runs of two models are never averaged, and another model is never compared with a published HcNet."""
    make_run(tmp_path, "imagenet-1k", "t", seed=0)
    other = make_run(tmp_path, "imagenet-1k", "t", seed=1, model="convnext_tiny", name="other") / "run.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "size": ""}))
    rows = measured(tmp_path)
    assert [(row["model"], row["n"]) for row in rows] == [("HcNet-T", 1), ("convnext_tiny", 1)]
    assert [row["reference"] for row in rows] == ["HcNet-T", None]


def test_weights_evaluated_without_training_say_so(tmp_path):
    """`--eval-only` on a checkpoint is a finished row of its own, labelled with where the weights came from."""
    fields = {"evaluated_only": True, "steps_total": 0, "steps_done": 0, "init": {"source": "hcnet_t.pth"}}
    make_run(tmp_path, "imagenet-1k", "t", score=82.9, **fields)
    (row,) = measured(tmp_path)
    assert row["changes"] == "evaluated only, weights of hcnet_t.pth"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["/opt/venv/bin/hcnet", "pretrain", "--set", "a=b c"], "hcnet pretrain --set 'a=b c'"),
        (["/x/hcnet_cli/__main__.py", "pretrain"], "python -m hcnet_cli pretrain"),
        ([], ""),
    ],
)
def test_commands_can_be_typed_again(tmp_path, argv, text):
    make_run(tmp_path, argv=argv)
    assert measured(tmp_path)[0]["command"] == text


# --- beside published rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "protocol", "beside"),
    [
        ("imagenet-1k", "pretrain/imagenet", "ImageNet-1K val, from scratch"),
        ("imagenet-1k", "pretrain/imagenet-release", "ImageNet-1K val, from scratch"),
        ("coco", "finetune-det/coco-1x", "Mask R-CNN 1x (multi-scale)"),
        ("coco", "finetune-det/coco-1x-single-scale", "Mask R-CNN 1x (single scale)"),
        ("coco", "finetune-det/coco-3x", "Mask R-CNN 3x"),
        ("ade20k", "finetune-seg/ade20k-160k", "UperNet 160k, 512x512"),
        ("imagenet-1k", "pretrain/digits", None),
        ("digits", "pretrain/imagenet", None),
        ("digit-scenes", "finetune-det/coco-1x", None),
        ("digit-stuff", "finetune-seg/ade20k-160k", None),
    ],
)
def test_measured_stands_beside_published_of_the_same_data_and_protocol_only(tmp_path, data, protocol, beside):
    make_run(tmp_path, data, "t", protocol=protocol)
    (row,) = measured(tmp_path)
    published = {row["protocol"] for row in measured(tmp_path, kind="published")}
    assert (row["protocol"] if row["protocol"] in published else None) == beside


def test_the_difference_is_to_the_row_the_recipe_names(tmp_path):
    make_run(tmp_path, "imagenet-1k", "t", score=82.71)
    (row,) = measured(tmp_path)
    assert row["difference"] == pytest.approx(82.71 - 83.0)
    assert row["reference"] == "HcNet-T"


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "s"},
        {"variant": "no-gate"},
        {"changes": {"train.batch_size": 1024}},
        {"init": {"source": "results/runs/pretrain-digits-t-s0-0123abcd"}},
        {"img_size": 384},
        {"evaluated_only": True, "steps_total": 0, "steps_done": 0},
        {"data": "digits"},
        {"done": 0.9, "status": "interrupted"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_no_difference_for_unlike_runs(tmp_path, fields):
    """Another size, shape, recipe, start, input, data set, or an unfinished run: not compared as if equal."""
    make_run(tmp_path, **({"data": "imagenet-1k", "size": "t"} | fields))
    assert all(row.values["difference"] is None for row in collect([tmp_path]).rows)


def test_a_benchmark_from_other_pretraining_is_labelled(tmp_path):
    make_run(tmp_path, "coco", "t", init={"source": "results/runs/pretrain-digits-t-s0-0123abcd"})
    make_run(tmp_path, "coco", "t", seed=1, init=IMAGENET_INIT)
    assert sorted(row["changes"] for row in measured(tmp_path)) == ["", "started from pretrain-digits-t"]


def test_a_new_task_needs_no_other_edit(tmp_path, monkeypatch):
    """A task that is only declared has runs, a table under its own name, and columns of its own."""
    spec = dataclasses.replace(
        TASKS["finetune-seg"], name="finetune-depth", table="depth", subject="depth estimation", starts_from="pretrain",
        benchmark="nyu", protocols={}, metrics=(Metric("delta1", "δ1"),),
        columns=(Column("model", "backbone"), Column("delta1", "δ1", "percent", best=True)),
    )  # fmt: skip
    monkeypatch.setitem(TASKS, spec.name, spec)
    make_run(tmp_path, "digit-stuff", task=spec.name, metrics={"delta1": 90.5})
    (table,) = tables(collect([tmp_path]), "depth")
    assert table.title == "digit-stuff val: depth estimation"
    assert [column.title for column in table.columns[:2]] == ["backbone", "δ1"]
    assert table.show(table.rows[0], table.columns[1]) == "90.50"


# --- published.csv --------------------------------------------------------------------------------------------------

HEADER = "table,protocol,model,img_size,params_m,top1,source\n"
GOOD = 'imagenet,"ImageNet-1K val, from scratch",HcNet-S,224,50,83.9,the paper\n'


def test_the_shipped_numbers_are_in_order():
    """Every shipped row has a source and a result; the abstract's HcNet-T is the only HcNet row."""
    rows = read_published([shipped_published()])
    assert len(rows) == 129
    assert [(r["model"], r["top1"], r["params_m"], r["macs_g"]) for r in rows if "HcNet" in r["model"]] == [
        ("HcNet-T", 83.0, 28, 4.1)
    ]


def test_a_users_rows_are_added(tmp_path):
    """From `published.csv` in a results folder and from a file that is named."""
    (tmp_path / "published.csv").write_text(HEADER + GOOD)
    more = tmp_path / "more.csv"
    more.write_text(HEADER + GOOD + GOOD.replace("HcNet-S", "HcNet-B"))
    rows = rows_of(collect([tmp_path], [more]), "published")
    assert [row["model"] for row in rows if row["source"] == "the paper"] == ["HcNet-S", "HcNet-B"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("top1", "top_1") + GOOD, 'unknown column "top_1". Did you mean "top1"?'),
        (HEADER.replace(",source", "") + GOOD.replace(",the paper", ""), "the column source is missing"),
        (HEADER.replace("img_size", "top1") + GOOD, "the column top1 appears twice"),
        (HEADER + GOOD.replace("83.9", "83,9"), "has 8 cells, the header 7"),
        (HEADER + GOOD.replace("83.9", "eighty"), 'line 2: "top1" is "eighty", not a number'),
        (HEADER + GOOD.replace("83.9", "8390"), "not between 0 and 100 (per cent)"),
        (HEADER + GOOD.replace("83.9", "0.839"), '"top1" is 0.839, which looks like a fraction'),
        (HEADER + GOOD.replace("83.9", "1"), '"top1" is 1, which looks like a fraction'),
        (HEADER + GOOD.replace("83.9", "nan"), "not between 0 and 100 (per cent)"),
        (HEADER + GOOD.replace("50", "-50"), "not a positive number"),
        (HEADER + GOOD.replace("83.9", ""), "no result in it"),
        (HEADER + GOOD.replace("the paper", " "), '"source" is empty'),
        (HEADER + GOOD.replace("imagenet,", "image-net,"), 'unknown table "image-net" (known: imagenet, coco, ade20k)'),
        (HEADER + GOOD.replace("-1K", "-1k"), 'Did you mean "ImageNet-1K val, from scratch"?'),
        (HEADER + GOOD + GOOD, 'line 3: "HcNet-S" appears twice'),
        (HEADER + GOOD.replace("HcNet-S", "HcNet-T"), "has other numbers than"),
        ("", "the column table is missing"),
        ("\xff\xfe", "is not UTF-8 text (line 1)"),
        (HEADER + GOOD.replace("50", "1e300"), 'line 2: "params_m" is 1e300, not a positive number up to 1,000,000'),
        (HEADER + GOOD.replace("the paper", "\x1b[2J"), "has a character that cannot be shown"),
        (HEADER + '"half', "line 2 cannot be read as CSV"),
    ],
)
def test_bad_published_files_are_one_clear_sentence(tmp_path, text, message):
    file = tmp_path / "mine.csv"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        collect([], [file])
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


# --- broken folders ---------------------------------------------------------------------------------------------------


def test_broken_folders_are_listed_and_the_rest_is_read(tmp_path):
    make_run(tmp_path)
    for name, text in [("empty", None), ("half", '{"schema_v'), ("new", '{"schema_version": 99}'), ("list", "[]")]:
        folder = tmp_path / "runs" / name
        folder.mkdir()
        if text is not None:
            (folder / "run.json").write_text(text)
    make_run(tmp_path, task="levitate", name="other")
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert [path.name for path, _ in found.broken] == ["empty", "half", "list", "new", "other"]
    assert all("\n" not in reason for _, reason in found.broken)


def test_a_run_whose_weights_are_gone_is_said(tmp_path):
    kept, lost = (make_run(tmp_path, seed=seed, weights="0" * 16) for seed in (0, 1))
    make_run(tmp_path, seed=2, done=0.5, status="interrupted")
    (kept / "best.safetensors").touch()
    (note,) = [note for note in collect([tmp_path]).notes if "best.safetensors" in note]
    assert lost.name in note
    assert kept.name not in note


def test_no_torch_behind_any_report():
    """Tables and the page are made on a laptop without torch."""
    code = (
        "import sys, pathlib; from hcnet_cli import report\n"
        "for fmt in report.FORMATS: report.report([pathlib.Path('nowhere')], fmt=fmt)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'torchvision', 'timm', 'matplotlib')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
