"""AdamW as the recipes have it: which parameters decay and how fast each layer learns, the schedule, clipping."""

import math
import re

from torch import Tensor, nn

from muntin.models.backbone import NO_DECAY
from muntin.tasks.settings import Settings

FLOOR = 0.01  # the last learning rate over the peak, where the settings name none
DROP = 0.1  # of the rate at each of `drops`
_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)\.)?")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: not for one-dimensional parameters, nor for tables of position biases and the
    network that makes SwinV2's.
    """
    return parameter.ndim > 1 and not name.endswith(NO_DECAY)


def layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by name: 0 the stem, 1 the first block and so on, the last the head.

    What stands before the blocks of a stage (merging, subsampling) is of the stage's first block.
    """
    names = [name for name, _ in model.named_parameters()]
    depths: dict[int, int] = {}
    for name in names:
        if (found := _BLOCK.search(name)) and found[2]:
            stage = int(found[1])
            depths[stage] = max(depths.get(stage, 0), int(found[2]) + 1)
    total = sum(depths.values())

    def layer(name: str) -> int:
        found = _BLOCK.search(name)
        if found is None:
            return 0 if ".stem." in f".{name}" else total + 1
        before = sum(depth for stage, depth in depths.items() if stage < int(found[1]))
        return before + 1 + int(found[2] or 0)

    return {name: layer(name) for name in names}


def groups(model: nn.Module, settings: Settings) -> list[dict[str, object]]:
    """Parameters that are trained, by weight decay and, with `layer_decay`, by layer: each group has its `lr_scale`,
    layer_decay ** (layers above), and the `names` of its parameters.
    """
    places = layers(model)
    top = max(places.values())
    found: dict[tuple[float, float], dict[str, list[object]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = settings.weight_decay if decays(name, parameter) else 0.0
        scale = settings.layer_decay ** (top - places[name])
        group = found.setdefault((scale, decay), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    peak = settings.peak()
    return [
        group | {"weight_decay": decay, "lr": peak * scale, "lr_scale": scale}
        for (scale, decay), group in sorted(found.items(), key=lambda item: (-item[0][0], -item[0][1]))
    ]


def rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """The learning rate at a step over its peak: linear warm-up, then a cosine down to the floor, steps, or a power.

    The warm-up starts from `warmup_lr` at step 0 and reaches the peak at its end; without one it starts from a step's
    worth. It takes half of the training at most. After it "steps" multiplies by a tenth at the end of each epoch of
    `drops`; "poly" by (1 - step / all steps)^power from the first step on, as mmcv does.
    """
    peak = settings.peak()
    total = settings.steps or settings.epochs * steps_per_epoch
    warmup = min(settings.warmup_steps or settings.warmup * steps_per_epoch, total / 2)
    left = 1.0
    if settings.schedule == "poly":
        floor = min((settings.floor_lr or 0.0) / peak, 1.0)
        left = floor + (1 - floor) * (1 - min(step / total, 1.0)) ** settings.power
    if step < warmup:
        if settings.warmup_lr is None:
            return left * (step + 1) / (warmup + 1)
        start = settings.warmup_lr / peak
        return left * (start + (1 - start) * step / warmup)
    if settings.schedule == "steps":
        return DROP ** sum(step >= drop * steps_per_epoch for drop in settings.drops)
    if settings.schedule == "poly":
        return left
    floor = FLOOR if settings.floor_lr is None else min(settings.floor_lr / peak, 1.0)
    done = (step - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def clip_gradients(model: nn.Module, settings: Settings) -> Tensor:
    """Clip in place as the settings say; the norm of all gradients before, a scalar that may be not finite."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if hasattr(norm, "full_tensor"):  # gradients are shared out over processes
        norm = norm.full_tensor()
    if settings.clip:
        nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm, foreach=True)
    if settings.agc:
        from timm.utils.agc import adaptive_clip_grad

        last = {parameter for layer in classifiers(model) for parameter in layer.parameters()}
        adaptive_clip_grad([p for p in parameters if p not in last], settings.agc)
    return norm


def classifiers(model: nn.Module) -> list[nn.Linear]:
    """The last linear layers, one for each kind of logits, which adaptive clipping leaves alone (Brock et al., 2021):
    those that stand in the head itself, not in its norm or projection.
    """
    head = getattr(model, "head", None)
    if head is None:
        return []
    return [layer for layer in (head, *head.children()) if isinstance(layer, nn.Linear)]
