"""Training settings: one flat set of plain values, for the command line, YAML files and config.yaml alike.

A field of the model's configuration is written `model.FIELD`, as in `--set model.window=[4,8,4,2]`.
"""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from muntin.errors import UserError, nearest

AUGMENTS = ("photographs", "distort", "none")
PRECISIONS = ("auto", "bf16", "32")
ON_BAD_IMAGE = ("error", "skip")
MODEL_PREFIX = "model."


@dataclass(frozen=True)
class Settings:
    """What a training run depends on. None means: decided from the data and the model, and then written down.

    data: "digits" or a folder of images; size: side of the model's square input, in pixels
    lr: AdamW's peak rate at this batch size, after `warmup` epochs, then a cosine down to a hundredth
    mixup, cutmix: their Beta parameter, 0 for none; where both are set, each takes half of the batches
    ema_decay: of the average of the weights per step, 0 for none; it is what is saved unless it is significantly worse
    augment: "photographs" (crop, flip, `randaugment`, `erasing`), "distort" (characters, by `distortion`) or "none"
    precision: "bf16", "32", or "auto": bf16 where the hardware multiplies it natively
    workers: processes that read and augment images; threads: of the CPU in the training step, all by default
    patience: stop after so many epochs without a better validation accuracy, 0 for never
    weights: what to start from: "" (random), "pretrained", a tag (muntin weights), a checkpoint's path or address
    save_minutes: how often to save within an epoch; the end of every epoch is saved anyway
    """

    data: str = "digits"
    model: str | None = None
    epochs: int = 100
    size: int | None = None
    seed: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 5.0
    clip: float = 5.0
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    ema_decay: float = 0.999
    augment: str = "photographs"
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    distortion: float = 1.0
    drop_path: float | None = None
    precision: str = "auto"
    workers: int | None = None
    threads: int | None = None
    patience: int = 0
    weights: str = ""
    on_bad_image: str = "error"
    save_minutes: float = 10.0
    model_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "size", "batch_size", "threads"):
            _require(self, name, lambda value: value >= 1, "give a whole number of at least 1")
        for name in ("seed", "workers", "patience"):
            _require(self, name, lambda value: value >= 0, "give a whole number of at least 0")
        for name in ("lr", "save_minutes"):
            _require(self, name, lambda value: value > 0, "give a positive number")
        for name in ("weight_decay", "warmup", "clip", "mixup", "cutmix", "distortion"):
            _require(self, name, lambda value: value >= 0, "give a number of at least 0")
        for name in ("label_smoothing", "ema_decay", "erasing", "drop_path"):
            _require(self, name, lambda value: 0 <= value < 1, "give a number from 0 up to, but not, 1")
        for name, valid in (("augment", AUGMENTS), ("precision", PRECISIONS), ("on_bad_image", ON_BAD_IMAGE)):
            value = getattr(self, name)
            if value not in valid:
                raise UserError(f"{name}={value!r} is unknown{nearest(value, valid)}; valid are {', '.join(valid)}")

    def flat(self) -> dict[str, Any]:
        """Plain values under the names that `--set` takes: what config.yaml holds."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model_config"}
        return values | {MODEL_PREFIX + name: _lists(value) for name, value in self.model_config.items()}


def _require(settings: Settings, name: str, valid: typing.Callable[[Any], bool], remedy: str) -> None:
    value = getattr(settings, name)
    if value is not None and not (math.isfinite(value) and valid(value)):
        raise UserError(f"{name}={value}: {remedy}")


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (tuple, list)) else value


TYPES = {name: hint for name, hint in typing.get_type_hints(Settings).items() if name != "model_config"}


def settings_from(*layers: Mapping[str, Any]) -> Settings:
    """Settings from flat mappings, later ones winning. Raises `UserError` naming an unknown or wrong entry."""
    values: dict[str, Any] = {}
    model_config: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name.startswith(MODEL_PREFIX):
                model_config[name.removeprefix(MODEL_PREFIX)] = _tuples(value)
            elif name in TYPES:
                values[name] = _convert(name, value)
            else:
                raise UserError(
                    f"there is no setting {name!r}{nearest(name, TYPES)}; valid are {', '.join(TYPES)}, and "
                    f"{MODEL_PREFIX}FIELD for a field of the model's configuration"
                )
    return Settings(**values, model_config=model_config)


def _convert(name: str, value: Any) -> Any:
    """The value as the setting's type: YAML reads 1e-3 as text, and 1 where 1.0 is meant."""
    hint = TYPES[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{name}={value!r}: give {_KINDS[kind]}")
    try:
        converted = kind(value)
        if kind is int and float(value) != converted:
            raise ValueError
    except ValueError as error:
        raise UserError(f"{name}={value!r}: give {_KINDS[kind]}") from error
    return converted


_KINDS = {int: "a whole number", float: "a number", str: "text"}


def parse_sets(pairs: typing.Iterable[str]) -> dict[str, Any]:
    """`key=value` pairs, values as YAML. Raises `UserError` naming a pair without `=`."""
    import yaml

    values = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise UserError(f"--set {pair}: give key=value, as in --set lr=1e-3")
        try:
            values[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {pair}: the value is not valid YAML; quote it or check its brackets") from error
    return values


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("muntin"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_config(given: str | Path) -> dict[str, Any]:
    """A YAML file of settings, or a recipe by its name. Raises `UserError` naming the file."""
    import yaml

    path = Path(given)
    if not path.exists():
        known = recipes()
        if str(given) not in known:
            raise UserError(
                f"there is no configuration file {given}{nearest(str(given), known)}; "
                f"give a YAML file or one of the recipes {', '.join(known)}"
            )
        path = known[str(given)]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; give a YAML file of settings") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} is not a YAML mapping; write one setting per line, as in lr: 0.001")
    return values


def write_config(settings: Settings) -> bytes:
    """config.yaml: every setting, readable by `--config`."""
    import yaml

    return yaml.safe_dump(settings.flat(), sort_keys=False, default_flow_style=None).encode()
