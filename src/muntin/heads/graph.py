"""Detectors as graphs: what `find` does for one image, by operations that trace for every height and width.

Branches, loops over classes and shapes that hang on Python numbers are replaced: the best of a level by a TopK of as
many as there are, suppression by one operator, and what is left out by a score below every threshold.
H W image, n objects, K classes
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.heads.boxes import clipped
from muntin.heads.suppression import suppress

NOTHING = -1.0
"""The score of boxes that are none: below every threshold."""
TINY_SIDE = 1e-3
"""Proposals have sides of this at least, in pixels, as torchvision's."""


class DetectorGraph(nn.Module):
    """A detector for one image: (1, 3, H, W) -> boxes (n, 4), scores (n,), labels (n,) and what its task adds.

    Last come the proposals (p, 6) of a detector that has any, x1 y1 x2 y2, score and level: nothing that a user needs,
    but what makes the rest comparable, as a graph and PyTorch may rank equal proposals differently.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        model, size = self.model, (image.shape[2], image.shape[3])
        levels = model.neck(model.backbone(image), size)
        if not hasattr(model, "rpn"):
            return best(*self._single_stage(levels), size, model.head_config)
        proposals = best_proposals(model.rpn, levels, size)
        boxes, scores = model.roi.scored(levels, [proposals[:, :4]], [size])
        found = best(boxes.transpose(0, 1), scores.t(), size, model.head_config)
        masks = [model.roi.masks(levels, found[:1], found[2])] if model.head_config.masks else []
        return [*found, *masks, proposals]

    def _single_stage(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (1, n, 4) and scores (K, n), of each box NOTHING for all classes but one."""
        model = self.model
        found = retina_candidates(model, levels, model.head_config.candidates)
        boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return boxes[None], torch.where(labels == torch.arange(model.num_classes)[:, None], scores, NOTHING)


def level_anchors(anchors: Any, levels: Sequence[Tensor]) -> list[Tensor]:
    """Of each level (B, C, h, w): (h * w * A, 4)."""
    anchors.set_cell_anchors(torch.float32, levels[0].device)
    steps = [[torch.tensor(stride)] * 2 for stride in anchors.strides]
    return anchors.grid_anchors([list(level.shape[-2:]) for level in levels], steps)


def best_proposals(rpn: Any, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """(p, 6), box, score and level, best first, as torchvision's RegionProposalNetwork has them."""
    boxes, scores = proposal_candidates(rpn, levels, size, rpn.pre_nms_top_n())
    numbers = torch.cat([torch.full_like(each, i) for i, each in enumerate(scores)])
    every, values = torch.cat(boxes), torch.cat(scores)
    groups = torch.where(numbers == torch.arange(len(levels))[:, None], values, NOTHING)
    kept = suppress(every[None], groups[None], rpn.nms_thresh, NOTHING / 2)[:, 2]
    kept = kept[_first(values[kept], rpn.post_nms_top_n())]
    return torch.cat((every, values[:, None], numbers[:, None]), 1)[kept]


def proposal_candidates(
    rpn: Any, levels: list[Tensor], size: tuple[int, int], most: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each level at most this many, best first: boxes (k, 4) within the image and scores (k,)."""
    logits, deltas = rpn.head(levels)
    boxes, scores = [], []
    for row, delta, anchors in zip(logits, deltas, level_anchors(rpn.anchor_generator, levels), strict=True):
        flat = row[0].permute(1, 2, 0).flatten()
        order = _first(flat, most)
        moved = delta[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)[order]
        decoded = rpn.box_coder.decode_single(moved, anchors[order])
        found, values = within(decoded, flat[order].sigmoid(), size, TINY_SIDE)
        boxes.append(found)
        scores.append(values)
    return boxes, scores


def retina_candidates(model: Any, levels: list[Tensor], most: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each level the likeliest pairs of anchor and class, best first: boxes (n, 4), scores (n,) and labels (n,)."""
    found = []
    coder = model.head.regression_head.box_coder
    for level, anchors in zip(levels, level_anchors(model.anchors, levels), strict=True):
        predicted = model.predict([level])
        flat = predicted["cls_logits"].flatten()
        order = _first(flat, most)
        places = order // model.num_classes
        boxes = coder.decode_single(predicted["bbox_regression"][0][places], anchors[places])
        found.append((boxes, flat[order].sigmoid(), order % model.num_classes))
    return found


def best(boxes: Tensor, scores: Tensor, size: tuple[int, int], config: Any) -> list[Tensor]:
    """What is reported, best first: boxes (m, 4) within the image, scores (m,) and labels (m,).

    boxes: (K, n, 4), or (1, n, 4) for all classes. scores: (K, n). config: a head's, which says what is reported.
    """
    boxes, scores = within(boxes, scores, size)
    shared = boxes.shape[0] == 1
    kept = suppress(boxes, scores[None] if shared else scores[:, None], config.nms, config.score_threshold)
    labels, places = kept[:, 1 if shared else 0], kept[:, 2]
    order = _first(scores[labels, places], config.detections)
    labels, places = labels[order], places[order]
    return [boxes[0][places] if shared else boxes[labels, places], scores[labels, places], labels]


def within(boxes: Tensor, scores: Tensor, size: tuple[int, int], least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Boxes (..., 4) clipped to the image, and their scores, NOTHING where no side is left or one below `least`."""
    boxes = clipped(boxes, size)
    sides = boxes[..., 2:] - boxes[..., :2]
    wide = torch.logical_and(sides > 0, sides >= least)
    return boxes, torch.where(torch.logical_and(wide[..., 0], wide[..., 1]), scores, NOTHING)


def _first(values: Tensor, most: int) -> Tensor:
    """Where the largest of them (n,) stand, in falling order."""
    return values.topk(torch.sym_min(values.shape[0], most))[1]
