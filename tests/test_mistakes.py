"""300 mistakes, each answered by one sentence: exit code 2, nothing on standard output, nothing written, no traceback.

They are found before PyTorch is loaded, so each takes some milliseconds.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Hcnet

from hcnet_cli.recipe import recipes_dir

PACKAGE = Path(__file__).parent.parent / "hcnet_cli"
TRAINING = ("pretrain --data digits", "finetune-det --data digit-scenes", "finetune-seg --data digit-stuff")


def each(commands: tuple[str, ...], table: str) -> Iterator[tuple[str, str]]:
    """A line `arguments | words` for each command."""
    for command in commands:
        for line in table.strip().splitlines():
            arguments, words = line.rsplit(" | ", 1)
            yield f"{command} {arguments.strip()}", words.strip()


SHARED = """
--recipe nowhere.yaml | There is no recipe file nowhere.yaml.
--recipe imagent | There is no recipe "imagent".
--recipe empty.yaml | is not a mapping
--recipe list.yaml | is not a mapping
--recipe cycle.yaml | anchors
--recipe deep.yaml | more than 20 levels
--recipe digits.yaml | more than 30 digits
--recipe latin.yaml | is not UTF-8 text
--recipe folder.yaml | There is no recipe file
--recipe pipe.yaml | There is no recipe file
--recipe control.yaml | U+001B
--recipe tag.yaml | tags
--recipe twice.yaml | appears twice
--recipe key.yaml | a key must be text
--recipe task.yaml | unknown task "train"
--set | requires an argument
--set optim.lr | is not KEY=VALUE
--set =3 | is not KEY=VALUE
--set optim.lr=[ | is not valid YAML
--set optim.lr=&a | anchors
--set optim.lrr=1 | Did you mean "optim.lr"?
--set optim=1 | It is a section
--set lr=1 | unknown recipe key "lr"
--set optim.lr.x=1 | unknown recipe key "optim.lr.x"
--set optim.lr=fast | it takes a number above 0 and of at most 100.
--set optim.lr=-1 | "optim.lr" cannot be -1
--set optim.lr=0 | "optim.lr" cannot be 0
--set optim.lr=null | "optim.lr" cannot be null
--set optim.lr=true | "optim.lr" cannot be true
--set optim.lr=[1,2] | "optim.lr" cannot be [1, 2]
--set optim.lr=1e9 | "optim.lr" cannot be 1000000000.0
--set optim.lr=nan | "optim.lr" cannot be "nan"
--set optim.lr=1e999 | "optim.lr" cannot be Infinity
--set optim.weight_decay=-1 | from 0 to 10.
--set optim.betas=[1.5,0.9] | at least 0 and below 1
--set optim.eps=-1 | above 0 and of at most 1
--set optim.clip_grad=0 | "optim.clip_grad" cannot be 0
--set optim.no_decay=2d | it takes 1d or norm.
--set optim.args=3 | it takes a mapping
--set schedule.kind=cosin | Did you mean "cosine"?
--set schedule.length=0 | from 1 to 100,000,000.
--set schedule.length=1.5 | it takes a whole number
--set schedule.milestones=[3,1] | each number must be above the one before
--set schedule.milestones=3 | it takes a list of whole numbers
--set schedule.gamma=2 | above 0 and below 1
--set schedule.power=0 | above 0 and of at most 10
--set schedule.warmup=-1 | "schedule.warmup" cannot be -1
--set schedule.min_lr=90 --set schedule.kind=cosine | from 0 to 0.1
--set train.batch_size=0 | from 1 to 1,048,576.
--set train.batch_size=10000000000000 | from 1 to 1,048,576.
--set train.accumulate=5 | does not divide
--set train.seed=-1 | "train.seed" cannot be -1
--set train.seed=4294967296 | below 4,294,967,296
--set train.seed=1:30 | "train.seed" cannot be "1:30"
--set train.seed=0x10 | "train.seed" cannot be "0x10"
--set train.ema_decay=1 | above 0 and below 1, or null
--set train.precision=fp8 | auto, fp32, bf16 or fp16
--set train.workers=-1 | from 0 to 1,024
--set train.compile=maybe | true or false
--set train.log_every=0 | "train.log_every" cannot be 0
--set train.save_every=0 | "train.save_every" cannot be 0
--set model.size=xl | unknown size
--set model.depths=[0,0,0,0] | a list of 4 whole numbers from 1 to 1,000
--set model.depths=4 | a list of 4 whole numbers
--set model.dims=[1,2,3,4] | from 4 to 16,384
--set model.kernel_size=4 | it takes an odd number
--set model.mlp_ratio=0 | "model.mlp_ratio" cannot be 0
--set model.drop_path_rate=1 | below 1
--set model.disable=gate | it takes a list of texts
--set model.disable=[gat] | unknown component
--set model.disable=[conduction,gate] | without conduction there is no gate
--set model.args.x=1 | model.args
--set data.std=[0,0,0] | a list of 3 numbers from 0.001 to 1
--set data.mean=[123,116,103] | a list of 3 numbers from 0 to 1
--set data.hflip=50% | "data.hflip" cannot be "50%"
--set data.format=tfrecord | "data.format" cannot be "tfrecord"
--set head.kind=mlp | "head.kind" cannot be "mlp"
--set protocol= | "protocol" cannot be null
--set init= | "init" cannot be null
--lr -1 | --lr: "optim.lr" cannot be -1
--lr fast | it takes a number.
--seed -1 | --seed: "train.seed" cannot be -1
--seed 1.5 | it takes a whole number.
--batch-size 0 | --batch-size: "train.batch_size" cannot be 0
--workers -1 | --workers: "train.workers" cannot be -1
--precision fp8 | --precision: "train.precision" cannot be "fp8"
--device gpu | There is no device "gpu".
--model resnet5o | Did you mean "resnet50"?
--size xl | --size: "model.size" cannot be "xl"
--data-trust no | it takes content or names
--name ../x | is not the name of a folder
--name= | is not the name of a folder
--eval-only --fresh | cannot be combined with --fresh
--eval-only --dry-run | cannot be combined with --dry-run
--eval-only --on slurm | cannot be combined with --on
--init nowhere | There is no weights file nowhere.
--init empty | has no best.safetensors
--data nowhere | does not exist
--data empty.yaml | is a file, not a folder
--data empty | is not laid out as
--data images --recipe digits.yaml | more than 30 digits
--sed 1 | No such option
extra | unexpected extra argument
"""
PRETRAIN = """
--epochs 0 | --epochs: "schedule.length" cannot be 0
--epochs one | it takes a whole number.
--recipe small --epochs 3 | This recipe counts steps, not epochs. Use --steps N;
--recipe coco-1x | hcnet finetune-det --recipe coco-1x
--recipe finetune-seg/digit-stuff | is for finetune-seg, not for pretrain
--steps 3 | This recipe counts epochs, not steps. Use --epochs N;
--set optim.wd=0.1 | Did you mean "optim.weight_decay"?
--set data.auto_augment=none | for none, write null
--set data.auto_augment=rand-m9-mstd | a policy of timm
--set data.mixup=-1 | from 0 to 100
--set data.color_jitter=-1 | from 0 to 1, or null
--set data.ratio=[0,1] | a list of 2 numbers from 0.1 to 10
--set data.ratio=[1.3,0.7] | the first number must not be above the second
--set data.scale=[5,9] | a list of 2 numbers from 0.001 to 1
--set data.crop_pct=100 | from 0.1 to 1
--set data.img_size=1 | from 8 to 16,384
--set data.smoothing=1.0 | below 1
--set data.re_mode=black | pixel, const or rand
--set data.interpolation=nearest | bicubic or bilinear
--set evaluation.val.when=end | must be training
--set evaluation.x-y.when=end | use letters and digits
--set evaluation.val.crop=1 | unknown key "evaluation.val.crop"
--set evaluation.other.when=training | cannot be training
"""
DETECTION = """
--schedule 2x | There is no recipe "coco-2x"
--schedule 1x --recipe coco-1x | names a recipe; --recipe does too
--eval-backend coco | faster-coco-eval or pycocotools
--epochs 0 | "schedule.length" cannot be 0
--set data.img_scale=800 | a list of 2 whole numbers from 8 to 16,384
--set data.crop_range=[600,384] | the first number must not be above the second
--set head.score_thresh=1 | below 1
--set head.fpn_channels=0 | from 4 to 16,384
"""
SEGMENTATION = """
--steps 0 | --steps: "schedule.length" cannot be 0
--epochs 1 | Use --steps N;
--eval-mode tiles | whole or slide
--set data.ratio_range=[2,0.5] | the first number must not be above the second
--set data.ignore_index=256 | from 0 to 255
--set evaluation.ms.scales=[] | a list of one or more numbers
--set head.pool_scales=[0] | from 1 to 64
--set data.multi_scale=[1] | training, end or asked
"""
OTHERS = """
ablate | Name components to --disable, a --study, or a field to --sweep
ablate --disable gat | Did you mean "gate"?
ablate --disable conduction+gate | without conduction there is no gate
ablate --disable gate --study stencil | leave one out
ablate --disable gate --seeds 0,0 | names a seed twice
ablate --disable gate --seeds one | is not a list of whole numbers
ablate --disable gate --seeds 99999999999 | is not a list of whole numbers
ablate --disable gate --margin -1 | --margin cannot be -1.0: it takes a number above 0
ablate --disable gate --test wilcoxon | --test cannot be "wilcoxon": it takes paired-t or sign-flip.
report --out nowhere | --results: Results folder
report nowhere | --results: Results folder
pretrain --recipe imagenet --data images --batch-size 5 | a micro-batch of 5 is odd
pretrain --output nowhere | --out: Results folder
ablate --disable gate --seed 3 | Seeds: --seeds 0,1,2.
ablate --disable gate --init none | Weights: init, under runs in a study.
ablate --disable gate --lr 0.1 | Use --set optim.lr=...
ablate --disable gate --jobs 0 | it takes numbers of at least 1.
ablate --disable gate --set optim.lr=-1 | "optim.lr" cannot be -1
ablate --disable gate --set train.seed=1 | cannot be set in an ablation
ablate --disable gate --data nowhere | does not exist
ablate --disable gate --data empty | is not laid out as
ablate --disable gate --task train | unknown task "train"
ablate --study nowhere.yaml | There is no study file nowhere.yaml.
ablate --study component | Did you mean "components"?
ablate --study cycle.yaml | anchors
ablate --study empty.yaml | is not a mapping
ablate --study seeds.yaml | a repeated seed is no new evidence
ablate --study one.yaml | a study needs at least two arms
ablate --study names.yaml | cannot be the name of an arm
ablate --study equal.yaml | are the same recipe
ablate --study huge.yaml | more than 5,000
ablate --study latin.yaml | is not UTF-8 text
report --format pdf | pdf
report --results nowhere | There is no results folder nowhere.
report --watch --format csv | --watch serves a page, not csv.
report --watch --output all.md | --watch refreshes a page.
report --port 1 | --port is that of the page that --watch serves.
report --compare run | hcnet report --compare results/runs/RUN results/runs/OTHER
report --compare run run | are one run
report --compare run other --format csv | --format has no place
report --check tables --format csv | has no place
report --published nowhere.csv | nowhere.csv
report --table imagenett | imagenett
recipes show imagenett | There is no recipe "imagenett"
recipes show nowhere.yaml | There is no recipe file nowhere.yaml.
recipes show latin.yaml | is not UTF-8 text
recipes cp latin.yaml mine.yaml | is not UTF-8 text
recipes explain optim.lrr | Did you mean "optim.lr"?
recipes cp digits mine.txt | does not end in .yaml.
recipes cp digits seeds.yaml | exists and was left alone.
recipes cp digits nowhere/mine.yaml | cannot be written
recipes cp imagent mine.yaml | There is no recipe "imagent"
recipes list | No such command
evaluate | Missing argument
evaluate x --set optim.lr | is not KEY=VALUE
evaluate x --set a=[ | is not valid YAML
pretrain --workers one | it takes auto, or a whole number
check | Missing argument
check nowhere | does not exist
check nowhere.json | does not exist
check empty.yaml | is a file, not a folder
check digits --output mine.txt | does not end in .json.
check digits --recipe latin.yaml | is not UTF-8 text
check digits --set data.std=[0,0,0] | a list of 3 numbers
bench --rounds 0 | it takes numbers of at least 1.
bench --img-size 1 | Invalid value
bench --batch-size 0 | Invalid value
bench --threads 0 | Invalid value
bench data --workers -1 | Invalid value
bench data --batch-size 0 | Invalid value
explain | Missing argument
explain --run x | No such option
train | No such command
--verion | No such option
"""
MISTAKES = [
    *each(TRAINING, SHARED),
    *each(TRAINING[:1], PRETRAIN),
    *each(TRAINING[1:2], DETECTION),
    *each(TRAINING[2:], SEGMENTATION),
    *each(("",), OTHERS),
]
FILES: dict[str, str | bytes] = {
    "empty.yaml": "",
    "list.yaml": "- 1",
    "cycle.yaml": "a: &x [*x]",
    "deep.yaml": "[" * 10_000,
    "digits.yaml": f"a: {'9' * 5000}",
    "latin.yaml": "title: é".encode("latin-1"),
    "control.yaml": "a: \x1b[31m",
    "tag.yaml": "a: !!python/object/apply:os.system [ls]",
    "twice.yaml": "a: 1\na: 2",
    "key.yaml": "? [a]\n: 1",
    "task.yaml": "task: train",
    "seeds.yaml": "title: x\narms: {a: {}, b: {model.kernel_size: 3}}\nseeds: [0, 0]",
    "one.yaml": "title: x\narms: {a: {}}",
    "names.yaml": "title: x\narms: {a: {}, ../b: {}}",
    "equal.yaml": "title: x\narms: {a: {}, b: {}}",
    "huge.yaml": "title: x\narms: {a: {}"
    + "".join(f", b{n}: {{optim.lr: {n / 1e4}}}" for n in range(1, 90))
    + f"}}\nseeds: {list(range(60))}",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are wrong."""
    folder = tmp_path_factory.mktemp("desk")
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("folder.yaml", "empty", "tables", "images/train"):
        (folder / name).mkdir(parents=True)
    os.mkfifo(folder / "pipe.yaml")
    return folder


def test_there_are_300() -> None:
    assert len(dict(MISTAKES)) == len(MISTAKES) >= 300


@pytest.mark.parametrize("start", range(0, len(MISTAKES), 25))
def test_a_mistake_is_one_sentence(
    start: int, hcnet: Hcnet, desk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    for command, words in MISTAKES[start : start + 25]:
        arguments = command.split()
        training = arguments[0] in ("pretrain", "finetune-det", "finetune-seg", "ablate")
        done = hcnet(*arguments, *(("--out", tmp_path / "out") if training and arguments[-1] != "--set" else ()))
        said = " ".join(done.err.replace("│", " ").split())
        assert (done.code, words in said) == (2, True), (command, done.out + done.err)
        assert "Traceback" not in done.err
        assert done.out == "", command
        assert len(done.err) < 1200, command
        if done.err.startswith("error: "):
            sentence, *hint = done.err.removeprefix("error: ").splitlines()
            assert len(hint) <= 1, (command, done.err)
            assert reads_well(sentence), (command, sentence)
    assert sorted(desk.rglob("*")) == before
    assert not (tmp_path / "out").exists()


# --- every sentence ---------------------------------------------------------------------------------------------------

CODE_WORDS = ("argv", "tuple", "NoneType", "kwargs", "pydantic", "dtype", "bool", "stdin", "ndarray", "regex")


def reads_well(text: str) -> bool:
    """One or two sentences that end as sentences do, without double spaces and words that only the code knows."""
    return bool(
        re.search(r"[.?!:)]$", text)
        and not re.search(r"  |\.\.$|\.\. | [,;]| \.(?![a-z])|:\.$", text.replace(" ...", "").replace("...", ""))
        and not any(re.search(rf"\b{word}\b", text) for word in CODE_WORDS)
    )


def sentences() -> Iterator[tuple[str, str]]:
    """(place, text) of what is raised as UserError, warned of or noticed; "x" stands for what is filled in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("UserError", "RunFailed", "warn", "notice") and node.args:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", literal(node.args[0])


def literal(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    return "x"


def test_every_sentence_reads_well() -> None:
    wrong = []
    found = [(place, text) for place, text in sentences() if text != "x"]
    for place, text in found:
        begins = re.match(r'[A-Z"`x-]|[a-z.]+( x)?: |fp16|mIoU', text)  # a name, or what the sentence is about
        ends = text.endswith((".", "?", "x", ":", "...", "%")) or not text.rstrip("x").endswith((" ", ","))
        plain = reads_well(text if text.endswith((".", "?")) else f"{text}.")
        if not (begins and ends and plain) or len(re.findall(r"[.?!] [A-Z]", text)) > 2:
            wrong.append(f"{place}: {text}")
    assert not wrong, "\n".join(wrong)
    assert len(found) > 200


def test_mistakes_in_data_are_found_without_pytorch(desk: Path) -> None:
    """What is typed wrong is answered at once: loading PyTorch takes seconds."""
    for arguments in (
        ["pretrain", "--data", "nowhere"],
        ["finetune-seg", "--data", "empty"],
        ["pretrain", "--data", "digits", "--init", "nowhere"],
        ["check", "nowhere"],
        ["ablate", "--disable", "gate", "--data", "nowhere"],
    ):
        code = (
            f"import sys; sys.argv = {['hcnet', *arguments]}\n"
            "from hcnet_cli.cli import main\n"
            "try: main()\n"
            "except SystemExit as stop: sys.exit(99 if 'torch' in sys.modules else stop.code)"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True).returncode == 2, arguments


def test_a_long_recipe_is_refused_at_once(tmp_path: Path, hcnet: Hcnet) -> None:
    """30,000 keys took 45 seconds: PyYAML's own time, and a count of all keys for each."""
    text = (recipes_dir() / "pretrain" / "digits.yaml").read_text()
    file = tmp_path / "long.yaml"
    for count, words in ((30_000, "more than 10,000"), (4000, "unknown key")):
        file.write_text(text + "".join(f"key{n}: 1\n" for n in range(count)))
        begun = time.process_time()
        done = hcnet("pretrain", "--recipe", file, "--data", "digits")
        assert done.code == 2
        assert words in done.err
        assert time.process_time() - begun < 10


def test_an_option_given_twice_is_said(hcnet: Hcnet) -> None:
    """Of an option that takes one value the last counts, as in other programs; others may be repeated."""
    done = hcnet("report", "--table", "coco", "--table=all", "--results", "nowhere")
    assert "warning: --table: given 2 times; the last one counts." in done.err
    done = hcnet("finetune-det", "--masks", "--no-masks", "--lr", "-1")
    assert "warning: --masks and --no-masks: given 2 times" in done.err
    assert "given" not in hcnet("pretrain", "--set", "optim.lr=1", "--set", "optim.lrr=1").err
