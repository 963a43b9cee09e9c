"""Token labelling and MixToken (Jiang et al., All Tokens Matter, arXiv 2104.10858), as RMT is trained with them.

B batch, K classes, k scores in a cell of a label file, h w tokens of the last stage, N = h * w
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from muntin.data.token_labels import TokenTarget
from muntin.tasks.settings import Settings

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Box = tuple[int, int, int, int]  # top, left, bottom, right, in tokens of the last stage


class TokenLabelling:
    """Loss of a batch: cross-entropy of the class logits + token_weight * mean cross-entropy of the tokens' logits.

    Targets are those of `token_targets`, of an image's tokens and of the image as one token: as in the released
    training of RMT, the class head learns from the same dense scores and the image's own class is not used. Both are
    smoothed, (1 - s) p + s / K. Mixed, the image's target is lambda t + (1 - lambda) t', t' of the reversed batch and
    1 - lambda the share of tokens inside the box; the tokens' targets stay with their image.

    forward: images and the mask of a box -> class logits and tokens' logits (`muntin.models.rmt.forward_mixed`);
    stride: pixels to a token of the last stage, along each axis. Of the settings: token_weight, label_smoothing (s) and
    mix_token, without which there is no box.
    """

    def __init__(self, forward: Forward, stride: int, num_classes: int, settings: Settings) -> None:
        self.forward = forward
        self.stride = stride
        self.num_classes = num_classes
        self.settings = settings

    def __call__(self, images: Tensor, target: TokenTarget) -> Tensor:
        height, width = images.shape[2] // self.stride, images.shape[3] // self.stride
        top, left, bottom, right = draw_box(height, width) if self.settings.mix_token else (0, 0, 0, 0)
        mask = torch.zeros(height, width, dtype=torch.bool, device=images.device)
        mask[top:bottom, left:right] = True
        logits, tokens = self.forward(images, mask)
        whole = token_targets(target, (1, 1), self.num_classes)[:, 0]  # B K
        pasted = (bottom - top) * (right - left) / (height * width)
        whole = (1 - pasted) * whole + pasted * whole.flip(0)
        wanted = token_targets(target, (height, width), self.num_classes).flatten(0, 1)  # B*N K
        smoothing = self.settings.label_smoothing
        image_loss = F.cross_entropy(logits.float(), whole, label_smoothing=smoothing)
        token_loss = F.cross_entropy(tokens.flatten(0, 1).float(), wanted, label_smoothing=smoothing)
        return image_loss + self.settings.token_weight * token_loss


def token_targets(target: TokenTarget, cells: tuple[int, int], num_classes: int) -> Tensor:
    """Class probabilities (B, N, K) in a grid of `cells` over what the augmented images show.

    The map of scores, 0 for the classes that a cell does not name, covers the image; it is sampled inside the crop by
    RoIAlign, flipped with the image, and goes through a softmax over the classes.
    """
    scores, classes, box, flipped = target
    batch, _, height, width = scores.shape
    dense = scores.new_zeros(batch, num_classes, height, width).scatter_(1, classes.long(), scores)
    left, top, right, bottom = box.unbind(1)
    number = torch.arange(batch, device=box.device, dtype=box.dtype)
    numbered = torch.stack([number, left * width, top * height, right * width, bottom * height], 1)
    shown = roi_align(dense, numbered, cells, aligned=True)  # B K h w
    shown = torch.where(flipped[:, None, None, None], shown.flip(3), shown)
    return shown.flatten(2).transpose(1, 2).softmax(2)


def draw_box(height: int, width: int) -> Box:
    """CutMix's box in whole tokens of the last stage, its share of the map before clipping drawn from Beta(1, 1)."""
    share, down, across = torch.rand(3, dtype=torch.double).tolist()
    top, bottom = _span(height, share, down)
    left, right = _span(width, share, across)
    return top, left, bottom, right


def _span(side: int, share: float, at: float) -> tuple[int, int]:
    half = int(side * math.sqrt(share)) // 2
    centre = int(side * at)
    return max(centre - half, 0), min(centre + half, side)
