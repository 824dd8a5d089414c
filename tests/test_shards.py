"""Shards: a folder and its tars give one run, other tools read them, and what is wrong with a tar is one sentence."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_MODEL, Hcnet, only_run, outcome
from PIL import Image
from small_data import opened
from timm.data import create_dataset

from hcnet_cli import engine
from hcnet_cli.bench import data as bench_data
from hcnet_cli.cli import inspect
from hcnet_cli.console import UserError
from hcnet_cli.data import archive
from hcnet_cli.data.images import read_image
from hcnet_cli.tasks.classification import shards
from hcnet_cli.tasks.classification.image_folder import ImageFolder, scan

wds = pytest.importorskip("webdataset")
ODD_NAMES = ("1.png", "1.jpg", "2.JPEG", "3.a.jpg", "4%2Ejpg.png", "5.PNG.png", "deep/6.jpg", "7 é.webp", "8.jpg.jpg")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
IMAGE_KEYS = ("jpg", "png", "webp")  # timm's


def picture(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8))


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sharded(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of images as shards; training has several."""
    out = tmp_path_factory.mktemp("shards") / "out"
    shards.write(folder_of_images, out, 16_000)
    assert len(list(out.glob("train-*.tar"))) > 2
    return out


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose names are hard for WebDataset: several dots, two endings of one stem, %, spaces."""
    root = tmp_path_factory.mktemp("odd") / "folder"
    for seed, (split, label) in enumerate((split, label) for split in ("train", "val") for label in ("a.b", "c")):
        for number, name in enumerate(ODD_NAMES):
            file = root / split / label / name
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(100 * seed + number).save(file)
    shards.write(root, root.with_name("out"), 10**9)
    return root


# --- the same run -----------------------------------------------------------------------------------------------------


def train(hcnet: Hcnet, data: Path, results: Path, workers: int, *more: str) -> Any:
    return hcnet(
        *("pretrain", "--recipe", "small", "--data", data, "--out", results, "--batch-size", "8"),
        *("--set", "schedule.length=6", "--set", "schedule.warmup=0", "--set", "train.save_every=1000"),
        *("--set", "data.img_size=16", "--set", "train.eval_every=3", "--set", "train.eval_batch_size=5"),
        *("--workers", str(workers), "--device", "cpu", *SMALL_MODEL, *more),
    )


def test_a_folder_and_its_shards_give_one_run(
    folder_of_images: Path, sharded: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal name, weights, log and best.safetensors; also killed in the second epoch and resumed with more workers."""
    assert train(hcnet, folder_of_images, tmp_path / "folder", 0).code == 0
    expected = only_run(tmp_path / "folder")
    assert train(hcnet, sharded, tmp_path / "shards", 0).code == 0
    real = engine.loop.Stepper.step

    def killed(self: Any, step: int, batches: Any) -> Any:
        if step == 4:
            raise SystemExit(9)
        return real(self, step, batches)

    monkeypatch.setattr(engine.loop.Stepper, "step", killed)
    assert train(hcnet, sharded, tmp_path / "killed", 2).code == 9
    monkeypatch.setattr(engine.loop.Stepper, "step", real)
    assert "Going on from step 3" in train(hcnet, sharded, tmp_path / "killed", 3).err
    for results in (tmp_path / "shards", tmp_path / "killed"):
        assert only_run(results).name == expected.name
        assert outcome(only_run(results)) == outcome(expected)


def test_the_order_of_shards_is_another_run_that_goes_on_bit_for_bit(
    folder_of_images: Path, sharded: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a folder it is one sentence; the default leaves name and fingerprint as they are."""
    order = ("--data-order", "shards", "--set", "data.window=8")
    assert train(hcnet, sharded, tmp_path / "whole", 0, *order).code == 0
    real = engine.loop.Stepper.step

    def killed(self: Any, step: int, batches: Any) -> Any:
        if step == 4:
            raise SystemExit(9)
        return real(self, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop.Stepper, "step", killed)
        assert train(hcnet, sharded, tmp_path / "killed", 0, *order).code == 9
    assert "Going on from step 3" in train(hcnet, sharded, tmp_path / "killed", 2, *order).err
    assert outcome(only_run(tmp_path / "killed")) == outcome(only_run(tmp_path / "whole"))
    refused = train(hcnet, folder_of_images, tmp_path / "folder", 0, *order)
    assert refused.code == 2
    assert "--data-order shards is for images in tars" in refused.err
    plain, ordered = (opened(sharded, order=order).info.digest for order in ("images", "shards"))
    assert plain == scan(folder_of_images).digest
    assert ordered.startswith(f"{plain}-")


@pytest.mark.parametrize("trust", ["content", "names"])
def test_the_index_of_shards_is_that_of_the_folder(odd: Path, trust: Any) -> None:
    one, other = scan(odd, trust=trust), scan(odd.with_name("out"), trust=trust)
    assert one.digest == other.digest
    assert (one.classes, one.name) == (other.classes, other.name)
    for split in ("train", "val"):
        ours, theirs = (ImageFolder(index, split, lambda image: {}) for index in (one, other))
        names = [ours.sample_name(i) for i in range(len(ours))]
        assert names == [theirs.sample_name(i) for i in range(len(theirs))]
        assert sorted(names) == sorted(f"{split}/{label}/{name}" for label in ("a.b", "c") for name in ODD_NAMES)
        for i in range(len(ours)):
            assert theirs.sample_path(i).read() == Path(ours.sample_path(i)).read_bytes()
            assert np.array_equal(read_image(ours.sample_path(i)), read_image(theirs.sample_path(i)))


def test_shards_keep_the_order_of_the_folder_s_classes(tmp_path: Path) -> None:
    """Of folders 0 to 10 it is that of text, 0, 1, 10, 2; and a class without validation images keeps its place."""
    for number in range(11):
        for split in ("train", "val") if number != 1 else ("train",):
            folder = tmp_path / "folder" / split / str(number)
            folder.mkdir(parents=True)
            picture(number).save(folder / "1.png")
    shards.write(tmp_path / "folder", tmp_path / "out", 10**9)
    one, other = scan(tmp_path / "folder"), scan(tmp_path / "out")
    assert (one.classes[:4], one.digest) == (("0", "1", "10", "2"), other.digest)
    assert one.classes == other.classes
    assert one.val.labels.tolist() == other.val.labels.tolist()


def test_a_folder_without_validation_images_and_its_tars_give_one_run(
    folder_of_images: Path, tmp_path: Path, hcnet: Hcnet
) -> None:
    """With data.folds, which needs none; without, training says so."""
    shutil.copytree(folder_of_images / "train", tmp_path / "one" / "train")
    done = hcnet("shards", tmp_path / "one", tmp_path / "two")
    assert (done.code, "Wrote 24 training images as 1 tar. Without val/, cross-validate:" in done.err) == (0, True)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [archive.INFO, "train-000000.tar"]
    folds = ("--set", "data.folds=4", "--seed", "1")
    for name in ("one", "two"):
        assert train(hcnet, tmp_path / name, tmp_path / f"{name}-results", 0, *folds).code == 0
    assert outcome(only_run(tmp_path / "one-results")) == outcome(only_run(tmp_path / "two-results"))
    assert "has no val/ folder" in train(hcnet, tmp_path / "two", tmp_path / "results", 0).err


def test_check_says_the_same_of_both(folder_of_images: Path, sharded: Path, hcnet: Hcnet) -> None:
    one, other = hcnet("check", folder_of_images), hcnet("check", sharded)
    assert (one.code, one.out) == (other.code, other.out)


def test_the_same_folder_gives_the_same_bytes(folder_of_images: Path, sharded: Path, tmp_path: Path) -> None:
    shards.write(sharded, tmp_path / "again", 16_000)  # from the shards: their images are those of the folder
    for file in sharded.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


# --- other tools read them, and their tars are read -------------------------------------------------------------------


def test_webdataset_reads_every_sample(odd: Path) -> None:
    index = scan(odd)
    for split in ("train", "val"):
        files = ImageFolder(index, split, lambda image: {})
        expected = sorted(
            (Path(files.sample_path(i)).read_bytes(), int(files.files.labels[i])) for i in range(len(files))
        )
        samples = wds.WebDataset(str(odd.with_name("out") / f"{split}-000000.tar"), shardshuffle=False)
        found = [(sample[kind], int(sample["cls"])) for sample in samples for kind in IMAGE_KEYS if kind in sample]
        assert sorted(found) == expected


def test_timm_reads_every_sample(sharded: Path, folder_of_images: Path) -> None:
    ours = ImageFolder(scan(folder_of_images), "val", lambda image: {})
    theirs = create_dataset("wds/", root=str(sharded), split="val", batch_size=1, is_training=False)
    assert len(theirs) == len(ours)
    expected = sorted((read_image(ours.sample_path(i)).tobytes(), int(ours.files.labels[i])) for i in range(len(ours)))
    assert sorted((image.tobytes(), label) for image, label in theirs) == expected


def write_tar(
    path: Path, files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda entry: None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            change(entry)
            tar.addfile(entry, io.BytesIO(content))
    return path


def cls(name: str, seed: int, label: Any, form: str = "cls") -> dict[str, bytes]:
    text = str(label) if form == "cls" else json.dumps({"label": label, "width": 24})
    return {f"{name}.png": encoded(seed), f"{name}.{form}": text.encode()}


@pytest.mark.parametrize("form", ["cls", "json"])
def test_tars_of_webdataset(tmp_path: Path, form: str) -> None:
    """Classes are numbers, in their order: 10 comes after 2."""
    for number in range(2):
        files = {**cls(f"s{number}0", number, 10, form), **cls(f"s{number}1", 10 + number, 2, form)}
        write_tar(tmp_path / f"set-train-{number:04d}.tar", files)
    write_tar(tmp_path / "set-validation-0000.tar", {**cls("v0", 20, 2, form), **cls("v1", 21, 10, form)})
    index = scan(tmp_path)
    assert index.classes == ("2", "10")
    assert [index.train.name(i) for i in range(4)] == ["s01.png", "s11.png", "s00.png", "s10.png"]
    train_set = ImageFolder(index, "train", lambda image: {})
    assert [train_set.sample_path(i).read() for i in range(4)] == [encoded(seed) for seed in (10, 11, 0, 1)]
    assert scan(tmp_path).digest == index.digest


def test_a_nested_tar_of_imagenet_beside_a_folder(folder_of_images: Path, tmp_path: Path) -> None:
    """ILSVRC2012_img_train.tar holds a tar for each class; the digest is that of the unpacked folder."""
    shutil.copytree(folder_of_images / "val", tmp_path / "val")
    inner = {}
    for folder in sorted((folder_of_images / "train").iterdir()):
        made = write_tar(tmp_path / "made.tar", {file.name: file.read_bytes() for file in folder.iterdir()})
        inner[f"{folder.name}.tar"] = made.read_bytes()
    (tmp_path / "made.tar").unlink()
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    assert scan(tmp_path).digest == scan(folder_of_images).digest


def test_an_indexed_tar_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "train.tar", {"a/1.png": encoded(1)})
    first = archive.read(archive.find(tmp_path), "train")
    monkeypatch.setattr(archive, "_files", lambda *given: pytest.fail("listed again"))
    again = archive.read(archive.find(tmp_path), "train")
    assert (first.classes, first.members.offset.tolist()) == (again.classes, again.members.offset.tolist())
    monkeypatch.undo()
    write_tar(tar, {"b/1.png": encoded(1), "b/2.png": encoded(1)})
    assert archive.read(archive.find(tmp_path), "train").classes == ("b",)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def link(entry: tarfile.TarInfo) -> None:
    entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0


def device(entry: tarfile.TarInfo) -> None:
    entry.type, entry.size = tarfile.CHRTYPE, 0


@pytest.mark.parametrize(
    ("files", "change", "words"),
    [
        ({"a/1.png": b"x"}, link, "holds a link, a/1.png"),
        ({"a/1.png": b"x"}, device, "holds a device"),
        ({"/a/1.png": b"x"}, None, "leads out of it"),
        ({"a/../../1.png": b"x"}, None, "leads out of it"),
        ({"1.png": b"x"}, None, "no class is known of 1.png"),
        ({"1.png": b"x", "1.cls": b""}, None, "1.cls names no class"),
        ({"1.png": b"x", "1.json": b"[1"}, None, "1.json names no class"),
        ({"1.png": b"x", "1.cls": b"-1"}, None, "1.cls names no class"),
        ({"1.png": b"x", "1.json": b'{"label": -1}'}, None, "1.json names no class"),
        ({"a/1.png": b"x", "a/1.cls": b"0", "a/2.png": b"y"}, None, "a/2.png has no .cls or .json beside it, and 1 of"),
        ({"1.png": b"x", "1.jpg": b"x", "1.cls": b"0"}, None, "two images of the key 1"),
        ({"a/1.png": b"x", "./a/1.png": b"y"}, None, "a/1.png twice"),
    ],
)
def test_what_a_tar_must_not_hold(tmp_path: Path, files: Any, change: Any, words: str) -> None:
    write_tar(tmp_path / "val.tar", {"a/1.png": encoded(0)})
    write_tar(tmp_path / "train.tar", files, change or str)
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as raised:
        scan(tmp_path)
    assert str(raised.value).count(str(tmp_path / "train.tar")) == 1
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        *(("40KB", 40_000), ("40kB", 40_000), ("40kb", 40_000), ("0.5 mb", 500_000), ("2GB", 2 * 10**9)),
        *(("1KiB", 1024), ("1.5MiB", 3 * 2**19), ("1tib", 2**40), ("999B", 999)),
        *(("40", 0), ("40K", 0), ("40iB", 0), ("-1MB", 0), ("4 0MB", 0), ("40MBit", 0)),
    ],
)
def test_the_sizes_of_a_tar(size: str, num_bytes: int) -> None:
    assert inspect._num_bytes(size) == num_bytes


def test_what_a_tar_in_a_tar_must_not_hold_is_said_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "inner.tar", {"1.png": b"x"}, link)
    write_tar(tmp_path / "train.tar", {"a.tar": (tmp_path / "inner.tar").read_bytes()})
    with pytest.raises(UserError) as raised:
        archive.read(archive.find(tmp_path), "train")
    where = f"{tmp_path / 'train.tar'}:a.tar"
    assert str(raised.value) == f"{where} holds a link, 1.png: only regular files are read."


@pytest.mark.parametrize("kept", [700, 512 + 2048, 512 + 1024 + 512])
def test_a_truncated_tar(tmp_path: Path, kept: int) -> None:
    """Cut in a file, in a header, and between two files, which tarfile itself takes for the end."""
    tar = write_tar(tmp_path / "train.tar", {"a/1.png": b"x" * 1024, "a/2.png": b"y" * 1024})
    os.truncate(tar, kept)
    with pytest.raises(UserError, match="is truncated or damaged"):
        archive.read(archive.find(tmp_path), "train")


def test_classes_that_some_tars_of_a_split_write_and_others_do_not(tmp_path: Path) -> None:
    """Twice: the second time from the cached lists."""
    write_tar(tmp_path / "train-0.tar", {"a/1.png": encoded(0), "a/1.cls": b"0"})
    write_tar(tmp_path / "train-1.tar", {"a/2.png": encoded(1)})
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"train-1\.tar: a/2\.png has no \.cls or \.json beside it, and 1 of the 2 "
        ):
            archive.read(archive.find(tmp_path), "train")


def test_a_sample_in_two_tars(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"train-{number}.tar", {"a/1.png": encoded(number)})
    with pytest.raises(UserError, match=r"a/1\.png is there twice: in .*train-0\.tar and .*train-1\.tar"):
        archive.read(archive.find(tmp_path), "train")


def damage(sharded: Path, out: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(sharded, out)
    change(out / "train-000001.tar")
    return out


def exchange(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[512 + 60] ^= 1  # in the first image
    tar.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Path.unlink, "train-000001.tar is missing: "),
        (lambda tar: os.truncate(tar, 5000), "changed since .* was written: it has 5,000 bytes"),
        (exchange, "train-000001.tar changed since .* its content is another"),
    ],
)
def test_shards_that_are_not_what_was_written(
    sharded: Path, tmp_path: Path, hcnet: Hcnet, change: Any, words: str
) -> None:
    data = damage(sharded, tmp_path / "data", change)
    done = train(hcnet, data, tmp_path / "results", 0)
    assert done.code == 2
    assert re.search(words, " ".join(done.err.split()))
    with pytest.raises(UserError, match=words):
        scan(data)
    assert not (tmp_path / "results").exists()
    assert hcnet("check", data).code == 2


def test_a_gap_in_the_numbers_of_other_tars(tmp_path: Path) -> None:
    for number in (0, 2):
        write_tar(tmp_path / f"train-{number:03d}.tar", {f"a/{number}.png": encoded(number)})
    with pytest.raises(UserError, match=r"A shard is missing after .*train-000\.tar: .* number 2"):
        archive.find(tmp_path)


def test_compressed_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"train\.tar\.gz is compressed \(gzip\)"):
        archive.read(archive.find(tmp_path), "train")


@pytest.mark.parametrize(
    "text", ["[]", '{"splits": {"train": 3}}', "{", '{"splits": {"train": {"filenames": ["../x"]}}}']
)
def test_a_damaged_list_of_shards(sharded: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(sharded, tmp_path / "data")
    (tmp_path / "data" / archive.INFO).write_text(text)
    with pytest.raises(UserError, match=r"_info\.json"):
        scan(tmp_path / "data")


def test_what_shards_refuses(folder_of_images: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: Any) -> None:
    """An OUT that exists, a size that is none, and a disk without room: nothing is written."""
    (tmp_path / "there").mkdir()
    assert "there exists" in hcnet("shards", folder_of_images, tmp_path / "there").err
    done = hcnet("shards", folder_of_images, tmp_path / "new", "--size", "many")
    assert (done.code, "--size many is not a size" in done.err) == (2, True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    done = hcnet("shards", folder_of_images, tmp_path / "new")
    assert (done.code, "The shards need" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_ends_the_writing_leaves_nothing(folder_of_images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(path: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shards, "_content", broken)
    with pytest.raises(UserError, match="cannot be written"):
        shards.write(folder_of_images, tmp_path / "out", 10**6)
    assert not list(tmp_path.iterdir())


def test_shards_are_timed_beside_the_folder(
    sharded: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "TURN", 4)
    monkeypatch.setattr(bench_data, "PICTURES", 8)
    flags = ("--batch-size", "4", "--img-size", "16", "--rounds", "1")
    assert hcnet("bench", "data", *flags, "--output", tmp_path / "data.json").code == 0
    found = json.loads((tmp_path / "data.json").read_text())["pipelines"]
    names = ["hcnet", "timm", "timm without prefetcher", "hcnet, shards", "timm, shards"]
    assert [one["model"] for one in found] == names
    assert all(rate > 0 for one in found for rates in one["rounds"].values() for rate in rates)
    refused = hcnet("bench", "data", "--data", sharded, *flags)
    assert (refused.code, "holds shards" in refused.err) == (2, True)
