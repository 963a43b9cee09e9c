"""Entry points for torch.hub: `torch.hub.load("OWNER/muntin", "swin_t")`, one for each listed model, and `model`."""

dependencies = ["torch", "safetensors"]

import sys as _sys  # noqa: E402 - torch.hub checks the dependencies above; every public callable is an entry point
from pathlib import Path as _Path  # noqa: E402

_sys.path.insert(0, str(_Path(__file__).parent / "src"))  # torch.hub installs nothing
try:
    import muntin as _muntin
finally:
    _sys.path.pop(0)


def model(name, num_classes=1000, pretrained=False, drop_path=0.0, **config):
    """A classifier by name, with any field of its configuration, as `muntin.create_model`."""
    return _muntin.create_model(name, num_classes, pretrained, drop_path, **config)


def backbone(name, out_indices=None, out_norm=False, drop_path=0.0, pretrained=False, **config):
    """A backbone by name, image -> list of maps, as `muntin.create_backbone`."""
    return _muntin.create_backbone(name, out_indices, out_norm, drop_path, pretrained, **config)


def _entry(name):
    def entry(num_classes=1000, pretrained=False, drop_path=0.0, **config):
        return model(name, num_classes, pretrained, drop_path, **config)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{name}: image (B, 3, H, W) -> logits (B, num_classes).

    pretrained: True, a tag or a checkpoint's path; the rest as in `muntin.create_model`.
    """
    return entry


globals().update({_name: _entry(_name) for _name in _muntin.list_models()})
