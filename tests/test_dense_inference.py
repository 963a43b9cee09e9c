"""Detection and segmentation of pictures of any size: where boxes, masks and labels end up, and what views change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from muntin.data.dense import fit
from muntin.data.rle import decode_rle
from muntin.errors import UserError
from muntin.heads import paste_masks
from muntin.tasks.dense_inference import Detections, coco_results, detect, segment
from muntin.tasks.merging import merge
from muntin.tasks.windows import LabelMap, windows

PREPROCESSING = {"fit": {"shorter": 64, "longer": 150}, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SHARES = torch.tensor([[0.1, 0.2, 0.55, 0.7], [0.5, 0.05, 0.9, 0.95], [0.0, 0.0, 1.0, 1.0]])


def picture(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class Placed(nn.Module):
    """Finds objects at fixed shares of the image's sides, whatever it shows."""

    def __init__(self):
        super().__init__()
        self.masks = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        height, width = images.shape[2:]
        boxes = SHARES * torch.tensor([width, height, width, height])
        found = {"boxes": boxes, "scores": torch.tensor([0.5, 0.9, 0.2]), "labels": torch.tensor([4, 0, 2])}
        return [found | {"masks": self.masks} for _ in images]


class Bright(nn.Module):
    """Finds what is bright in each channel: its bounding box, its shape, and how bright it is."""

    num_classes = 3
    head_config = SimpleNamespace(nms=0.5, detections=5)

    def forward(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        found = {"boxes": [], "scores": [], "labels": [], "masks": []}
        for channel, values in enumerate(image):
            rows, columns = (values > 0.5).any(1).nonzero()[:, 0], (values > 0.5).any(0).nonzero()[:, 0]
            if not len(rows):
                continue
            x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
            part = (values[y1:y2, x1:x2] > 0.5).float()
            found["boxes"].append(torch.tensor([x1, y1, x2, y2]).float())
            found["scores"].append(values.mean())
            found["labels"].append(torch.tensor(channel))
            found["masks"].append(F.interpolate(part[None, None], (28, 28), mode="bilinear")[0, 0])
        empty = {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 28, 28)}
        return {key: torch.stack(values) if values else torch.zeros(empty[key]) for key, values in found.items()}


class Filter(nn.Module):
    """Logits by one convolution: of the pixel alone, or of its neighbours too."""

    def __init__(self, classes=5, kernel=1):
        super().__init__()
        self.num_classes = classes
        self.conv = nn.Conv2d(3, classes, kernel, padding=kernel // 2)
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(self.conv.weight, generator=generator)

    def forward(self, images):
        return self.conv(images)


def shapes():
    pixels = np.zeros((120, 180, 3), np.uint8)
    pixels[20:70, 30:100, 0] = 255
    pixels[40:110, 90:150, 1] = 255
    pixels[60:80, 0:40, 1] = 255
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("size", [(101, 67), (67, 101), (64, 64), (1000, 33), (5, 3)])
def test_boxes_come_back_to_the_pictures_own_pixels(size):
    (found,) = detect(Placed().eval(), [picture(*size)], PREPROCESSING)
    order = [1, 0, 2]  # by score
    expected = SHARES[order] * torch.tensor([*size, *size])
    torch.testing.assert_close(found.boxes, expected, rtol=1e-6, atol=1e-4)
    assert found.labels.tolist() == [0, 4, 2] and found.scores.tolist() == pytest.approx([0.9, 0.5, 0.2])


def test_masks_are_pasted_as_on_the_whole_picture():
    model = Placed().eval()
    for size in ((101, 67), (333, 401)):
        (found,) = detect(model, [picture(*size)], PREPROCESSING)
        whole = paste_masks(model.masks[[1, 0, 2]], found.boxes, (size[1], size[0]))
        for rle, mask in zip(found.masks, whole, strict=True):
            assert rle["size"] == [size[1], size[0]]
            assert (decode_rle(rle) != mask.numpy()).mean() < 1e-3  # a probability of .5 in other rounding


def test_results_are_cocos_and_those_of_a_raw_batch_are_the_same():
    model = Placed().eval()
    image = picture(101, 67)
    (found,) = detect(model, [image], PREPROCESSING)
    rows = found.coco(7)
    assert [row["category_id"] for row in rows] == [1, 5, 3] and {row["image_id"] for row in rows} == {7}
    x, y, w, h = rows[0]["bbox"]
    assert (x, y, x + w, y + h) == pytest.approx((50.5, 3.35, 90.9, 63.65), abs=1e-3)
    pixels = fit(image, 64, 150)
    with torch.inference_mode():
        (raw,) = model(pixels[None].float())
    assert coco_results(raw, tuple(pixels.shape[1:]), (67, 101), 7) == rows


def test_pictures_of_many_sizes_come_back_in_order_whatever_shares_a_batch():
    pictures = [shapes().resize(size) for size in ((180, 120), (90, 90), (60, 99), (180, 120), (90, 90), (180, 120))]
    together = list(detect(Bright().eval(), pictures, PREPROCESSING, batch_size=2))
    for image, found in zip(pictures, together, strict=True):
        (alone,) = detect(Bright().eval(), [image], PREPROCESSING, batch_size=1)
        assert (found.boxes == alone.boxes).all() and found.masks == alone.masks
        assert found.boxes[0, 2] <= image.width


def test_flips_of_a_model_that_turns_with_the_image_change_nothing():
    (plain,) = detect(Bright().eval(), [shapes()], PREPROCESSING)
    (flipped,) = detect(Bright().eval(), [shapes()], PREPROCESSING, flip=True)
    assert len(plain.boxes) == 2
    torch.testing.assert_close(flipped.boxes, plain.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(flipped.scores, plain.scores)
    assert flipped.masks == plain.masks and flipped.labels.tolist() == plain.labels.tolist()


def test_what_only_the_mirror_image_shows_is_turned_back():
    class Half(Bright):
        calls = 0

        def find(self, image):
            self.calls += 1
            return super().find(image if self.calls == 2 else torch.zeros_like(image))

    (plain,) = detect(Bright().eval(), [shapes()], PREPROCESSING)
    (mirrored,) = detect(Half().eval(), [shapes()], PREPROCESSING, flip=True)
    torch.testing.assert_close(mirrored.boxes, plain.boxes, rtol=0, atol=1e-3)
    for mask, turned in zip(plain.masks, mirrored.masks, strict=True):
        assert (decode_rle(mask) != decode_rle(turned)).mean() < 1e-3


def test_scales_of_a_model_that_finds_the_same_change_nothing():
    (plain,) = detect(Placed().eval(), [picture(101, 67)], PREPROCESSING)
    (scaled,) = detect(Placed().eval(), [picture(101, 67)], PREPROCESSING, scales=(0.5, 1, 1.7), flip=False)
    torch.testing.assert_close(scaled.boxes, plain.boxes, rtol=0, atol=1e-3)
    assert scaled.scores.tolist() == plain.scores.tolist()


def test_views_are_merged_by_votes_within_a_class():
    def view(boxes, scores, labels):
        return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    one = view([[0.0, 0, 10, 10], [50, 50, 60, 60]], [0.6, 0.3], [0, 1])
    other = view([[1.0, 0, 11, 10], [0, 0, 10, 10], [53, 50, 63, 60]], [0.2, 0.5, 0.4], [0, 1, 1])
    found = merge([one, other], 0.5, 10)
    assert found["labels"].tolist() == [0, 1, 1] and found["scores"].tolist() == pytest.approx([0.6, 0.5, 0.4])
    assert found["boxes"][0].tolist() == pytest.approx([0.25, 0, 10.25, 10])  # (0.6 * 0 + 0.2 * 1) / 0.8
    assert found["boxes"][2].tolist() == [53, 50, 63, 60]  # the lesser one overlapped by 0.54: gone, without a vote
    assert len(merge([one, other], 0.5, 2)["boxes"]) == 2


def test_thresholds_leave_out_what_is_less_sure():
    (found,) = detect(Placed().eval(), [picture(80, 64)], PREPROCESSING, threshold=0.5)
    assert found.scores.tolist() == pytest.approx([0.9, 0.5]) and len(found.masks) == 2
    assert len(found.above(0.6).masks) == 1
    (nothing,) = detect(Bright().eval(), [Image.new("RGB", (30, 20))], PREPROCESSING)
    assert isinstance(nothing, Detections) and nothing.coco(1) == []


# ---------------------------------------------------------------------------------------------------------- label maps


def normalised(image):
    return fit(image, 64, 150)[None].float() / 255


def by_hand(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def agree(labels, logits):
    """Labels are the classes of the largest logit; where the two largest are equal but for rounding, either."""
    best = logits.max(0).values
    chosen = logits.gather(0, labels.long()[None])[0]
    torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(101, 67), (64, 64), (30, 200), (333, 250), (3, 5)])
def test_labels_are_those_of_logits_at_the_pictures_size(size, monkeypatch):
    monkeypatch.setattr("muntin.tasks.windows.STRIP", 5 * size[0] * 7)  # seven rows at once
    model = Filter(kernel=3).eval()
    (labels,) = segment(model, [picture(*size)], PREPROCESSING)
    with torch.no_grad():
        logits = by_hand(model(normalised(picture(*size))), (size[1], size[0]))[0]
    assert labels.shape == (size[1], size[0]) and labels.dtype == torch.uint8
    agree(labels, logits)
    assert (labels == logits.argmax(0)).float().mean() > 0.999


def sliding(model, images, crop, stride):
    """As mmsegmentation has it, written out."""
    height, width = images.shape[2:]
    total, count = torch.zeros(1, model.num_classes, height, width), torch.zeros(1, 1, height, width)
    for row in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for column in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[:, :, top:bottom, left:right] += model(images[:, :, top:bottom, left:right])
            count[:, :, top:bottom, left:right] += 1
    assert (count > 0).all()
    return total / count


@pytest.mark.parametrize("crop", [(40, 48), (64, 30), (33, 33), (20, 200)])
@pytest.mark.parametrize("stride", [None, (20, 17), (13, 29)])
def test_windows_that_slide_are_averaged(crop, stride):
    model = Filter(kernel=5).eval()
    image = picture(131, 97)
    (labels,) = segment(model, [image], PREPROCESSING, crop=crop, stride=stride)
    with torch.no_grad():
        step = stride or (-(-2 * crop[0] // 3), -(-2 * crop[1] // 3))
        logits = by_hand(sliding(model, normalised(image), crop, step), (97, 131))[0]
    agree(labels, logits)


def test_a_window_as_large_as_the_image_is_the_whole_image():
    model, image = Filter(kernel=3).eval(), picture(131, 97)
    (whole,) = segment(model, [image], PREPROCESSING)
    (window,) = segment(model, [image], PREPROCESSING, crop=(64, 90))
    assert (whole == window).all()


def test_views_average_their_probabilities():
    model, image = Filter(kernel=3).eval(), picture(131, 97)
    (labels,) = segment(model, [image], PREPROCESSING, scales=(0.75, 1.0, 1.5), flip=True)
    total = 0
    with torch.no_grad():
        for shorter, longer in ((48, 112), (64, 150), (96, 225)):
            pixels = fit(image, shorter, longer)[None].float() / 255
            for mirrored in (False, True):
                logits = model(pixels.flip(-1)).flip(-1) if mirrored else model(pixels)
                total = total + by_hand(logits, (97, 131))[0].softmax(0)
    chosen = total.gather(0, labels.long()[None])[0]
    assert (total.max(0).values - chosen).max() < 6 * 2e-3  # sums in 16 bits
    assert (labels == total.argmax(0)).float().mean() > 0.995


def test_flips_of_a_filter_of_single_pixels_change_nothing():
    model, image = Filter(kernel=1).eval(), picture(131, 97)
    (plain,) = segment(model, [image], PREPROCESSING)
    (flipped,) = segment(model, [image], PREPROCESSING, flip=True)
    assert (plain == flipped).float().mean() > 0.998
    (slid,) = segment(model, [image], PREPROCESSING, crop=(30, 41), flip=True)
    assert (plain == slid).float().mean() > 0.998


def test_label_maps_come_back_in_order_of_their_pictures():
    pictures = [picture(w, h, seed) for seed, (w, h) in enumerate([(80, 64), (64, 99), (80, 64), (70, 70), (80, 64)])]
    model = Filter(kernel=3).eval()
    for crop in (None, (32, 40)):
        together = list(segment(model, pictures, PREPROCESSING, crop=crop, batch_size=2))
        for image, labels in zip(pictures, together, strict=True):
            (alone,) = segment(model, [image], PREPROCESSING, crop=crop)
            assert (labels == alone).float().mean() > 0.999


def test_no_more_rows_are_held_than_are_needed():
    model = Filter(classes=3).eval()
    images = torch.rand(1, 3, 400, 30)
    label_map = LabelMap((600, 45), 1)
    for top, logits in windows(model, images, (40, 30), (20, 20)):
        label_map.add(logits[0], top, 400)
        assert label_map.rows.shape[1] <= 2
    assert label_map.next == 600
    with torch.no_grad():
        agree(label_map.labels(), by_hand(model(images), (600, 45))[0])


def test_more_classes_than_a_byte_has():
    model = Filter(classes=300).eval()
    (labels,) = segment(model, [picture(70, 64)], PREPROCESSING)
    with torch.no_grad():
        assert (labels == model(fit(picture(70, 64), 64, 150)[None] / 255)[0].argmax(0)).float().mean() > 0.999
    assert labels.max() > 255 or labels.dtype == torch.int32


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals():
    model = Filter().eval()
    with pytest.raises(UserError, match="training mode"):
        next(segment(Filter().train(), [picture(9, 9)], PREPROCESSING))
    with pytest.raises(UserError, match="scales="):
        next(detect(Placed().eval(), [picture(9, 9)], PREPROCESSING, scales=()))
    with pytest.raises(UserError, match="scales="):
        next(segment(model, [picture(9, 9)], PREPROCESSING, scales=(1.0, 0.0)))
    with pytest.raises(UserError, match="give its crop too"):
        next(segment(model, [picture(9, 9)], PREPROCESSING, stride=(3, 3)))
    with pytest.raises(UserError, match="at least one pixel"):
        next(segment(model, [picture(9, 9)], PREPROCESSING, crop=(3, 0)))
