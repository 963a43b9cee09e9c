"""Run lengths of masks, byte for byte pycocotools' own."""

import numpy as np
import pytest
from pycocotools import mask as coco

from muntin.data.rle import decode_rle, encode_rle, run_lengths
from muntin.errors import UserError


def masks():
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 40), (40, 1), (7, 5), (33, 64), (480, 321)):
        for share in (0.0, 0.02, 0.5, 0.98, 1.0):
            yield (random.random((height, width)) < share).astype(np.uint8)
    for height, width in ((60, 90), (700, 1100)):  # blobs: long runs, large differences of both signs
        rows, columns = np.mgrid[:height, :width]
        for _ in range(5):
            y, x, r = random.uniform(0, height), random.uniform(0, width), random.uniform(3, height)
            yield ((rows - y) ** 2 + (columns - x) ** 2 < r**2).astype(np.uint8)


def test_encoding_and_decoding_equal_pycocotools():
    for mask in masks():
        theirs = coco.encode(np.asfortranarray(mask))
        ours = encode_rle(mask)
        assert ours == {"size": theirs["size"], "counts": theirs["counts"].decode()}
        assert (decode_rle(ours) == mask).all() and decode_rle(ours).dtype == np.uint8
        assert (decode_rle(theirs) == mask).all()  # bytes


def test_a_cut_out_encodes_as_the_whole_image_with_nothing_around_it():
    random = np.random.default_rng(1)
    for _ in range(50):
        height, width = random.integers(1, 30, 2)
        top, left = random.integers(0, height), random.integers(0, width)
        high, wide = random.integers(0, height - top + 1), random.integers(0, width - left + 1)
        whole = np.zeros((height, width), bool)
        whole[top : top + high, left : left + wide] = random.random((high, wide)) < 0.8
        part = whole[top : top + high, left : left + wide]
        assert encode_rle(part, (top, left), (height, width)) == encode_rle(whole)


def test_uncompressed_counts_are_read():
    assert decode_rle({"size": [2, 3], "counts": [1, 2, 3]}).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [2, 3], "counts": [1, 2]},
        {"size": [2, 3], "counts": [1, -2, 7]},
        {"size": [2, 3], "counts": []},
        {"size": [2, 3], "counts": "1"},
        {"size": [2, 3], "counts": "P"},  # says that more follows
        {"size": [2, 3], "counts": ""},
        {"size": [2, 3], "counts": "\u00e9"},
        {"size": [2, 3], "counts": "o" * 40 + "0"},  # more bits than any count has
    ],
)
def test_damaged_run_lengths_are_refused(rle):
    with pytest.raises(UserError, match="run lengths"):
        run_lengths(rle)


def test_a_cut_out_outside_of_its_image_is_refused():
    with pytest.raises(UserError, match="does not lie in 4x4"):
        encode_rle(np.ones((2, 2)), (3, 0), (4, 4))
