"""Weights under which a missing or transposed part shows."""

import torch
from torch import nn

SIZE = 224


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, norms and bias tables among them; running statistics near those of an image, since with random
    ones a deep model amplifies rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif "table" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.9
        if norms:
            model.train()(torch.randn(4, 3, SIZE, SIZE, generator=generator))
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    return model.eval()
