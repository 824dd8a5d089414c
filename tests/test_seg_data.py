"""ADE20K's layout: bad data in one sentence each, the reference's pipeline, randomness from the key alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hcnet_cli.console import UserError
from hcnet_cli.schema import IMAGENET_MEAN
from hcnet_cli.tasks.segmentation import augment, scene_parsing
from hcnet_cli.tasks.segmentation.scene_parsing import EvalScenes, TrainScenes, open_folder


def write_scene(root, split, name, size=(20, 30), values=(0, 1, 2, 3), label=None):
    """One random image (JPEG) and its label, `values` in vertical bands unless an array or a Pillow image
    is given.
    """
    random = np.random.RandomState(len(name))
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.randint(0, 256, (*size, 3)).astype(np.uint8)).save(root / "images" / split / f"{name}.jpg")
    if label is None:
        label = np.resize(np.repeat(values, -(-size[1] // len(values))), size).astype(np.uint8)
    image = Image.fromarray(label) if isinstance(label, np.ndarray) else label
    image.save(root / "annotations" / split / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for split, count in (("training", 4), ("validation", 2)):
        for i in range(count):
            write_scene(tmp_path, split, f"{split}_{i}")
    return tmp_path


# --- a good folder --------------------------------------------------------------------------------------------


def test_zero_label_is_ignored_and_others_move_down(root):
    """ADE20K's convention: 0 -> 255, 1..K -> 0..K-1, 255 -> 255; the number of classes is the largest
    label's.
    """
    write_scene(root, "training", "void", values=(0, 3, 255))
    folder = open_folder(root)
    assert folder.num_classes == 3
    assert folder.class_names == ("label 1", "label 2", "label 3")
    assert folder.table.classes[[0, 1, 3, 255]].tolist() == [255, 0, 2, 255]
    label = EvalScenes(folder)[0, 0, 0]["label"]
    assert set(label.unique().tolist()) == {0, 1, 2, 255}


def test_labels_as_they_are_without_reduce_zero_label(root):
    folder = open_folder(root, reduce_zero_label=False)
    assert folder.num_classes == 4
    assert folder.table.classes[:4].tolist() == [0, 1, 2, 3]


def test_palette_labels_mean_their_indices(tmp_path):
    """The colours of a palette PNG are decoration."""
    for split in scene_parsing.SPLITS:
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
        write_scene(tmp_path, split, split, size=(1, 3), label=image)
    assert EvalScenes(open_folder(tmp_path))[0, 0, 0]["label"].tolist() == [[255, 0, 1]]


def test_class_names_from_either_file(root):
    """ADE20K's own table (first of several synonyms), or a plain list, which wins."""
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t1\twall\n2\t0.1\t9\t1\tdoor, double door\n3\t0.1\t9\t1\tsky\n"
    (root / "objectInfo150.txt").write_text(table)
    assert open_folder(root).class_names == ("wall", "door", "sky")
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    assert open_folder(root).class_names == ("a", "b", "c", "d")


def test_more_classes_than_occur_is_said(root, capsys):
    (root / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert open_folder(root).num_classes == 5
    assert "2 of 5 classes occur in no label" in capsys.readouterr().err


def test_digest_is_of_content_not_of_place(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("moved") / "data"
    before = open_folder(root).digest
    root.rename(elsewhere)
    assert open_folder(elsewhere).digest == before
    write_scene(elsewhere, "training", "one_more")
    assert open_folder(elsewhere).digest != before


def test_subfolders_hidden_files_and_upper_case_suffixes(root):
    write_scene(root, "training", "training_0")
    (root / "images/training/._junk.jpg").write_bytes(b"no image")
    (root / "images/training/notes.txt").write_text("no image")
    (root / "images/training/training_0.jpg").rename(root / "images/training/training_0.JPG")
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (root / kind / "training/deep").mkdir()
        (root / f"{kind}/training/training_1.{suffix}").rename(root / f"{kind}/training/deep/training_1.{suffix}")
    assert len(open_folder(root).images["training"]) == 4


def test_labels_are_looked_at_once(root, tmp_path, monkeypatch):
    """The scan of unchanged files is kept; a changed file is seen."""
    cache = tmp_path / "cache"
    open_folder(root, scan_cache=cache)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **more: opened.append(str(path)) or real(path, **more))
    assert open_folder(root, scan_cache=cache).num_classes == 3
    assert not opened
    write_scene(root, "validation", "validation_1", values=(0, 1, 2, 3, 4))
    assert open_folder(root, scan_cache=cache).num_classes == 4
    assert len([path for path in opened if "annotations" in path]) == 6
    assert all(json.loads(path.read_text()) for path in cache.iterdir())


# --- bad data -------------------------------------------------------------------------------------------------


def refused(root, *words, **kwargs):
    with pytest.raises(UserError) as caught:
        open_folder(root, **kwargs)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_image_without_label(root):
    (root / "annotations/training/training_2.png").unlink()
    refused(root, "1 of 4 files have no label", "training_2.jpg")


def test_label_without_image(root):
    (root / "images/validation/validation_1.jpg").unlink()
    refused(root, "1 of 2 files have no image", "validation_1.png")


def test_sizes_that_differ(root):
    write_scene(root, "training", "odd", size=(20, 30), label=np.ones((30, 20), np.uint8))
    refused(root, "odd.png", "20 x 30 pixels", "its image 30 x 20")


def test_colour_labels(root):
    write_scene(root, "training", "colour", label=np.ones((20, 30, 3), np.uint8))
    refused(root, "colour.png", "is a colour image (RGB)")


def test_sixteen_bit_labels(root):
    write_scene(root, "training", "deep", label=np.full((20, 30), 300, np.uint16))
    refused(root, "deep.png", "16-bit")


def test_palette_among_grey_labels(root):
    image = Image.fromarray(np.ones((20, 30), np.uint8), mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0])
    write_scene(root, "validation", "palette", label=image)
    refused(root, "palette.png", "training_0.png", "the same number may mean two things")


def test_values_out_of_range_name_file_and_value(root):
    write_scene(root, "validation", "big", values=(1, 7))
    (root / "classes.txt").write_text("a\nb\nc\n")
    refused(root, "big.png", "label value 7", "allowed are 0-3, 255")
    refused(root, "training_0.png", "label value 3", "allowed are 0-2, 255", reduce_zero_label=False)
    # without the scan the loader still says it, before a device would
    folder = open_folder(root, scan_labels=False)
    index = next(i for i, path in enumerate(folder.labels["validation"]) if "big" in path)
    with pytest.raises(UserError, match="holds the label value 7"):
        EvalScenes(folder)[index, 0, 0]


def test_missing_folder_and_empty_folder(root, tmp_path):
    refused(tmp_path / "nowhere", "There is no folder")
    for path in (*(root / "images/validation").iterdir(), *(root / "annotations/validation").iterdir()):
        path.unlink()
    refused(root, "There is no image in", "validation")


def test_two_images_for_one_label(root):
    Image.new("RGB", (30, 20)).save(root / "images/training/training_0.png")
    refused(root, "training_0.jpg", "training_0.png", "have the same name")


def test_class_names_against_num_classes(root):
    (root / "classes.txt").write_text("a\nb\nc\n")
    refused(root, "names 3 classes, but the recipe asks for 4", num_classes=4)


@pytest.mark.parametrize(("ignored", "counts"), [(0, [0, 200, 200]), (250, [200, 200])])
def test_ignored_pixels_leave_all_counts(tmp_path, capsys, ignored, counts):
    """The number of unlabelled pixels is no class, and not the largest class."""
    for split in ("training", "validation"):
        write_scene(tmp_path, split, "a", values=(ignored, *np.flatnonzero(counts)))
    folder = open_folder(tmp_path, reduce_zero_label=False, ignore_index=ignored)
    assert folder.class_counts.tolist() == counts
    assert "occur in no label" not in capsys.readouterr().err


@pytest.mark.parametrize(("names", "reduced"), [(257, False), (255, True)])
def test_more_classes_than_labels_can_have(root, names, reduced):
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(names)))
    refused(root, f"has {names} classes", f"have room for {names - 1}", reduce_zero_label=reduced)


def test_an_ignored_number_that_is_a_class(root):
    refused(root, 'The class "label 1" would be neither trained nor scored', ignore_index=0)


def test_label_that_does_not_decode(root):
    (root / "annotations/training/training_3.png").write_bytes(b"broken")
    refused(root, "training_3.png cannot be used: it is not an image")


def test_unreadable_image_in_training_is_replaced_by_the_key(root):
    """By another sample, the same for the same key; the file is named. In validation it is an error."""
    for split in scene_parsing.SPLITS:
        (root / f"images/{split}/{split}_0.jpg").write_bytes(b"broken")
    folder = open_folder(root)
    train = TrainScenes(folder, img_scale=(30, 20), crop_size=16)
    one, two = train[0, 5, 0], train[0, 5, 0]
    assert one["sample"] != 0
    assert "training_0.jpg (it is not an image" in one["unreadable"]
    assert torch.equal(one["image"], train[one["sample"], 5, 0]["image"])
    assert torch.equal(one["image"], two["image"])
    assert "unreadable" not in train[1, 5, 0]
    with pytest.raises(UserError, match=r"validation_0\.jpg cannot be used"):
        EvalScenes(folder)[0, 0, 0]


def test_exif_rotation_is_applied_and_checked(root):
    """An image stored sideways fits the upright label, and is shown upright."""
    upright = np.zeros((30, 20, 3), np.uint8)
    upright[:15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise"
    write_scene(root, "validation", "turned", size=(30, 20))
    Image.fromarray(np.rot90(upright).copy()).save(root / "images/validation/turned.jpg", exif=exif, quality=95)
    item = EvalScenes(open_folder(root), img_scale=(30, 20))[0, 0, 0]
    assert item["path"].endswith("turned.jpg")
    image = item["images"][0]
    assert image.shape == (3, 30, 20)
    assert image[:, :12].min() > image[:, 18:].max()


@pytest.mark.parametrize("size", [(20, 20), (20, 30)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_label_is_turned_as_its_own_exif_data_says(root, orientation, size):
    """With the same orientation in both files each pixel keeps its class, also where the sizes would not show it."""
    grey = np.random.RandomState(orientation).randint(1, 4, size).astype(np.uint8)
    palette = Image.fromarray(grey, mode="P")
    palette.putpalette(list(range(12)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split, count in (("training", 4), ("validation", 2)):
        for i in range(count):
            image, label = (root / kind / split / f"{split}_{i}" for kind in ("images", "annotations"))
            image.with_suffix(".jpg").unlink()
            Image.fromarray(80 * grey).save(image.with_suffix(".png"), exif=exif)
            palette.save(label.with_suffix(".png"), exif=exif)
    folder = open_folder(root)
    for split in scene_parsing.SPLITS:
        image, classes = folder.read(split, 0)
        assert image.shape[:2] == (size if orientation < 5 else size[::-1])
        assert (image[..., 0] == 80 * (classes + 1)).all()


# --- geometry -------------------------------------------------------------------------------------------------


def bilinear(image, size):
    """Two taps per axis at (i + 0.5) * scale - 0.5, clamped: OpenCV's INTER_LINEAR written out in float."""
    for axis, new in enumerate(size):
        old = image.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        image = image.take(low, axis) * (1 - weight) + image.take(np.minimum(low + 1, old - 1), axis) * weight
    return image


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 60), st.integers(1, 60), st.integers(0, 999))
def test_resizing_is_opencvs(height, width, h, w, seed):
    """Image within rounding (8 bits after either axis) of the written-out rule, also when it shrinks; label
    by floor(i * scale).
    """
    random = np.random.RandomState(seed)
    image = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
    got = augment.resize_image(image, (h, w)).astype(float)
    assert np.abs(got - bilinear(image.astype(float), (h, w))).max() <= 1.5
    label = random.randint(0, 256, (height, width)).astype(np.uint8)
    # OpenCV's resizeNN, pixel by pixel: ifx = 1. / ((double)dst / src), sx = min(cvFloor(x * ifx), src - 1)
    rows, columns = (
        [min(math.floor(i * (1.0 / (dst / src))), src - 1) for i in range(dst)]
        for src, dst in ((height, h), (width, w))
    )
    assert np.array_equal(augment.resize_label(label, (h, w)), label[rows][:, columns])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(0, 999))
def test_crop_lies_inside_and_reaches_every_corner(height, width, size, seed):
    np.random.seed(seed)
    label = np.zeros((height, width), np.uint8)
    window = augment.random_crop(label, size, 0.75, 255)
    assert label[window].shape == (min(size, height), min(size, width))
    tops = {augment.random_crop(label, size, 1.0, 255)[0].start for _ in range(40 * max(1, height - size))}
    assert tops <= set(range(max(height - size, 0) + 1))


def test_crop_avoids_one_class_everywhere():
    """A window with less than 75 % of one class is found where there is one; ignored pixels do not count."""
    np.random.seed(0)
    label = np.zeros((32, 64), np.uint8)
    label[:, 32:] = np.arange(32) % 2 + 1
    label[:, :4] = 255
    shares = []
    for _ in range(50):
        counts = np.bincount(label[augment.random_crop(label, 16, 0.75, 255)].ravel(), minlength=256)[:255]
        shares.append(counts.max() / counts.sum())
    assert np.mean(np.array(shares) < 0.75) > 0.95  # one draw alone finds such a window in two of three cases


def test_hsv_equals_opencv():
    """Numbers printed by OpenCV 4.10 and 5.0 (cvtColor, 8 bit)."""
    rgb = [[12, 200, 34], [255, 0, 0], [1, 2, 3], [90, 90, 90], [250, 128, 7], [13, 77, 201], [0, 0, 0], [180, 20, 179]]
    hsv = [[64, 240, 200], [0, 255, 255], [105, 170, 3], [0, 0, 90], [15, 248, 250], [110, 238, 201], [0, 0, 0]]
    hsv.append([150, 227, 180])
    back = [
        [12, 200, 37],
        [255, 0, 0],
        [1, 2, 3],
        [90, 90, 90],
        [250, 128, 7],
        [13, 76, 201],
        [0, 0, 0],
        [180, 20, 180],
    ]
    pixels = np.array([rgb], np.uint8)
    converted = augment.rgb_to_hsv(pixels)
    assert np.stack(converted, -1)[0].tolist() == hsv
    assert np.abs(augment.hsv_to_rgb(*converted)[0].astype(int) - back).max() <= 1


def test_photometric_distortion_stays_in_range_and_varies():
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (12, 12, 3)).astype(np.uint8)
    results = []
    for seed in range(64):
        np.random.seed(seed)
        results.append(augment.photometric_distortion(pixels))
    assert all(result.dtype == np.uint8 and result.shape == pixels.shape for result in results)
    untouched = sum(np.array_equal(result, pixels) for result in results)
    assert 0 < untouched < 16  # each of four steps is skipped with probability 1/2: 1 in 16 is left as it was
    assert len({result.tobytes() for result in results}) > 50


# --- items ----------------------------------------------------------------------------------------------------


def test_training_item_depends_on_the_key_alone(root):
    """Not on the global generators nor on what was asked before: any worker count and resume point, one
    stream.
    """
    train = TrainScenes(open_folder(root), img_scale=(40, 20), crop_size=16)
    first = train[2, 77, 0]
    np.random.seed(1)
    train[1, 3, 0]
    state = np.random.get_state()[1].tolist()
    again = train[2, 77, 5]
    assert np.random.get_state()[1].tolist() == state
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], train[2, 78, 0]["image"])
    assert first["image"].shape == (3, 16, 16)
    assert first["image"].dtype == torch.float32
    assert first["label"].shape == (16, 16)
    assert (first["sample"], first["key"]) == (2, 77)


def test_small_images_are_padded_after_normalisation(root):
    """Zeros, that is the mean colour, and ignored labels, below and to the right."""
    train = TrainScenes(open_folder(root), img_scale=(15, 10), ratio_range=(1.0, 1.0), crop_size=24, hflip=0)
    item = train[0, 1, 0]
    assert item["image"].shape == (3, 24, 24)
    assert not item["image"][:, 10:].any()
    assert not item["image"][:, :, 15:].any()
    assert (item["label"][10:] == 255).all()
    assert (item["label"][:, 15:] == 255).all()
    assert (item["label"][:10, :15] != 255).any()


def test_image_and_label_move_together(root):
    """An image painted with its own label's colours still agrees with it after resize, crop and flip."""
    random = np.random.RandomState(0)
    label = np.kron(random.randint(1, 4, (6, 8)), np.ones((16, 16), int)).astype(np.uint8)
    write_scene(root, "training", "painted", size=label.shape, label=label)
    Image.fromarray(np.stack([label * 60] * 3, -1)).save(root / "images/training/painted.png")
    (root / "images/training/painted.jpg").unlink()
    train = TrainScenes(open_folder(root), img_scale=(128, 96), crop_size=64, photometric=False, std=(1, 1, 1))
    for key in range(8):
        item = train[0, key, 0]
        grey = 255 * (item["image"] + torch.tensor(IMAGENET_MEAN)[:, None, None])[0]
        inside = item["label"] != 255
        wrong = (grey - 60.0 * (item["label"].float() + 1)).abs() > 20
        assert wrong[inside].float().mean() < 0.2  # only the blurred borders
        assert inside.any()


def test_evaluation_item_has_each_ratio_and_the_original_label(root):
    """Every ratio is resized from the original image; the label stays as stored."""
    write_scene(root, "validation", "wide", size=(40, 100))
    data = EvalScenes(open_folder(root), img_scale=(64, 32), ratios=(0.5, 1.0, 1.75))
    index = next(i for i in range(len(data)) if "wide" in data[i, 0, 0]["path"])
    item = data[index, 0, 0]
    assert [tuple(image.shape[1:]) for image in item["images"]] == [(13, 32), (26, 64), (45, 112)]
    assert item["label"].shape == (40, 100)
    batch = scene_parsing.collate_scenes([item, data[0, 0, 0]])
    assert batch["sample"].tolist() == [index, 0]
    assert [tuple(label.shape) for label in batch["label"]] == [(40, 100), tuple(data[0, 0, 0]["label"].shape)]
