"""Protects the identity of data: contents, names, classes and splits decide, whatever a folder's path and dates are."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_MODEL, Hcnet, only_run
from PIL import Image
from small_data import MAKERS, classes, coco, noise, opened, save, scenes

from hcnet_cli import runs
from hcnet_cli.cache import cache_dir
from hcnet_cli.data import embedded, identity


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "cache"))


def digest(root: Path, **data: object) -> str:
    """As training has it."""
    return opened(root, **data).info.digest


def in_place(file: Path, change: Callable[[bytearray], None]) -> None:
    """Changes bytes of a file and leaves name, size, inode and modification time."""
    stat = file.stat()
    content = bytearray(file.read_bytes())
    change(content)
    with file.open("r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (stat.st_size, stat.st_ino)


def flip_last(content: bytearray) -> None:
    content[-1] ^= 1


@pytest.mark.parametrize("kind", MAKERS)
def test_every_byte_of_every_file_and_every_name_counts(kind: str, tmp_path: Path) -> None:
    root = MAKERS[kind](tmp_path / kind)
    before = digest(root)
    assert digest(root) == before
    seen = {before}
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    for file in [path for path in files if path.suffix == ".bmp"]:
        in_place(file, flip_last)
        assert digest(root) not in seen, file
        seen.add(digest(root))
    two = [path for path in files if path.suffix == ".bmp"][:2]
    contents = [path.read_bytes() for path in two]
    assert len(contents[0]) == len(contents[1])
    for path, content in zip(two, reversed(contents), strict=True):
        path.write_bytes(content)  # swapped: the same contents under each other's name
    assert digest(root) not in seen
    for path, content in zip(two, contents, strict=True):
        path.write_bytes(content)
    for file in [path for path in files if path.suffix == ".bmp"]:
        in_place(file, flip_last)
    assert digest(root) == before  # all is as it was
    moved = shutil.copytree(root, tmp_path / "elsewhere" / kind)
    assert digest(moved) == before


def test_class_names_their_number_and_order_count(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    found = []
    for names in ("road\ntree\ncar\n", "tree\nroad\ncar\n", "road\ntree\ncar\nbus\n", ""):
        (root / "classes.txt").write_text(names)
        found.append(digest(root))
    (root / "classes.txt").unlink()
    assert digest(root) == found.pop()  # an empty file names nothing
    assert len(set(found)) == 3

    other = coco(tmp_path / "coco")
    before = digest(other)
    for file in (other / "annotations").iterdir():
        file.write_text(file.read_text().replace('"one"', '"six"'))
    assert digest(other) != before


def test_labels_and_masks_mended_at_equal_size_count(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    before = digest(root)
    file = root / "annotations/training/0.png"
    pixels = np.asarray(Image.open(file)).copy()
    size = file.stat().st_size
    pixels[:4] = pixels[:4][:, ::-1]  # some labels exchanged
    Image.fromarray(pixels).save(file)
    assert abs(file.stat().st_size - size) < 64
    assert digest(root) != before


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "UNSETTLED_SECONDS", -1.0)
    root = classes(tmp_path / "classes")
    reads: list[bytes] = []
    real = identity._Reader._read
    monkeypatch.setattr(
        identity._Reader, "_read", lambda self, name, *more: reads.append(name) or real(self, name, *more)
    )
    before = digest(root)
    assert len(reads) == 6
    assert digest(root) == before
    assert len(reads) == 6
    in_place(root / "train/a/0.bmp", flip_last)
    changed = digest(root)
    assert reads[6:] == [b"train/a/0.bmp"]
    for cache in (cache_dir() / "identity").glob("*.bin"):  # damaged: only read again
        cache.write_bytes(cache.read_bytes()[:-3] + b"abc")
    assert digest(root) == changed
    assert len(reads) == 13
    shutil.rmtree(cache_dir())
    cache_dir().write_text("not a folder")  # cannot be written
    assert digest(root) == changed


def test_a_file_that_changed_a_moment_ago_is_not_trusted_to_the_cache(tmp_path: Path) -> None:
    """On a coarse clock a second change would leave the same times."""
    root = classes(tmp_path / "classes")
    digest(root)
    assert not [file for file in (cache_dir() / "identity").glob("*.bin") if identity._load(file)]


def test_the_digest_is_a_hash_of_names_and_contents(tmp_path: Path) -> None:
    """Spelled out with hashlib alone."""
    (tmp_path / "d").mkdir()
    for name, content in (("x", b"1"), ("y", b"22")):
        (tmp_path / "d" / name).write_bytes(content)
    total = hashlib.blake2b(b'["content", {"k": 1}]', digest_size=8)
    for name, content in ((b"x", b"1"), (b"y", b"22")):
        total.update(len(name).to_bytes(4, "little") + name + hashlib.blake2b(content, digest_size=16).digest())
    found = identity.identify(tmp_path / "d", [b"x", b"y"], {"k": 1})
    assert found.digest == f"v2-{total.hexdigest()}"
    assert found.num_distinct == 2


def test_names_alone_are_trusted_where_asked_and_it_is_said(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "classes")
    before = digest(root, trust="names")
    assert before.startswith("v2n-")
    assert before != digest(root)
    in_place(root / "train/a/0.bmp", flip_last)
    assert digest(root, trust="names") == before
    (root / "train/a/0.bmp").write_bytes(b"shorter")
    assert digest(root, trust="names") != before
    save(root / "train/a/0.bmp", 1)
    done = hcnet(
        *("pretrain", "--recipe", "pretrain/digits", "--data", root, "--data-trust", "names", "--out", tmp_path / "o"),
        *("--epochs", 1, "--batch-size", 2, "--workers", 0, *SMALL_MODEL),
    )
    assert done.code == 0, done.err
    info = runs.read_record(only_run(tmp_path / "o") / "run.json")
    assert info.data.trust == "names"
    assert "names and sizes alone" in done.err
    assert "names and sizes alone" in hcnet("report", "--results", tmp_path / "o").out


def test_mended_data_are_another_run(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "classes")

    def train(*more: str) -> str:
        done = hcnet(
            *("pretrain", "--recipe", "pretrain/digits", "--data", root, "--out", tmp_path / "o", *SMALL_MODEL),
            *("--epochs", 1, "--batch-size", 2, "--workers", 0, *more),
        )
        assert done.code == 0, done.err
        return done.err

    train()
    assert "This run is finished" in (said := train())
    assert f"`hcnet report --results {tmp_path / 'o'}` prints the table" in said
    folder = runs.RunFolder(only_run(tmp_path / "o"))
    folder.write(folder.require().model_copy(update={"status": "interrupted"}))
    other = tmp_path / "o/runs/other"  # unfinished too, of another version of the program
    other.mkdir()
    text = f"{folder.recipe_file.read_text()}new: 1\n"
    (other / "recipe.yaml").write_text(text)
    theirs = folder.require().model_copy(update={"recipe_digest": runs.text_digest(text)})
    (other / "run.json").write_text(runs.record_text(theirs))
    in_place(root / "val/a/0.bmp", flip_last)
    said = train()
    assert "This run is finished" not in said
    assert f"{folder.path} was stopped at step" in said
    assert "the data are other ones now" in said
    save(root / "train/a/9.bmp", 9)
    assert "the data (5 training and 2 validation images, 4 training and 2 validation images then) are other" in train(
        "--dry-run"
    )
    (root / "train/a/9.bmp").unlink()
    assert len(list((tmp_path / "o/runs").iterdir())) == 3
    elsewhere = classes(tmp_path / "elsewhere", lambda seed: noise(seed + 1))
    assert "was stopped at step" not in train("--data", elsewhere)  # that run has nothing to do with these data
    in_place(root / "val/a/0.bmp", flip_last)
    said = train("--precision", "bf16")  # as where `auto` is another number format than on the machine before
    assert f"{folder.path} was stopped at step" in said
    assert "in fp32. This is a new run, in bf16; --precision fp32 goes on with the old one." in said


def test_check_reads_everything_again(tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache entry that no longer fits, as after a write below the file system, is WRONG."""
    monkeypatch.setattr(identity, "UNSETTLED_SECONDS", -1.0)
    root = classes(tmp_path / "classes")
    digest(root)
    (cache,) = (cache_dir() / "identity").glob("*.bin")
    records = identity._load(cache)
    key = sorted(records)[0]
    reader = identity._Reader(root, "content", None, False)
    reader.fresh = {**records, key: identity.Record(b"?" * 16, 0)}
    reader.changed = [""]
    reader.save()
    done = hcnet("check", root)
    assert done.code == 1
    assert "WRONG: files changed though" in done.out
    assert "files changed though" not in hcnet("check", root).out  # the cache is right again


@pytest.mark.parametrize("name", embedded.EMBEDDED)
def test_a_damaged_embedded_set_is_made_again(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hcnet_cli.data.embedded import digits, scenes

    monkeypatch.setattr(scenes, "SCENES", {"train": 4, "val": 2})
    few = {split: ones[::40] for split, ones in digits.load_digits().items()}
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    folder = embedded.ensure(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    capsys.readouterr()

    def exchange() -> None:
        files[0].write_bytes(files[-1].read_bytes())

    for damage in (files[0].unlink, lambda: shutil.rmtree(files[0].parent), exchange, (folder / "more.png").touch):
        damage()
        assert embedded.ensure(name) == folder
        assert "it is made again" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == contents


def test_the_shipped_digests_are_those_of_the_sets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another Pillow the files may have other bytes; then this test says so and the digests stay as they are."""
    import PIL

    if not PIL.__version__.startswith("13."):
        pytest.skip("the digests were taken with Pillow 13")
    monkeypatch.setenv("HCNET_CACHE", str(cache))  # where they are made once for all tests
    assert embedded._digest(embedded.ensure("digits")) == embedded.DIGESTS["digits"]


def test_two_starts_at_once_agree(tmp_path: Path) -> None:
    root = classes(tmp_path / "classes")
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(digest, [root, root]))) == 1
