"""What an exported detector finds against what PyTorch's finds, although equals may be ranked differently.

Two boxes with scores that differ in the last bit are ranked by chance, and suppression keeps the first. So results are
not compared one by one with PyTorch's alone. Each stage is held to what PyTorch gives it to choose from: proposals to
all anchors, boxes to all classes of all proposals of the file, masks to PyTorch's masks of the file's boxes. What a
stage keeps has to be among its candidates, with their box and score; no two of a group may overlap by more than the
limit; and no candidate may be missing that neither a better one of its group covers nor the limit of their number
leaves out. A wrong box, a missing one and one too many each fail. What PyTorch finds itself is held to the same.

n candidates, m kept
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from muntin.heads.graph import NOTHING, proposal_candidates, retina_candidates, within
from muntin.runtime.targets import ExportError

BOUND = 1e-4
"""Largest error: of scores and of probabilities in masks, and of boxes as a share of their longer side."""
OVERLAP = 1e-3
"""By how much an IoU may miss the limit: boxes that are off by BOUND have IoUs that are off by about four times it."""


@dataclass(frozen=True)
class Candidates:
    """What suppression chooses from: boxes (n, 4), scores (n,), groups (n,), each suppressed for itself.

    least: score from which on a box counts; n, (n,) where groups have their own. iou: the most overlap within a group.
    most: how many are kept.
    """

    boxes: Tensor
    scores: Tensor
    groups: Tensor
    least: Tensor
    iou: float
    most: int

    def near(self, bound: float) -> "Candidates":
        """Those that count, or would with a score that is better by `bound`."""
        return self.only(torch.where(self.scores > self.least - bound)[0])

    def only(self, places: Tensor) -> "Candidates":
        """Those at these places (k,)."""
        least = self.least.expand_as(self.scores)[places]
        return Candidates(self.boxes[places], self.scores[places], self.groups[places], least, self.iou, self.most)


def hold(found: Mapping[str, Tensor], candidates: Candidates, what: str, bound: float = BOUND) -> float:
    """The largest error of what was kept, once it is a choice that suppression may make of the candidates.

    found: boxes (m, 4), scores (m,) and labels (m,), of proposals their levels. what: "its proposals", for messages.
    Raises ExportError saying which box is wrong, missing or one too many.
    """
    choice = candidates.near(bound)
    boxes = found["boxes"]
    if len(boxes) > choice.most:
        raise ExportError(f"{what} are {len(boxes)}; {choice.most} is the most")
    if not boxes.isfinite().all():
        raise ExportError(f"{what} are not all numbers")
    places, errors = _places(found, choice)
    if len(boxes) and errors.max() > bound:
        raise ExportError(f"of {what} {_told(found, int(errors.argmax()))} is none that PyTorch has")
    kept = choice.only(places)
    if (kept.scores.diff() > 2 * bound).any():
        raise ExportError(f"{what} are not in falling order of their scores")
    overlap = box_iou(kept.boxes, kept.boxes) * (kept.groups[:, None] == kept.groups).to(boxes.dtype)
    overlap.fill_diagonal_(0)
    if len(boxes) and overlap.max() > choice.iou + OVERLAP:
        number = int(overlap.max(1).values.argmax())
        raise ExportError(f"of {what} {_told(found, number)} overlaps another by {float(overlap.max()):.3f}")
    _check_missing(places, kept, choice, what, bound)
    return float(errors.max()) if len(boxes) else 0.0


def _told(found: Mapping[str, Tensor], number: int) -> str:
    box = ", ".join(f"{side:.2f}" for side in found["boxes"][number].tolist())
    return f"({box}) of {int(found['labels'][number])} with score {float(found['scores'][number]):.4f}"


def _places(found: Mapping[str, Tensor], choice: Candidates) -> tuple[Tensor, Tensor]:
    """The candidate that each box is (m,), and by how much it is not (m,)."""
    boxes = found["boxes"]
    if not len(boxes) or not len(choice.boxes):
        return boxes.new_zeros(0, dtype=torch.long), torch.full((len(boxes),), torch.inf)
    places, errors = [], []
    sides = (choice.boxes[:, 2:] - choice.boxes[:, :2]).amax(1).clamp(min=1)
    for i, box in enumerate(boxes):
        error = (choice.boxes - box).abs().amax(1) / sides
        error = error.maximum((choice.scores - found["scores"][i]).abs())
        error = error.masked_fill(choice.groups != found["labels"][i], torch.inf)
        places.append(error.argmin())
        errors.append(error.min())
    return torch.stack(places), torch.stack(errors)


def _check_missing(places: Tensor, kept: Candidates, choice: Candidates, what: str, bound: float) -> None:
    """ExportError where a candidate was left out without a reason."""
    wanted = choice.scores > choice.least + bound
    if len(places) == choice.most:
        wanted &= choice.scores > kept.scores.min() + bound
    wanted[places] = False
    left = choice.only(torch.where(wanted)[0])
    better = torch.logical_and(
        left.groups[:, None] == kept.groups, kept.scores >= left.scores[:, None] - bound
    )  # left, kept
    covered = torch.logical_and(better, box_iou(left.boxes, kept.boxes) > choice.iou - OVERLAP).any(1)
    if not covered.all():
        lost = left.only(torch.where(~covered)[0][:1])
        told = _told({"boxes": lost.boxes, "labels": lost.groups, "scores": lost.scores}, 0)
        raise ExportError(f"{what} lack {told}")


def compare(model: Any, found: Mapping[str, Tensor], image: Tensor, bound: float = BOUND) -> float:
    """The largest error of what an exported detector found on an image (1, 3, H, W).

    found: boxes (m, 4), scores (m,), labels (m,), masks (m, M, M) and proposals (p, 6), as the file returns them.
    Raises ExportError where it is no result that the model could have.
    """
    size = (image.shape[2], image.shape[3])
    levels = model.neck(model.backbone(image), size)
    own = model.find(levels, image, [size])[0]
    errors = []
    if hasattr(model, "rpn"):
        boxes, scores, numbers = found["proposals"].split((4, 1, 1), 1)
        proposals = {"boxes": boxes, "scores": scores[:, 0], "labels": numbers[:, 0].long()}
        errors.append(hold(proposals, _of_proposals(model.rpn, levels, size), "its proposals", bound))
        candidates = _of_regions(model, levels, boxes, size)
        own_proposals = model.rpn(ImageList(image, [size]), dict(enumerate(levels)))[0][0]
        own_candidates = _of_regions(model, levels, own_proposals, size)
    else:
        candidates = own_candidates = _of_anchors(model, levels, size)
    errors.append(hold(found, candidates, "its boxes", bound))
    hold(own, own_candidates, "PyTorch's own boxes", bound)
    if model.task == "instance":
        wanted = model.roi.masks(levels, [found["boxes"]], found["labels"])
        if wanted.shape != found["masks"].shape:
            raise ExportError(f"its masks are {tuple(found['masks'].shape)}, PyTorch's {tuple(wanted.shape)}")
        errors.append(float((wanted - found["masks"]).abs().max()) if wanted.numel() else 0.0)
    return max(errors)


def _of_proposals(rpn: Any, levels: list[Tensor], size: tuple[int, int]) -> Candidates:
    """Each level's best count, and as many behind them that might."""
    most = rpn.pre_nms_top_n()
    boxes, scores = proposal_candidates(rpn, levels, size, 2 * most)
    groups = torch.cat([torch.full_like(each, i, dtype=torch.long) for i, each in enumerate(scores)])
    least = torch.cat([_cut(each, most, NOTHING / 2) for each in scores])
    return Candidates(torch.cat(boxes), torch.cat(scores), groups, least, rpn.nms_thresh, rpn.post_nms_top_n())


def _cut(scores: Tensor, most: int, least: float) -> Tensor:
    """For each of a level's scores (n,), which fall, the one that its best `most` are above or at, if above `least`."""
    last = float(scores[most]) if len(scores) > most else least
    return torch.full_like(scores, max(last, least))


def _of_regions(model: Any, levels: list[Tensor], proposals: Tensor, size: tuple[int, int]) -> Candidates:
    """All classes of all proposals (p, 4)."""
    boxes, scores = model.roi.scored(levels, [proposals], [size])
    boxes, scores = within(boxes.transpose(0, 1), scores.t(), size)
    groups = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    every = boxes.expand(len(scores), -1, -1).flatten(0, 1)
    config = model.head_config
    least = scores.new_tensor(config.score_threshold)
    return Candidates(every, scores.flatten(), groups.flatten(), least, config.nms, config.detections)


def _of_anchors(model: Any, levels: list[Tensor], size: tuple[int, int]) -> Candidates:
    """Each level's likeliest pairs of anchor and class, and as many behind them that might be."""
    config = model.head_config
    found = retina_candidates(model, levels, 2 * config.candidates)
    least = torch.cat([_cut(scores, config.candidates, config.score_threshold) for _, scores, _ in found])
    boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
    boxes, scores = within(boxes, scores, size)
    return Candidates(boxes, scores, labels, least, config.nms, config.detections)
