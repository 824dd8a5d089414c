"""ImageNet folders: what is scanned, how images are read, and augmentation as in the reference recipe."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms

from hcnet_cli import rng
from hcnet_cli.console import UserError
from hcnet_cli.data.loader import TrainLoader
from hcnet_cli.tasks.classification.augment import (
    Normalise,
    Transform,
    allow_zero_bits,
    collate,
    eval_transform,
    make_mixup,
    mix,
    posterize,
    train_transform,
    without_far_ends,
)
from hcnet_cli.tasks.classification.image_folder import ImageFolder, scan

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write(path: Path, color: tuple[int, int, int] = (200, 30, 90), size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def folder(root: Path, train: dict[str, int] | None = None, val: dict[str, int] | None = None) -> Path:
    for split, classes in (("train", train or {"cat": 3, "dog": 2}), ("val", val or {"cat": 1, "dog": 1})):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write(root / split / name / f"{name}_{i}.png", (40 * i, 100, 200 - 40 * i))
    return root


def picture(size: tuple[int, int] = (50, 40), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def to_bytes(image: Image.Image) -> dict[str, Any]:
    return {"image": torch.from_numpy(np.array(image)), "erased": []}


# scanning


def test_classes_come_from_train_sorted_and_files_are_found_below_them(tmp_path: Path) -> None:
    root = folder(tmp_path, {"b": 2, "a": 1, "10": 1, "2": 1}, {"b": 1})
    write(root / "train" / "a" / "deeper" / "x.JPEG")
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    index = scan(root)
    assert index.classes == ("10", "2", "a", "b")
    assert (index.num_train, index.num_val) == (6, 1)
    dataset = ImageFolder(index, "train", to_bytes)
    paths = [dataset.sample_path(i) for i in range(len(dataset))]
    found = sorted(str(p) for p in (root / "train").rglob("*") if p.suffix in {".png", ".JPEG"})
    assert sorted(paths) == found
    assert [Path(p).relative_to(root / "train").parts[0] for p in paths] == [
        index.classes[dataset[(i, 0, 0)]["target"]] for i in range(6)
    ]
    # the label is the class of the training folder, not the place among validation folders
    assert ImageFolder(index, "val", to_bytes)[(0, 0, 0)]["target"] == 3


def test_dot_folders_and_dot_files_are_skipped(tmp_path: Path) -> None:
    root = folder(tmp_path)
    expected = scan(root).digest
    for split in ("train", "val"):
        write(root / split / ".ipynb_checkpoints" / "x.png")
        write(root / split / "cat" / ".hidden" / "x.png")
        write(root / split / "cat" / "._cat_0.png")
    index = scan(root)
    assert index.classes == ("cat", "dog")
    assert index.digest == expected


def test_the_digest_tells_any_change_of_names_and_nothing_else(tmp_path: Path) -> None:
    digests = [
        scan(folder(tmp_path / "a")).digest,
        scan(folder(tmp_path / "one more", {"cat": 4, "dog": 2})).digest,
        scan(folder(tmp_path / "other class", {"cat": 3, "dot": 2}, {"cat": 1})).digest,
        scan(folder(tmp_path / "other split", val={"cat": 1})).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert scan(folder(tmp_path / "b")).digest == digests[0]  # another place


def test_links_and_names_that_are_not_utf8_work(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    write(tmp_path / "elsewhere" / "x.png")
    (root / "train" / "emu").symlink_to(tmp_path / "elsewhere")
    write(root / "train" / "emu" / "f\udce9.png")
    dataset = ImageFolder(scan(root), "train", to_bytes)
    assert len(dataset) == 7
    assert [dataset[(i, 0, 0)]["target"] for i in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_million_names_cost_few_objects(tmp_path: Path) -> None:
    files = scan(folder(tmp_path)).train
    assert [type(value) for value in vars(files.names).values()] == [bytes, np.ndarray]
    assert files.names.ends.dtype == np.int64
    assert files.labels.dtype == np.int32


def test_the_name_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan(folder(tmp_path / "My Flowers_102")).name == "my-flowers-102"
    assert scan(folder(tmp_path / "ImageNet 1k")).name == "imagenet-1k-data"  # only the real one has that name
    monkeypatch.chdir(tmp_path / "My Flowers_102")
    assert scan(".").name == "my-flowers-102"


# what is wrong with a folder, in one sentence


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder .*nowhere does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file, not a folder"):
        scan(write(tmp_path / "x.png"))


def test_missing_splits_are_named_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(UserError, match="no train/ and no val/ folder") as caught:
        scan(tmp_path)
    assert "train/<class>/" in caught.value.hint
    assert "training" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "command"),
    [("annotations/instances_val2017.json", "finetune-det"), ("annotations/training/a.png", "finetune-seg")],
)
def test_other_kinds_of_data_are_recognised(tmp_path: Path, file: str, command: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("")
    with pytest.raises(UserError) as caught:
        scan(tmp_path)
    assert f"hcnet {command} --data {tmp_path}" in caught.value.hint


def test_an_empty_split_and_loose_images(tmp_path: Path) -> None:
    root = folder(tmp_path / "empty")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "val").mkdir()
    with pytest.raises(UserError, match="train holds no class folders"):
        scan(tmp_path / "bare")
    for path in (root / "val").rglob("*.png"):
        path.rename(root / "val" / path.name)
    for name in ("cat", "dog"):
        (root / "val" / name).rmdir()
    with pytest.raises(UserError, match="val holds images but no class folders") as caught:
        scan(root)
    assert "sort them by class" in caught.value.hint


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images_is_named(tmp_path: Path, split: str) -> None:
    root = folder(tmp_path, train={"ant": 1, "cat": 1, "dog": 1})
    (root / split / "ant").mkdir(exist_ok=True)
    for path in (root / split / "ant").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf'{split} has a class \("ant"\) without images'):
        scan(root)


def test_a_validation_class_unknown_to_training_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, val={"cat": 1, "dogs": 1})
    with pytest.raises(UserError, match=r'val has a class \("dogs"\) that .*train lacks. Did you mean "dog"'):
        scan(root)


# items


def damaged(root: Path) -> Path:
    path = root / "train" / "cat" / "cat_1.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_an_item_is_complete_and_depends_on_its_key_alone(tmp_path: Path) -> None:
    dataset = ImageFolder(scan(folder(tmp_path)), "train", train_transform(img_size=16, mean=MEAN))
    first = dataset[(1, 77, 5)]
    assert first["sample"] == 1
    assert first["key"] == 77
    assert first["target"] == 0
    assert first["image"].shape == (16, 16, 3)
    assert first["image"].dtype == torch.uint8
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(dataset[(1, 77, 6)]["image"], first["image"])
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[(1, 77, 5)]["image"], first["image"])


def test_reading_an_item_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    dataset = ImageFolder(scan(folder(tmp_path)), "train", train_transform(img_size=16, mean=MEAN))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    dataset[(1, 77, 5)]
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_an_unreadable_training_image_is_replaced_by_one_the_key_chooses(tmp_path: Path) -> None:
    root = folder(tmp_path, {"cat": 3, "dog": 20})
    path = damaged(root)
    dataset = ImageFolder(scan(root), "train", to_bytes)
    items = [dataset[(1, key, 0)] for key in range(30)]
    for key, item in enumerate(items):
        assert item["unreadable"].startswith(f"{path} (")
        assert item["sample"] != 1
        assert item["key"] == key
        healthy = dataset[(item["sample"], key, 0)]
        assert "unreadable" not in healthy
        assert torch.equal(item["image"], healthy["image"])
        assert item["target"] == healthy["target"]
        assert dataset[(1, key, 0)]["sample"] == item["sample"]
    assert len({item["sample"] for item in items}) > 5


def test_the_reference_augmentation_is_the_same_for_any_workers_and_any_resume(tmp_path: Path) -> None:
    root = folder(tmp_path, {"cat": 7, "dog": 6})
    damaged(root)
    dataset = ImageFolder(scan(root), "train", train_transform(img_size=16, mean=MEAN))

    def stream(workers: int, start: int) -> list[dict[str, Any]]:
        loader = TrainLoader(
            dataset, batch_size=4, accumulate=1, total_steps=6, seed=2, workers=workers, collate=collate
        )
        return list(loader.iterate(start))

    expected = stream(0, 0)
    assert sum(len(batch["holes"]) for batch in expected) > 2
    for workers, start in ((2, 0), (3, 0), (0, 4), (2, 5)):
        for batch, reference in zip(stream(workers, start), expected[start:], strict=True):
            assert torch.equal(batch["target"], reference["target"])
            assert torch.equal(Normalise(MEAN, STD)(batch), Normalise(MEAN, STD)(reference))


@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_an_unreadable_validation_image_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    root = folder(tmp_path)
    (root / "val" / "dog" / "dog_0.png").write_bytes(content)
    dataset = ImageFolder(scan(root), "val", to_bytes)
    with pytest.raises(UserError, match=r"dog_0.png cannot be used: it is not an image"):
        dataset[(1, 0, 0)]


def test_a_truncated_validation_image_is_an_error(tmp_path: Path) -> None:
    root = folder(tmp_path)
    picture((200, 200)).save(root / "val" / "dog" / "dog_0.jpg")
    path = root / "val" / "dog" / "dog_0.jpg"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match=r"dog_0.jpg cannot be used: .*truncated"):
        ImageFolder(scan(root), "val", to_bytes)[(1, 0, 0)]


def test_a_vanished_disk_stops_training(tmp_path: Path) -> None:
    dataset = ImageFolder(scan(folder(tmp_path / "data")), "train", to_bytes)
    (tmp_path / "data").rename(tmp_path / "gone")
    sentence = r"10 training images in a row cannot be used, the first: .*cat_1\.png \(No such file"
    with pytest.raises(UserError, match=sentence):
        dataset[(1, 3, 0)]


# augmentation


def test_evaluation_is_resize_centre_crop_normalise() -> None:
    image = picture((300, 260))
    expected = image.resize((295, 256), Image.Resampling.BICUBIC)  # 300 * 256 / 260 = 295.4
    left, top = round((295 - 224) / 2), round((256 - 224) / 2)
    pixels = np.asarray(expected.crop((left, top, left + 224, top + 224))) / 255
    pixels = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    (found,) = Normalise(MEAN, STD)(collate([eval_transform(img_size=224)(image)]))
    assert np.allclose(found.numpy(), pixels, atol=1e-6)


@pytest.mark.parametrize("img_size", [32, 64, 112, 192, 224, 256, 288, 384, 512])
def test_the_evaluation_size_is_the_references(img_size: int) -> None:
    resize = eval_transform(img_size=img_size).parts[1]
    assert resize.size == int(256 / 224 * img_size)


def test_training_is_the_recipes_pipeline_in_its_order() -> None:
    transform = train_transform(img_size=224, mean=MEAN)
    assert [type(part).__name__ for part in transform.parts] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
    ]
    crop, flip, augment = transform.parts
    erase = transform.erase
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert augment.num_layers == 2
    assert len(augment.ops) == 15
    for op in augment.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.kwargs == {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
    assert (erase.probability, erase.mode, erase.min_area, erase.max_area) == (0.25, "pixel", 0.02, 1 / 3)
    assert (erase.min_count, erase.max_count, erase.device) == (1, 1, "cpu")


@pytest.mark.parametrize("size", [(50, 40), (1, 7), (64, 64)])
def test_normalising_a_batch_is_torchvisions_two_steps_to_the_last_bit(size: tuple[int, int]) -> None:
    pictures = [picture(size, seed) for seed in range(3)]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    batch = collate([to_bytes(image) for image in pictures])
    before = batch["image"].clone()
    assert torch.equal(Normalise(MEAN, STD)(batch), torch.stack([theirs(image) for image in pictures]))
    assert torch.equal(batch["image"], before), "a batch stays as it is"


@pytest.mark.parametrize("re_mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("re_count", [1, 3])
def test_training_images_are_those_of_timms_own_transform(re_mode: str, re_count: int) -> None:
    """To the last bit: bytes that are normalised and erased as a batch are torchvision's ToTensor and Normalize and
    timm's RandomErasing of each image, from the same draws.
    """
    settings: dict[str, Any] = {
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "hflip": 0.3,
        "color_jitter": 0.4,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "interpolation": "bicubic",
        "re_prob": 0.5,
        "re_mode": re_mode,
        "re_count": re_count,
    }
    ours = train_transform(img_size=48, mean=MEAN, **settings)
    timms = create_transform(48, is_training=True, mean=MEAN, std=STD, **settings)
    allow_zero_bits(timms)
    assert [type(part).__name__ for part in timms.transforms][-3:] == ["MaybeToTensor", "Normalize", "RandomErasing"]
    items, expected = [], []
    for key in range(40):
        with rng.seeded(key):
            items.append(ours(picture(seed=key)))
        with rng.seeded(key):
            expected.append(timms(picture(seed=key)))
    batch = collate(items)
    assert len(batch["holes"]) > 10
    images = Normalise(MEAN, STD)(batch)
    assert torch.equal(images, torch.stack(expected))
    assert images.is_contiguous(memory_format=torch.channels_last), "no copy is needed for another layout"


def test_colour_jitter_acts_only_without_randaugment() -> None:
    def names(**changes: Any) -> list[str]:
        return [type(p).__name__ for p in train_transform(img_size=32, mean=MEAN, **changes).parts]

    assert "ColorJitter" not in names(color_jitter=0.4)
    assert "ColorJitter" in names(color_jitter=0.4, auto_augment=None)
    assert "ColorJitter" not in names(color_jitter=None, auto_augment=None)
    assert names(auto_augment=None, color_jitter=None, hflip=0.0) == ["RandomResizedCropAndInterpolation"]
    assert train_transform(img_size=32, mean=MEAN, re_prob=0.0).erase is None


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original"])
def test_augmentation_survives_its_own_extremes(policy: str) -> None:
    """Posterizing to zero bits, which RandAugment draws once in some hundred images, fails in Pillow 13."""
    transform = train_transform(img_size=8, auto_augment=policy, mean=MEAN)
    image = picture((9, 9))
    for key in range(600):
        with rng.seeded(key):
            assert transform(image)["image"].shape == (8, 8, 3)


def test_posterizing_to_zero_bits_is_black_and_otherwise_timms() -> None:
    image = picture()
    assert not np.asarray(posterize(image, 0)).any()
    for bits in (1, 4, 8):
        assert (np.asarray(posterize(image, bits)) == np.asarray(auto_augment.posterize(image, bits))).all()


# mixup


def a_batch(size: int = 4) -> dict[str, Any]:
    images = torch.stack([torch.full((3, 8, 8), float(i)) for i in range(size)])
    return {"images": images, "target": torch.arange(size), "step_key": 1}


def test_mixing_is_alike_in_all_micro_batches_of_a_step_and_new_in_the_next() -> None:
    mixup = make_mixup(10)
    assert mixup is not None
    whole_image, whole_target = mix(**a_batch(8), mixup=mixup)
    # partners are opposite ends: {0, 7, 1, 6} and {2, 5, 3, 4} are micro-batches of whole pairs
    for members in ([0, 1, 6, 7], [2, 3, 4, 5]):
        whole = a_batch(8)
        image, target = mix(whole["images"][members], whole["target"][members], 1, mixup)
        assert torch.equal(image, whole_image[members])
        assert torch.equal(target, whole_target[members])
    lambdas = {mix(**a_batch() | {"step_key": key}, mixup=mixup)[1].max().item() for key in range(20)}
    assert len(lambdas) > 15


def test_mixed_targets_follow_the_definition_of_mixup_and_cutmix() -> None:
    """A target is lam and 1 - lam of two smoothed one-hot rows, lam the share of the image's own pixels."""
    mixup = make_mixup(5)
    assert mixup is not None
    kinds = set()
    for key in range(30):
        image, target = mix(**a_batch() | {"step_key": key}, mixup=mixup)
        values = image[3].unique()  # pixels of image 3 mixed with image 0
        kinds.add(len(values))
        lam = image[3].mean().item() / 3
        smooth = torch.full((5,), 0.1 / 5)
        expected = smooth + 0.9 * (lam * torch.eye(5)[3] + (1 - lam) * torch.eye(5)[0])
        assert torch.allclose(target[3], expected, atol=1e-5)
    assert kinds == {1, 2}  # both happen: blended all over, or pasted


def test_mixing_leaves_the_generators_as_they_were() -> None:
    mixup = make_mixup(10)
    assert mixup is not None
    state = np.random.get_state()[1].tolist()
    mix(**a_batch(), mixup=mixup)
    assert np.random.get_state()[1].tolist() == state


def test_an_odd_micro_batch_cannot_be_mixed() -> None:
    mixup = make_mixup(10)
    assert mixup is not None
    with pytest.raises(UserError, match="micro-batch of 3 is odd"):
        mix(**a_batch(3), mixup=mixup)


def test_no_mixup_when_neither_acts() -> None:
    assert make_mixup(10, mixup=0, cutmix=0) is None
    assert make_mixup(10, prob=0) is None
    assert make_mixup(10, mixup=0) is not None


@pytest.mark.parametrize("size", [(2, 400), (402, 2), (3, 901)])
def test_far_ends_of_a_long_image_do_not_reach_the_crop(size: tuple[int, int]) -> None:
    """The pixels are those without the cut, and 65,535 x 1 pixels need little memory."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (*size, 3)).astype(np.uint8))
    transform = eval_transform(img_size=21)  # 24 before the crop: a multiple of the shorter side
    cut = transform(image)["image"]
    whole = Transform(transform.parts[1:])(image)["image"]
    assert torch.equal(cut, whole)
    (middle,) = {max(without_far_ends(Image.new("RGB", size)).size) for size in ((65_535, 1), (1, 65_535))}
    assert middle == 101  # odd as the image is, so that the middle is the same
