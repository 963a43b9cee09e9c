"""Published ImageNet-1K accuracy of what is measured: of our models, and of other libraries' with the source.

A figure of which only part is known stays text: it is shown, but it is never completed, plotted or chosen by.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

MODELS_PEERS = resources.files("muntin") / "models" / "peers.toml"
COMPLETE = re.compile(r"\d+(\.\d+)?")
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers", "hf": "transformers"}


@dataclass(frozen=True)
class Published:
    """text: as it is published, "82.x" among them. top1: percent, None where the text is no complete figure."""

    text: str
    source: str

    @property
    def top1(self) -> float | None:
        return float(self.text) if COMPLETE.fullmatch(self.text) else None


@lru_cache
def _peers() -> dict[str, dict[str, str]]:
    return tomllib.loads(MODELS_PEERS.read_text(encoding="utf-8"))


def _of_ours(name: str) -> Published | None:
    """What models/published.toml states, or else what the model's default weights are published with."""
    from muntin.models import published
    from muntin.weights.download import published as checkpoints

    row: dict[str, Any] = published(name)
    if "top1" in row:
        return Published(row["top1"], row.get("source", ""))
    for checkpoint in checkpoints():
        if checkpoint.model == name and checkpoint.tag == "in1k" and checkpoint.top1 and not checkpoint.config:
            return Published(checkpoint.top1, f"published with the weights {checkpoint.tag}")
    return None


def accuracy(target: str) -> Published | None:
    """What is published of a target as `muntin bench` takes it: a listed model, or `timm:NAME` and the like.

    Another library's model without a figure of its own has that of our model of the same architecture. None where
    nothing is known, as of a run or a file.
    """
    from muntin.measure.peers import counterpart

    library, colon, name = target.partition(":")
    if library in ("muntin", "muntin+optimize"):
        return _of_ours(name)
    if not colon:
        return _of_ours(target)
    if target in _peers():
        return Published(_peers()[target]["top1"], _peers()[target]["source"])
    ours = counterpart(LIBRARIES[library], name) if library in LIBRARIES else None
    return None if ours is None else _of_ours(ours)
