"""Intersections over unions and accuracies of label maps, against sums written out by hand."""

import pytest
import torch

from muntin.errors import UserError
from muntin.measure.pixels import PixelCounts

TRUE = torch.tensor([[0, 0, 0, 255], [1, 1, 2, 2]], dtype=torch.uint8)
PREDICTED = torch.tensor([[0, 0, 1, 1], [1, 4, 2, 0]])


def test_sums_written_out():
    counts = PixelCounts(6)
    counts.add(PREDICTED, TRUE)
    found = counts.results()
    # class: right / (true + predicted - right); the ignored pixel counts nowhere, class 4 is predicted alone
    assert [row["iou"] for row in found["per_class"]] == [2 / 4, 1 / 3, 1 / 2, None, 0.0, None]
    assert [row["acc"] for row in found["per_class"]] == [2 / 3, 1 / 2, 1 / 2, None, None, None]
    assert [row["pixels"] for row in found["per_class"]] == [3, 2, 2, 0, 0, 0]
    assert found["miou"] == pytest.approx((2 / 4 + 1 / 3 + 1 / 2 + 0) / 4)
    assert found["macc"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert found["aacc"] == pytest.approx(4 / 7)
    assert found["pixels"] == 7


def test_parts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 5, (4, 9, 7), generator=generator)
    predicted = torch.randint(0, 5, (4, 9, 7), generator=generator)
    whole, first, second = PixelCounts(5), PixelCounts(5), PixelCounts(5)
    whole.add(predicted, true)
    for i in range(4):
        (first if i < 1 else second).add(predicted[i], true[i])
    first.tensor += second.tensor  # as all_reduce does
    assert first.results() == whole.results()
    for row in range(5):
        for column in range(5):
            assert whole.tensor[row, column] == ((true == row) & (predicted == column)).sum()


def test_another_label_to_ignore():
    counts = PixelCounts(2, ignore=0)
    counts.add(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]))
    assert counts.results()["aacc"] == 1 and counts.results()["pixels"] == 1


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([0, 3], [0, 1], "a prediction has the label 3; valid are 0 to 2"),
        ([0, -1], [0, 1], "a prediction has the label -1"),
        ([0, 1], [0, 7], "an annotation has the label 7; valid are 0 to 2, and 255 for pixels"),
        ([0, 1, 2], [0, 1], "cannot be compared"),
    ],
)
def test_labels_that_are_no_class_are_refused(predicted, true, message):
    with pytest.raises(UserError, match=message):
        PixelCounts(3).add(torch.tensor(predicted), torch.tensor(true))


def test_nothing_counted_is_refused():
    counts = PixelCounts(3)
    counts.add(torch.tensor([0, 1]), torch.tensor([255, 255]))
    with pytest.raises(UserError, match="no pixel is annotated"):
        counts.results()
