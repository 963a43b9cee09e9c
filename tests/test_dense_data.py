"""Augmentation with boxes, masks and labels: what is drawn on an image moves with it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from muntin.data.dense import (
    FILL,
    DetectionAugment,
    SegmentationAugment,
    around,
    collate_detection,
    collate_segmentation,
    fit,
    fitted,
    visible,
)
from muntin.errors import UserError

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)


def ellipses(height: int, width: int, seed: int, crowd: bool = False):
    """A black picture with three ellipses side by side, each of a colour of its own, and what is on it."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    masks = np.zeros((3, height, width), np.uint8)
    for place, mask in zip(random.permutation(3), masks, strict=True):
        radii = random.uniform(0.06, 0.16, 2) * (height, width)
        centre = random.uniform(radii, (height - radii[0], width / 3 - radii[1])) + (0, place * width / 3)
        mask[((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1] = 1
    masks = torch.from_numpy(masks)
    pixels = (masks[..., None] * COLOURS[:, None, None]).sum(0, dtype=torch.uint8)
    target = {
        "boxes": tv_tensors.BoundingBoxes(around(masks), format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([4, 5, 6]),
        "crowd": torch.tensor([False, crowd, False]),
        "area": masks.sum((1, 2)).float(),
        "masks": tv_tensors.Mask(masks),
    }
    return Image.fromarray(pixels.numpy()), target


def drawn(image: torch.Tensor, label: int) -> torch.Tensor:
    """Where an image clearly shows the colour of this label: (H, W) bool."""
    return (image.permute(1, 2, 0).int() - COLOURS[label - 4].int()).abs().amax(2) < 100


AUGMENTS = {
    "resize": DetectionAugment(96, 160, 48, flip=0.0),
    "flip": DetectionAugment(96, 160, 48, flip=1.0),
    "crop": DetectionAugment(96, 160, 48, flip=0.5, crop=1.0),
    "up": DetectionAugment(300, 400, flip=0.5, crop=0.5),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_boxes_and_masks_move_with_what_is_drawn(name):
    augment = AUGMENTS[name]
    objects = 0
    for seed in range(60):
        picture, target = ellipses(70 + seed, 130 - seed, seed)
        image, after = augment(picture, target, (0, 0, seed))
        height, width = image.shape[1:]
        assert image.dtype == torch.uint8 and after["masks"].shape[1:] == (height, width)
        assert min(height, width) <= augment.size and max(height, width) <= augment.longer
        for box, label, mask in zip(after["boxes"], after["labels"].tolist(), after["masks"], strict=True):
            objects += 1
            assert (box - around(mask[None])[0]).abs().max() <= 1  # the box is the mask's
            seen = drawn(image, label)
            assert (seen & (mask == 0)).sum() <= 0.03 * mask.sum() + 3  # and the mask is what the image shows
            assert seen.sum() >= 0.5 * mask.sum() - 30
            assert (box >= 0).all() and box[2] <= width and box[3] <= height
        shown = {label for label in (4, 5, 6) if drawn(image, label).sum() > 20}
        assert shown <= set(after["labels"].tolist())  # nothing that is to be seen was dropped
    assert objects > 100


def test_a_flip_mirrors_and_nothing_else_does():
    picture, target = ellipses(64, 96, 0)
    plain, mirrored = (
        DetectionAugment(64, None, flip=flip)(picture, target, (0, 0, 0)) for flip in (0.0, 1.0)
    )  # at the image's own size
    assert torch.equal(plain[0], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    assert torch.equal(plain[1]["masks"], target["masks"].as_subclass(torch.Tensor))
    assert torch.equal(mirrored[0], plain[0].flip(2))
    assert torch.equal(mirrored[1]["masks"], plain[1]["masks"].flip(2))
    assert torch.equal(mirrored[1]["boxes"][:, [0, 2]], 96 - plain[1]["boxes"][:, [2, 0]])


def test_boxes_alone_are_cut_off_by_a_crop_and_dropped_when_they_vanish():
    augment = DetectionAugment(40, None, flip=0.0, crop=1.0)
    counts = set()
    for seed in range(100):
        picture, target = ellipses(100, 100, seed)
        with_masks = augment(picture, target, (0, 0, seed))[1]
        del target["masks"]
        boxes, labels = augment(picture, target, (0, 0, seed))[1].values()
        counts.add(len(boxes))
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all() and (boxes >= 0).all()
        for box, label in zip(with_masks["boxes"], with_masks["labels"], strict=True):
            outer = boxes[labels == label][0]  # of what the mask has in the crop, or more
            assert (outer[:2] <= box[:2] + 0.01).all() and (outer[2:] >= box[2:] - 0.01).all()
    assert counts == {2, 3}  # a crop keeps at least 384 of 600 pixels


def test_crowds_and_what_has_vanished_are_not_trained_on():
    picture, target = ellipses(80, 80, 0, crowd=True)
    after = DetectionAugment(80, None, flip=0.0)(picture, target, (0, 0, 0))[1]
    assert after["labels"].tolist() == [4, 6] and set(after) == {"boxes", "labels", "masks"}
    boxes = torch.tensor([[0.0, 0, 5, 5], [0, 0, 0.5, 5], [3, 3, 6, 6]])
    masks = torch.stack([torch.ones(8, 8), torch.ones(8, 8), torch.zeros(8, 8)]).to(torch.uint8)
    assert visible({"boxes": boxes, "masks": masks}).tolist() == [True, False, False]
    assert visible({"boxes": boxes}).tolist() == [True, False, True]


def test_an_image_without_objects_is_augmented_as_any():
    picture, target = ellipses(50, 60, 0)
    none = torch.zeros(3, dtype=torch.bool)
    empty = {
        "boxes": tv_tensors.wrap(target["boxes"][none], like=target["boxes"]),
        "labels": target["labels"][none],
        "crowd": target["crowd"][none],
        "masks": tv_tensors.Mask(target["masks"][none]),
    }
    for seed in range(10):
        image, after = AUGMENTS["crop"](picture, empty, (0, 0, seed))
        assert after["boxes"].shape == (0, 4) and after["masks"].shape == (0, *image.shape[1:])
        whole, _ = AUGMENTS["crop"](picture, target, (0, 0, seed))
        assert torch.equal(image, whole)


def test_draws_are_functions_of_the_seed():
    detect, segment = AUGMENTS["crop"], SegmentationAugment(48)
    picture, target = ellipses(90, 70, 0)
    labels = {"labels": tv_tensors.Mask(target["masks"].amax(0))}
    for augment, what in ((detect, target), (segment, labels)):
        first = augment(picture, what, (1, 2, 3))
        torch.manual_seed(5), np.random.seed(5)
        second = augment(picture, what, (1, 2, 3))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
        others = [augment(picture, what, seed)[0] for seed in ((0, 2, 3), (1, 0, 3), (1, 2, 0))]
        assert all(other.shape != first[0].shape or not torch.equal(other, first[0]) for other in others)


def test_shorter_sides_are_drawn_from_their_whole_range():
    picture, target = ellipses(60, 80, 0)
    augment = DetectionAugment(48, 1000, 40)
    sides = [min(augment(picture, target, (0, 0, seed))[0].shape[1:]) for seed in range(80)]
    assert set(sides) == set(range(40, 49))


def test_crops_of_the_coco_recipe_have_its_proportions():
    """At a size of 800: sides of 384 to 600 pixels where the shorter side is 400, 500 or 600."""
    augment = DetectionAugment(800, 1333, 480, crop=1.0)
    sides = []
    for seed in range(300):
        top, left, height, width = augment._box((480, 640), np.random.default_rng(seed))
        assert top >= 0 and left >= 0 and top + height <= 480 and left + width <= 640
        sides.append((height, width))
    heights, widths = np.array(sides).T
    assert heights.min() >= round(384 / 600 * 480) and heights.max() == 480
    assert widths.min() >= round(384 / 800 * 640) and 590 < widths.max() <= 640  # 533 to 800 wide by then


@pytest.mark.parametrize(("size", "shorter", "longer", "found"), [
    ((480, 640), 800, 1333, (800, 1067)), ((200, 1000), 800, 1333, (267, 1333)), ((10, 1000), 1, None, (1, 100)),
    ((333, 500), 111, 1333, (111, 167)),
])  # fmt: skip
def test_images_are_fitted_by_their_shorter_side(size, shorter, longer, found):
    assert fitted(size, shorter, longer) == found
    assert fit(Image.new("RGB", size[::-1]), shorter, longer).shape == (3, *found)


def test_labels_stay_on_their_pixels():
    for seed in range(60):
        picture, target = ellipses(60 + seed, 90, seed)
        labels = tv_tensors.Mask((target["masks"] * torch.tensor([1, 2, 3])[:, None, None]).sum(0).to(torch.uint8))
        image, after = SegmentationAugment(64, distort=False)(picture, {"labels": labels}, (0, 0, seed))
        assert image.shape == (3, 64, 64) and after["labels"].shape == (64, 64)
        padded = after["labels"] == 255
        assert (image.permute(1, 2, 0)[padded] == torch.tensor(FILL, dtype=torch.uint8)).all()
        for label in (1, 2, 3):
            seen, mask = drawn(image, label + 3), after["labels"] == label
            assert (seen & ~mask).sum() <= 0.03 * mask.sum() + 3 and seen.sum() >= 0.5 * mask.sum() - 30


def test_small_images_are_padded_and_large_ones_cropped():
    picture, target = ellipses(60, 80, 0)
    labels = {"labels": tv_tensors.Mask(target["masks"].amax(0))}
    small = SegmentationAugment(64, scale=(0.5, 0.5), flip=0.0, distort=False)(picture, labels, (0, 0, 0))[1]["labels"]
    assert (small[:32, :43] != 255).all() and (small[32:] == 255).all() and (small[:, 43:] == 255).all()
    large = SegmentationAugment(64, scale=(2.0, 2.0))(picture, labels, (0, 0, 0))[1]["labels"]
    assert (large != 255).all()


def test_crops_of_nearly_one_class_are_drawn_again():
    """One corner of ten in the image is a second class; without another try one crop in eight would have both."""
    labels = torch.zeros(200, 200, dtype=torch.uint8)
    labels[:60, :60] = 1
    labels[-20:] = 255
    picture = Image.new("RGB", (200, 200))
    augment = SegmentationAugment(50, scale=(4.0, 4.0), flip=0.0, distort=False)
    mixed = 0
    for seed in range(100):
        crop = augment(picture, {"labels": tv_tensors.Mask(labels)}, (0, 0, seed))[1]["labels"]
        counts = crop.flatten().bincount(minlength=256)[:2]
        mixed += bool(counts.max() < 0.75 * counts.sum())
    assert mixed > 40


def test_distortion_changes_colours_alone_and_not_always():
    picture, target = ellipses(64, 64, 1)
    labels = {"labels": tv_tensors.Mask(target["masks"].amax(0))}
    kept = 0
    for seed in range(40):
        plain, distorted = (
            SegmentationAugment(64, (1.0, 1.0), 0.5, distort)(picture, labels, (0, 0, seed))
            for distort in (False, True)
        )
        assert torch.equal(plain[1]["labels"], distorted[1]["labels"])
        kept += torch.equal(plain[0], distorted[0])
    assert 0 < kept < 20


def test_batches_of_detection_are_padded_to_multiples_of_32():
    batch = [AUGMENTS["crop"](*ellipses(60, 90, seed), (0, 0, seed)) for seed in range(4)]
    images, sizes, targets = collate_detection(batch)
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    assert images.shape == (4, 3, -(-height // 32) * 32, -(-width // 32) * 32) and images.dtype == torch.uint8
    fill = torch.tensor(FILL, dtype=torch.uint8)
    for image, (height, width), (single, target), found in zip(images, sizes, batch, targets, strict=True):
        assert torch.equal(image[:, :height, :width], single) and found is target
        assert (image.permute(1, 2, 0)[height:] == fill).all() and (image.permute(1, 2, 0)[:, width:] == fill).all()


def test_batches_of_segmentation_are_padded_with_what_is_ignored():
    batch = [
        (torch.full((3, h, w), 7, dtype=torch.uint8), {"labels": torch.full((h, w), 1, dtype=torch.uint8)})
        for h, w in ((4, 6), (5, 3))
    ]
    images, labels = collate_segmentation(batch)
    assert images.shape == (2, 3, 5, 6) and labels.shape == (2, 5, 6) and labels.dtype == torch.int64
    assert (labels[0, :4] == 1).all() and (labels[0, 4:] == 255).all() and (labels[1, :, 3:] == 255).all()


@pytest.mark.parametrize("wrong", [
    lambda: DetectionAugment(100, 50), lambda: DetectionAugment(100, None, 200), lambda: DetectionAugment(100, None, 0),
    lambda: SegmentationAugment(0), lambda: SegmentationAugment(64, scale=(2.0, 0.5)),
])  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match="give "):
        wrong()
