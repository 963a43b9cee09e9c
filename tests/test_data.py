"""Decoding, splits, and batches that are pure functions."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from muntin.data import decode
from muntin.data.augment import Distort, Photographs
from muntin.data.datasets import (
    Images,
    Splits,
    load_digits,
    select,
    stratified,
)
from muntin.data.decode import Encoded, cut, read_image
from muntin.data.device import Erase, Prepare
from muntin.data.images import BadImage, check_image, open_image, read_bytes
from muntin.data.loading import EpochBatches, EvaluationSet, TrainingSet, evaluation_loader
from muntin.data.sources import open_splits, splits_from_json
from muntin.data.transforms import Evaluate
from muntin.errors import UserError


def folder_of(root, counts, size=(16, 16)):
    """FOLDER/CLASS/*.png with noise."""
    noise = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


# Decoding


def written(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_transparency_is_shown_over_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    image.putpixel((2, 0), (0, 0, 255, 128))
    found = open_image(written(tmp_path, image))
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (255, 0, 0)
    assert found.getpixel((1, 0)) == (255, 255, 255)
    assert found.getpixel((2, 0)) == pytest.approx((127, 127, 255), abs=1)


def test_a_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    found = open_image(written(tmp_path, image, transparency=1))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("1", "a.png"), ("LA", "a.png"), ("L", "a.jpg")])
def test_grey_becomes_three_equal_channels(tmp_path, mode, name):
    found = open_image(written(tmp_path, Image.new("L", (3, 2), 255).convert(mode), name))
    assert found.mode == "RGB" and found.getpixel((1, 1)) == (255, 255, 255)


def test_cmyk(tmp_path):
    found = open_image(written(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "image.jpg", quality=100))
    red, green, blue = found.getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    found = open_image(written(tmp_path, Image.fromarray(values)))
    assert [found.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert open_image(written(tmp_path, image, "image.jpg", exif=exif)).size == (20, 30)


def check(path):
    return check_image(read_bytes(path), str(path))


def broken_images(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = {name: written(tmp_path, noise, f"whole{name}").read_bytes() for name in (".png", ".jpg")}
    (tmp_path / "cut.png").write_bytes(whole[".png"][:2000])
    (tmp_path / "cut.jpg").write_bytes(whole[".jpg"][:1000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name, words",
    [
        ("cut.png", "is damaged"),
        ("cut.jpg", "is damaged"),
        ("empty.png", "is empty"),
        ("text.png", "is not a readable image"),
        ("folder.png", "cannot be read"),
        ("absent.png", "does not exist"),
    ],
)
@pytest.mark.parametrize("read", [open_image, check, lambda path: read_image(path).image()])
def test_a_broken_image_is_named_with_its_fault(tmp_path, name, words, read):
    with pytest.raises(BadImage, match=rf"{name} {words}"):
        read(broken_images(tmp_path) / name)


@pytest.mark.parametrize("side", [12, 16])
@pytest.mark.parametrize("read", [open_image, check, lambda path: read_image(path).image()])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, side, read):
    path = written(tmp_path, Image.new("L", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match=r"image\.png is too large to decode safely \(more than 100 pixels\)"):
        read(path)


# Splits


def test_splits_keep_the_shares_of_every_class_and_are_disjoint():
    labels = [0] * 100 + [1] * 50 + [2] * 10
    parts = stratified(labels, seed=0)
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == list(range(160))
    for part, shares in (("test", [20, 10, 2]), ("val", [10, 5, 1]), ("train", [70, 35, 7])):
        assert np.bincount([labels[i] for i in parts[part]]).tolist() == shares
    assert stratified(labels, seed=0) == parts
    assert stratified(labels, seed=1)["test"] != parts["test"]


def test_a_class_of_one_or_two_images_is_trained_on():
    parts = stratified([0, 1, 1, 2, 2, 2], seed=0)
    assert {0, 1, 2} == {[0, 1, 1, 2, 2, 2][i] for i in parts["train"]}


def test_the_digits_are_split_into_about_70_10_and_20_percent():
    splits = open_splits("digits", 0, 32)
    assert [round(len(part) / 1797, 2) for part in (splits.train, splits.val, splits.test)] == [0.7, 0.1, 0.2]
    position = 5
    assert splits.test.open(position) == load_digits().open(splits.test.keys[position])


def test_overlapping_splits_are_refused():
    images = Images([1, 2], [0, 1], ["a", "b"], lambda position: Image.new("RGB", (1, 1)))
    with pytest.raises(RuntimeError, match="overlap"):
        Splits(images, images, None, True)


def test_a_folder_of_classes_is_split_once_and_read_back(tmp_path):
    root = folder_of(tmp_path, {"cat": 12, "dog": 20})
    splits = open_splits(str(root), 3, 16)
    assert splits.train.classes == ["cat", "dog"] and splits.plain_resize
    assert len(splits.train) + len(splits.val) + len(splits.test) == 32
    stored = json.loads(json.dumps(splits.json()))
    folder_of(tmp_path, {"cat": 15})  # images that come later are in no split
    again = splits_from_json(str(root), stored, plain_resize=True)
    for before, after in ((splits.train, again.train), (splits.val, again.val), (splits.test, again.test)):
        assert (before.keys, before.labels) == (after.keys, after.labels)
        assert before.open(0) == after.open(0)


def test_a_folder_with_train_and_val_keeps_them(tmp_path):
    folder_of(tmp_path / "train", {"cat": 4, "dog": 3}, size=(40, 30))
    folder_of(tmp_path / "val", {"dog": 2}, size=(40, 30))
    splits = open_splits(str(tmp_path), 0, 16)
    assert (len(splits.train), len(splits.val), splits.test) == (7, 2, None)
    assert splits.val.labels == [1, 1] and not splits.plain_resize
    again = splits_from_json(str(tmp_path), splits.json(), plain_resize=False)
    assert again.val.labels == [1, 1] and again.train.keys == splits.train.keys


def test_a_class_may_be_called_test(tmp_path):
    root = folder_of(tmp_path, {"test": 6, "other": 6})
    splits = open_splits(str(root), 0, 16)
    assert splits_from_json(str(root), splits.json(), True).train.labels == splits.train.labels


def test_labels_that_were_changed_are_refused_where_the_split_was_drawn(tmp_path):
    folder_of(tmp_path, {"cat": 6, "dog": 6})
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(tmp_path.rglob("*.png"))]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["image,label", *rows]))
    splits = open_splits(str(table), 0, 16)
    stored = json.loads(json.dumps(splits.json()))
    assert splits_from_json(str(table), stored, True).train.labels == splits.train.labels
    table.write_text(table.read_text().replace(f"{splits.train.keys[0]},cat", f"{splits.train.keys[0]},dog"))
    told = r"the train part is not that of the run's split.json \((\d+) images, \1 then, or other names or labels"
    with pytest.raises(UserError, match=told):
        splits_from_json(str(table), stored, True)
    del stored["sha256"]  # of a run from before the digests
    assert splits_from_json(str(table), stored, True).train.labels != splits.train.labels


def test_an_image_that_has_gone_is_named(tmp_path):
    root = folder_of(tmp_path, {"cat": 6, "dog": 6})
    splits = open_splits(str(root), 0, 16)
    (root / str(splits.test.keys[0])).unlink()
    with pytest.raises(UserError, match=rf"{splits.test.keys[0]} is in the run's split.json but not on the disk"):
        splits_from_json(str(root), splits.json(), True)


# Transforms


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre():
    image = Image.new("RGB", (512, 256))
    image.paste((255, 255, 255), (128, 0, 384, 256))  # the middle half is white
    tensor = Evaluate((224, 224), 256, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert tensor.shape == (3, 224, 224) and tensor.min() == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (31, 32)])
def test_any_image_fills_the_input(size):
    white = Evaluate((32, 48), 36, mean=(0, 0, 0), std=(1, 1, 1))(Image.new("RGB", size, (255, 255, 255)))
    assert white.shape == (3, 32, 48) and white.min() == 1


def augments():
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    picture = Evaluate((16, 16), None, mean, std).picture
    return {
        "distort": Distort(picture),
        "photographs": Photographs((16, 16), mean),
        "jitter": Photographs((16, 16), mean, strength=""),
    }


@pytest.mark.parametrize("name", ["distort", "photographs", "jitter"])
def test_augmentation_draws_from_seed_epoch_and_index_alone(name):
    augment = augments()[name]
    image = load_digits().open(3).resize((20, 20))
    torch.manual_seed(5)
    np.random.standard_normal()  # a second deviate is kept by numpy's generator
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    first = augment(image, (0, 1, 2))
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(state[0], after[0]) and state[1:] == after[1:]
    torch.manual_seed(6)
    random.random()
    assert torch.equal(augment(image, (0, 1, 2)), first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(augment(image, other), first)


def test_no_distortion_is_the_picture_itself():
    evaluate = Evaluate((16, 16), None)
    image = load_digits().open(3)
    augment = Distort(evaluate.picture, strength=0)
    torch.testing.assert_close(augment(image, (0, 0, 0)), evaluate.bytes(image), atol=1, rtol=0)


def photograph(width, height, quality=90):
    """A JPEG with structure at all scales, as a photograph has."""
    noise = np.random.default_rng(7)
    values = np.zeros((height, width, 3))
    for octave in range(1, 8):
        coarse = noise.standard_normal((2**octave, 2**octave, 3)).astype(np.float32)
        layers = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(3)]
        values += 0.6**octave * np.stack([np.asarray(layer) for layer in layers], -1)
    pixels = (120 + 50 * values / values.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return Encoded(file.getvalue(), "photograph.jpg")


@pytest.mark.parametrize(
    "box, bound", [((0, 0, 60, 50), 0.1), ((13, 7, 113, 130), 1.5), ((20, 4, 290, 260), 2.5), ((0, 0, 500, 375), 3.0)]
)
def test_a_crop_is_close_to_one_of_a_full_decode(box, bound):
    """The mean absolute difference to Pillow's full decode and bicubic resize, as timm crops, in levels of 255:
    rounding alone where nothing is reduced, otherwise that of half a pixel's move and of JPEG's own scaling."""
    photo = photograph(500, 375)
    full = np.asarray(Image.open(io.BytesIO(photo.data)).resize((64, 64), Image.BICUBIC, box=box))
    found = cut(photo, box, (64, 64))
    assert np.abs(found.astype(int) - full).mean() < bound


def test_evaluation_is_pillows_within_rounding():
    photo = photograph(250, 180)
    image = Image.open(io.BytesIO(photo.data)).resize((89, 64), Image.BICUBIC).crop((16, 4, 72, 60))
    found = Evaluate((56, 56), 64).pixels(photo)
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 4
    small = photograph(120, 100)  # less than twice what is needed: decoded whole
    assert np.array_equal(Evaluate((56, 56), 64).pixels(small), Evaluate((56, 56), 64).pixels(small.image()))


def test_a_photograph_is_decoded_at_no_larger_a_scale_than_the_crop_needs():
    photo = photograph(500, 375)
    shapes = []
    pixels = photo.pixels
    photo.pixels = lambda eighths: shapes.append(pixels(eighths).shape[:2]) or pixels(eighths)
    for box, size in (((0, 0, 375, 375), 94), ((0, 0, 375, 375), 93), ((0, 0, 375, 375), 300), ((0, 0, 99, 9), 64)):
        cut(photo, box, (size, size))
    assert shapes == [(188, 250), (94, 125), (375, 500), (375, 500)]


def test_turned_grey_and_cmyk_jpegs_show_what_pillow_shows(tmp_path):
    image = Image.open(io.BytesIO(photograph(60, 40).data))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name, size in (("turned", (40, 60)), ("grey", (60, 40)), ("cmyk", (60, 40))):
        read = read_image(tmp_path / f"{name}.jpg")
        assert read.size == size
        assert np.array_equal(read.pixels(), np.asarray(open_image(tmp_path / f"{name}.jpg")))


def test_without_simplejpeg_the_pixels_are_the_same(monkeypatch):
    photo = photograph(80, 60)
    fast = photo.pixels()
    monkeypatch.setattr(decode, "_turbo", lambda: None)
    slow = Encoded(photo.data, "photograph.jpg")
    assert np.array_equal(slow.pixels(), fast)
    assert cut(slow, (0, 0, 80, 60), (10, 10)).shape == (10, 10, 3)


def test_random_crops_follow_timms_law():
    """Mean and spread of area and ratio of 4000 crops, each way; the standard error of a mean is below 0.006."""
    from timm.data.transforms import RandomResizedCropAndInterpolation

    random.seed(0)
    timms = RandomResizedCropAndInterpolation(224)
    image = Image.new("RGB", (500, 375))
    theirs = [timms.get_params(image, timms.scale, timms.ratio) for _ in range(4000)]  # top, left, height, width
    photographs = Photographs((224, 224), (0.5, 0.5, 0.5))
    ours = [photographs.crop((500, 375), (0, 0, index))[0] for index in range(4000)]

    def figures(boxes):
        left, top, right, bottom = (np.array(sides, dtype=float) for sides in zip(*boxes, strict=True))
        wide, tall = right - left, bottom - top
        values = [wide * tall / 187500, np.log(wide / tall), left / (501 - wide), top / (376 - tall)]
        return [float(f(value)) for value in values for f in (np.mean, np.std)]

    expected = figures([(left, top, left + wide, top + tall) for top, left, tall, wide in theirs])
    assert figures(ours) == pytest.approx(expected, abs=0.025)


def test_no_strength_of_the_policy_fails():
    """timm asks Pillow to keep no bit of an image at the largest magnitudes, which recent versions refuse."""
    augment = Photographs((16, 16), (0.5, 0.5, 0.5), "rand-m10-n15-inc1")
    image = load_digits().open(3).resize((20, 20))
    for index in range(20):
        assert augment(image, (0, 0, index)).shape == (3, 16, 16)


def test_dense_labels_learn_where_the_crop_was():
    image = Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(30, 40).astype(np.uint8)).convert("RGB")
    augment = Photographs((16, 16), (0.5, 0.5, 0.5), strength="", color_jitter=0)
    for index in range(6):
        box, flipped = augment.crop(image.size, (0, 0, index))
        expected = cut(image, box, (16, 16))
        expected = expected[:, ::-1] if flipped else expected
        assert np.array_equal(augment(image, (0, 0, index)).permute(1, 2, 0).numpy(), expected)


def test_the_augmentation_says_what_it_does():
    shown = repr(Photographs((16, 16), (0.5, 0.5, 0.5)))
    assert "RandomResizedCrop(size=(16, 16), scale=(0.08, 1.0)" in shown and "RandAugment(n=2" in shown
    assert "ColorJitter(brightness=(0.6, 1.4)" in repr(Photographs((16, 16), (0.5, 0.5, 0.5), strength=""))


# On the device


def test_a_batch_is_normalised_as_one_image_is():
    evaluate = Evaluate((16, 16), None)
    image = load_digits().open(3)
    batch = torch.stack([evaluate.bytes(image)] * 2)
    assert torch.equal(Prepare(evaluate.mean, evaluate.std)(batch)[1], evaluate(image))
    assert batch.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["shear_x", "shear_y", "translate_x", "translate_y"])
def test_shears_and_translations_are_timms(kind):
    """By at most one level, in few values: those just below a whole number."""
    from timm.data import auto_augment

    from muntin.data import shear

    ours, theirs = getattr(shear, kind), getattr(auto_augment, kind + "_rel" * kind.startswith("translate"))
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize((65, 49), Image.BICUBIC)
    how = {"resample": Image.BICUBIC, "fillcolor": (124, 116, 104)}
    differ = 0
    for amount in (0.0, 0.3, -0.3, 0.125, 1.5, *random.uniform(-0.45, 0.45, 20)):
        found, wanted = (np.asarray(f(smooth, float(amount), **how)).astype(int) for f in (ours, theirs))
        assert abs(found - wanted).max() <= 1
        differ += (found != wanted).sum()
    assert differ < 0.005 * 25 * 65 * 49 * 3
    grey = smooth.convert("L")
    assert ours(grey, 0.2, resample=Image.BILINEAR, fillcolor=9) == theirs(
        grey, 0.2, resample=Image.BILINEAR, fillcolor=9
    )


def test_erasing_follows_timms_law_and_leaves_the_rest():
    """Share of erased images and of erased pixels among 600, each way: standard errors 0.018 and 0.006."""
    from timm.data.random_erasing import RandomErasing

    torch.manual_seed(0)
    random.seed(0)
    ours = Erase(0.25)(torch.full((600, 3, 32, 48), 9.0))
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")(torch.full((600, 3, 32, 48), 9.0))

    def figures(images):
        erased = images != 9
        assert torch.equal(erased.all(1), erased.any(1))
        values = images[erased]
        return [float(erased.flatten(1).any(1).float().mean()), float(erased.float().mean()), float(values.std())]

    assert figures(ours) == pytest.approx(figures(theirs), abs=0.06)
    assert figures(ours)[0] == pytest.approx(0.25, abs=0.06)


def test_erasing_repeats_with_the_generator_and_can_be_off():
    batch = torch.rand(8, 3, 16, 16)
    torch.manual_seed(3)
    first = Erase(0.9)(batch.clone())
    torch.manual_seed(3)
    assert torch.equal(Erase(0.9)(batch.clone()), first) and not torch.equal(first, batch)
    assert torch.equal(Erase(0.0)(batch.clone()), batch)


# Batches


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_give_bytes_in_the_order_of_the_items(workers):
    splits = open_splits("digits", 0, 16)
    evaluate = Evaluate((16, 16), None)
    loader = evaluation_loader(EvaluationSet(select(splits.val, range(10)), evaluate.bytes), 5, workers)
    batches = list(loader)
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.uint8 and images.shape == (10, 3, 16, 16)
    assert torch.equal(images[7], evaluate.bytes(splits.val.open(7)))
    assert torch.cat([targets for _, targets in batches]).tolist() == splits.val.labels[:10]


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_and_can_start_anywhere():
    batches = EpochBatches(count=50, batch_size=8, seed=1)
    batches.set_epoch(4)
    whole = list(batches)
    assert len(whole) == len(batches) == 6
    assert len({position for batch in whole for _, position in batch}) == 48
    assert {epoch for batch in whole for epoch, _ in batch} == {4}
    resumed = EpochBatches(50, 8, seed=1)
    resumed.begin(4 * len(batches) + 2)
    resumed.set_epoch(4)  # as Lightning does
    assert list(resumed) == whole[2:] and len(resumed) == 6
    resumed.set_epoch(5)
    assert len(list(resumed)) == 6 and list(resumed) != whole
    other = EpochBatches(50, 8, seed=2)
    other.set_epoch(4)
    assert list(other) != whole


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert [len(batch) for batch in EpochBatches(5, 64, seed=0)] == [5]


def test_a_training_item_is_a_function_of_epoch_and_position():
    splits = open_splits("digits", 0, 16)
    data = TrainingSet(splits.train, augments()["distort"], seed=0)
    assert torch.equal(data[(3, 7)][0], data[(3, 7)][0])
    assert not torch.equal(data[(3, 7)][0], data[(4, 7)][0])
    assert data[(3, 7)][1] == splits.train.labels[7]
