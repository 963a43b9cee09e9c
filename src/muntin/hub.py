"""Models as folders that others can open: on a disk, or as repositories of the Hugging Face hub.

```
model.safetensors  the weights; their metadata alone rebuilds the model, as in a run's folder
config.json        the same for timm: after import muntin.timm, timm.create_model("local-dir:FOLDER") or "hf-hub:ID"
README.md          the model card: size and cost, classes, licence, what was measured, how to load it
```
Such a folder is a run to every command: `muntin predict FOLDER photos`.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import muntin
from muntin.errors import UserError
from muntin.measure.cost import cost
from muntin.models import published
from muntin.run import PREPROCESSING, Run, atomic_write, save_model, write_json

FILES = ("model.safetensors", "config.json", "README.md")
_METRICS = {
    "test_accuracy": "accuracy on the test split",
    "val_accuracy": "accuracy on the validation split",
    "test_map": "mean average precision on the test split",
    "val_map": "mean average precision on the validation split",
    "data": "data",
    "epochs": "epochs",
    "seed": "seed",
    "latency_ms": "latency of one image, ms",
}


def save_pretrained(
    model: nn.Module | Run,
    folder: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a classifier, or a run with its classes, preprocessing and metrics, as a folder. Returns the folder.

    classes: names in the order of the logits, numbers by default.
    preprocessing: `size` (H, W), `resize`, `mean`, `std`, `interpolation`, `channels` as in `muntin.run.Run`; by
        default the papers': shorter side to size / 0.875, centre crop, ImageNet's mean and standard deviation.
    license: SPDX name of the weights' licence, for the card; none is claimed unless given.
    repo_id: ORG/NAME on the hub, for the card's examples.

    Raises UserError for a model that Muntin cannot rebuild by its name, and a folder that cannot be written.
    """
    metrics: Mapping[str, Any] = {}
    multi_label = False
    if isinstance(model, Run):
        run, model = model, model.model()
        multi_label = run.multi_label
        classes, preprocessing, metrics = classes or run.classes, preprocessing or run.preprocessing, run.metrics
    twin = _twin(model)
    names = [str(i) for i in range(twin.num_classes)] if classes is None else list(classes)
    if len(names) != twin.num_classes:
        raise UserError(f"{len(names)} names of classes for a model of {twin.num_classes}: give one for each")
    steps = dict(_papers(twin.name) if preprocessing is None else preprocessing)
    if sorted(steps) != sorted(PREPROCESSING):
        raise UserError(f"preprocessing has {', '.join(sorted(steps))}: give {', '.join(PREPROCESSING)}")
    folder = Path(folder)
    save_model(folder / "model.safetensors", model, classes=names, preprocessing=steps, multi_label=multi_label)
    write_json(folder / "config.json", _config(twin, names, steps, license))
    atomic_write(folder / "README.md", _card(twin, names, steps, license, repo_id, metrics).encode())
    return folder


def fetch(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> Run:
    """A folder, or a repository of the hub once it is downloaded, with its classes and `transform()`.

    Raises UserError where neither is there; without a network a repository that was fetched before still opens.
    """
    path = Path(folder_or_repo)
    name = os.fspath(folder_or_repo)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Run.open(path)
    hub = _hub()
    try:
        found = hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"cannot fetch {name} from the hub ({str(error).strip().splitlines()[0]}); check the name and the network,"
            f" or fetch {', '.join(FILES[:2])} elsewhere and give their folder"
        ) from error
    return Run.open(found)


def from_pretrained(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    """The classifier of a folder or of a repository of the hub (ORG/NAME), in evaluation mode, on the CPU.

    Raises UserError where there is none, or where it is not one of Muntin's.
    """
    return fetch(folder_or_repo, revision).model()


def push_to_hub(model: nn.Module | Run, repo_id: str, *, private: bool | None = None, **saved: Any) -> str:
    """Write a model as `save_pretrained` does and upload it to ORG/NAME. Returns the commit's address.

    saved: `classes`, `preprocessing` and `license` of `save_pretrained`. Log in with `hf auth login` first.
    """
    api = _hub().HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, repo_id=repo_id, **saved)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Model saved by Muntin")
    return str(commit)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError('the hub needs huggingface_hub: pip install "muntin[hub]"') from error
    return huggingface_hub


def _twin(model: Any) -> Any:
    """The model as it will be rebuilt, without memory. UserError where that is another one."""
    name, classes = getattr(model, "name", None), getattr(model, "num_classes", 0)
    if not isinstance(model, nn.Module) or not isinstance(name, str) or not classes or not hasattr(model, "config"):
        raise UserError(
            f"a {type(model).__name__} without a name or classes cannot be rebuilt: give what muntin.create_model made"
        )
    with torch.device("meta"):
        twin = muntin.create_model(name, classes, **_fields(model))
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (twin, model)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the weights are not those of {name}: give the model itself, not an optimised, pruned or wrapped copy"
        )
    return twin


def _fields(model: Any) -> dict[str, Any]:
    return asdict(model.config)


def _papers(name: str) -> dict[str, Any]:
    size = published(name).get("size", 224)
    return {
        "size": [size, size],
        "resize": round(size / 0.875),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "channels": "RGB",
    }


def _config(model: Any, classes: list[str], steps: Mapping[str, Any], license: str | None) -> dict[str, Any]:
    """What timm reads: the function to call, its arguments, and the preprocessing."""
    height, width = steps["size"]
    return {
        "architecture": f"muntin_{model.name}",
        "num_classes": model.num_classes,
        "label_names": classes,
        "model_args": _fields(model),
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "crop_pct": min(height, width) / steps["resize"] if steps["resize"] else 1.0,
            "crop_mode": "center" if steps["resize"] else "squash",
            "mean": steps["mean"],
            "std": steps["std"],
            "interpolation": steps["interpolation"],
            "classifier": "head.fc",
            "license": license,
        },
    }


def _card(
    model: Any,
    classes: list[str],
    steps: Mapping[str, Any],
    license: str | None,
    repo_id: str | None,
    metrics: Mapping[str, Any],
) -> str:
    height, width = steps["size"]
    found = cost(model, (height, width))
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    fields = {
        **({"license": license} if license else {}),
        "library_name": "muntin",
        "pipeline_tag": "image-classification",
        "tags": ["muntin", "image-classification", "vision-transformer", model.name],
    }
    shown = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
    rows = {
        "model": f"`{model.name}`",
        "parameters": f"{found.parameters:,}",
        "GMACs": f"{found.gmacs:.3f} at {height}x{width}",
        "weights": f"{size / 1e6:.1f} MB",
        "input": f"{height}x{width} pixels; any other height and width works",
        "classes": f"{len(classes)}: {shown}",
        "licence of the weights": license or "not stated",
    } | {label: _plain(metrics[key]) for key, label in _METRICS.items() if metrics.get(key) is not None}
    source = repo_id or "path/to/this/folder"
    timm_source = f"hf-hub:{repo_id}" if repo_id else "local-dir:path/to/this/folder"
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())  # JSON is YAML
    table = "\n".join(f"| {label} | {_cell(value)} |" for label, value in rows.items())
    return f"""---
{front}
---
# {(repo_id or model.name).rpartition("/")[2]}

An image classifier made with Muntin, efficient hierarchical vision transformers.

| | |
| --- | --- |
{table}

```python
import muntin.hub

run = muntin.hub.fetch("{source}")
model, transform = run.model(), run.transform()
logits = model(transform(image)[None])
```

With timm:

```python
import timm
import muntin.timm

model = timm.create_model("{timm_source}", pretrained=True)
```

Or on the command line: `muntin predict FOLDER photos`, `muntin export FOLDER`, `muntin bench FOLDER`.
"""


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
