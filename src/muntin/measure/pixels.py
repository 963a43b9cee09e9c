"""How well label maps agree: intersection over union of each class, and accuracies, from one table of counts."""

from typing import Any

import torch
from torch import Tensor

from muntin.errors import UserError


class PixelCounts:
    """Pixels by true class (rows) and predicted class (columns), summed over images.

    `tensor` is (K, K) int64: several processes add theirs up by `torch.distributed.all_reduce(counts.tensor)`.
    """

    def __init__(self, num_classes: int, ignore: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore = ignore
        self.tensor = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, true: Tensor) -> None:
        """Count the pixels of label maps of one shape and any integer type; where `true` is `ignore` none counts.

        Raises `UserError` for shapes that differ, and labels that are no class.
        """
        if predicted.shape != true.shape:
            raise UserError(
                f"label maps of {tuple(predicted.shape)} and {tuple(true.shape)} cannot be compared; resize the "
                "prediction to the size of its annotation"
            )
        counted = true != self.ignore
        rows, columns = true[counted].long(), predicted[counted].long()
        for labels, what in ((rows, "an annotation"), (columns, "a prediction")):
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                wrong = int(labels.max()) if int(labels.max()) >= self.num_classes else int(labels.min())
                raise UserError(
                    f"{what} has the label {wrong}; valid are 0 to {self.num_classes - 1}"
                    + (f", and {self.ignore} for pixels that do not count" if labels is rows else "")
                )
        size = self.num_classes
        pairs = torch.bincount(rows * size + columns, minlength=size * size)
        self.tensor += pairs.view(size, size).to(self.tensor.device)

    def results(self) -> dict[str, Any]:
        """`miou`, `macc` (mean recall of the classes), `aacc` (share of all pixels that is right), 0..1, `pixels`,
        and `per_class`: `iou`, `acc` and `pixels` of each.

        A class that neither annotation nor prediction has anywhere has an IoU of None, one that no annotation has an
        accuracy of None; the means are over the others. Raises `UserError` where no pixel was counted.
        """
        counts = self.tensor.double().cpu()
        pixels, taken, right = counts.sum(1), counts.sum(0), counts.diagonal()
        total = float(pixels.sum())
        if not total:
            raise UserError("no pixel is annotated with a class, so nothing can be measured; give annotated images")
        union = pixels + taken - right
        iou, accuracy = right / union, right / pixels  # 0 / 0 is NaN: no such pixel
        rows = [
            {
                "iou": float(iou[k]) if union[k] else None,
                "acc": float(accuracy[k]) if pixels[k] else None,
                "pixels": int(pixels[k]),
            }
            for k in range(self.num_classes)
        ]
        return {
            "miou": float(iou[union > 0].mean()),
            "macc": float(accuracy[pixels > 0].mean()),
            "aacc": float(right.sum()) / total,
            "pixels": int(total),
            "per_class": rows,
        }
