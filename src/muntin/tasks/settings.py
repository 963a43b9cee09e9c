"""Training settings: one flat set of plain values, for the command line, YAML files and config.yaml alike.

A field of the model's configuration is written `model.FIELD`, as in `--set model.window=[4,8,4,2]`, one of the head of
a detector or segmenter `head.FIELD`.
"""

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from muntin.errors import UserError, nearest

AUGMENTS = ("photographs", "distort", "none")
MODEL_PREFIX = "model."
HEAD_PREFIX = "head."
TASKS = ("classify", "detect", "instance", "segment")
_CLASSIFY = (  # settings of classification alone, and of the other tasks alone
    "repeats label_smoothing mixup cutmix augment randaugment color_jitter erasing distortion teacher distillation "
    "distill_alpha distill_tau token_labels token_weight mix_token"
).split()
_DENSE = (
    "head longer smallest crop flip photometric class_balance freeze_norms schedule drops power steps warmup_steps"
).split()


@dataclass(frozen=True)
class Settings:
    """What a training run depends on. None means: decided from the data and the model, and then written down.

    **Data.** data: "digits", a folder of images, or any other source in docs/data.md; size: side of the model's square
    input, in pixels; on_bad_image: "error", or "skip" and list it in bad_files.csv.

    **Model.** weights: what to start from: "" (random), "pretrained", a tag (muntin weights), a checkpoint's path or
    address; freeze: so many stages, with the stem, keep their weights and statistics (0: everything is trained);
    model_config: fields of the model's configuration, written model.FIELD.

    **Steps.** batch_size: images of one step of the optimiser, over all devices; accumulate: parts that each device
    takes its share of them in; epochs: passes over the training images; repeats: augmentations of an image within a
    batch (repeated augmentation, Hoffer et al., 2020: an epoch then sees 1/repeats of the images).

    **Optimiser: AdamW.** lr: its peak rate, after `warmup` epochs, before a cosine down to floor_lr (None: a hundredth
    of the peak); warmup_lr: what the warm-up starts from (None: one step's worth); lr_batch: the batch that lr, and it
    alone, is stated for: another one scales it in proportion (0: lr is taken as it is); layer_decay: factor of the rate
    per layer from the head down; clip: largest norm of all gradients, agc: largest ratio of a gradient's norm to its
    weights' (adaptive gradient clipping, Brock et al., 2021), 0 for none; ema_decay: of the average of the weights per
    step, 0 for none, for batches of ema_batch images (0: of any): another batch_size takes its power, and with
    ema_warmup of at most (1 + step) / (10 + step), so that short trainings forget what they began with; the average is
    what is saved unless it is significantly worse.

    **Regularisation.** mixup, cutmix: their Beta parameter, 0 for none; where both are set, each takes half of the
    batches; augment: "photographs" (crop, flip, `randaugment` or `color_jitter`, `erasing`), "distort" (characters, by
    `distortion`) or "none"; drop_path: stochastic depth of the last block.

    **A teacher.** teacher: "" for none, a run's folder, timm:NAME or a model's name with their published weights, or
    timm:NAME=FILE or NAME=FILE; distillation: "soft" (Kullback-Leibler divergence at temperature `distill_tau`) or
    "hard" (the teacher's decision); distill_alpha: the share of its loss. token_labels: a folder of dense label files
    (docs/training.md), "" for none; token_weight: factor of their loss; mix_token: paste boxes of tokens; mixup and
    cutmix are off with token labels.

    **Detection and segmentation.** task: "detect" (boxes), "instance" (boxes and masks) or "segment" (a class for each
    pixel); head: a name in `muntin.heads.HEADS`, head_config: its fields, written head.FIELD; size: then of the shorter
    side in pixels, of segmentation's square crops in training too; longer: what the longer side is at most (None: any),
    the shorter is less where that is needed; smallest: the shorter side is drawn from here up to size (None: always
    size), in segmentation up to size^2 / smallest (None: half to twice the size); crop: half of the images are first
    cut to 384 to 600 pixels and resized (as DETR does); flip: the share of images that are mirrored; photometric:
    brightness, contrast, saturation and hue are drawn; class_balance: a class's pixels count in segmentation's loss by
    their share of the training set to the power of minus this (0: all alike); freeze_norms: statistics and affine parts
    of the backbone's BatchNorms stay. schedule: "cosine", "steps" (a tenth of the rate from each epoch of `drops` on)
    or "poly" (the rest of the training, to the power of `power`); steps: of the whole training, in place of epochs;
    warmup_steps: in place of warmup.

    **Losing nothing.** spike: a step whose loss is so many times the running mean, and above 1, is skipped as one that
    is not finite (0: only the latter); max_skips: so many in a row end the training; patience: stop after so many
    epochs without a better validation accuracy, 0 for never; save_minutes: how often to save within an epoch, besides
    its end; keep: checkpoints of so many last saves, besides the best one; deterministic: only algorithms that repeat
    to the bit.

    **Machine.** precision: "bf16", "16" (with a loss scale), "32", or "auto": bf16 where the hardware multiplies it
    natively; workers: processes that read and augment images; threads: of the CPU in the training step, all by default;
    grad_checkpointing: recompute blocks instead of keeping their intermediates; compile: by torch.compile;
    channels_last: of images and convolutions; devices: GPUs or processes of each machine (None: as torchrun
    started it, else one; 0: all GPUs that it has, and one process without any); nodes: machines, on each of which the
    command is called, and rendezvous: the first one's HOST:PORT; strategy: "auto", "ddp" or "fsdp".
    """

    task: str = "classify"
    data: str = "digits"
    size: int | None = None
    seed: int = 0
    on_bad_image: str = "error"

    model: str | None = None
    weights: str = ""
    freeze: int = 0

    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1
    repeats: int = 1

    lr: float = 1e-3
    lr_batch: int = 0
    warmup: float = 5.0
    warmup_lr: float | None = None
    floor_lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    clip: float = 5.0
    agc: float = 0.0
    ema_decay: float = 0.999
    ema_batch: int = 0
    ema_warmup: bool = True

    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    augment: str = "photographs"
    randaugment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erasing: float = 0.25
    distortion: float = 1.0
    drop_path: float | None = None

    teacher: str = ""
    distillation: str = "soft"
    distill_alpha: float = 0.5
    distill_tau: float = 1.0
    token_labels: str = ""
    token_weight: float = 0.5
    mix_token: bool = True

    head: str = ""
    longer: int | None = None
    smallest: int | None = None
    crop: bool = False
    flip: float = 0.5
    photometric: bool = False
    class_balance: float = 0.0
    freeze_norms: bool = False
    schedule: str = "cosine"
    drops: tuple[int, ...] = ()
    power: float = 1.0
    steps: int = 0
    warmup_steps: int = 0

    spike: float = 10.0
    max_skips: int = 50
    patience: int = 0
    save_minutes: float = 10.0
    keep: int = 2
    deterministic: bool = False

    precision: str = "auto"
    workers: int | None = None
    threads: int | None = None
    grad_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    devices: int | None = None
    nodes: int = 1
    rendezvous: str = ""
    strategy: str = "auto"

    model_config: Mapping[str, Any] = field(default_factory=dict)
    head_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names, valid, remedy in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and valid(value)):
                    raise UserError(f"{name}={value}: {remedy}")
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if value not in words:
                raise UserError(f"{name}={value!r} is unknown{nearest(value, words)}; valid are {', '.join(words)}")
        self._refuse_other_tasks()
        if self.nodes > 1 and not self.rendezvous:
            raise UserError(f"nodes={self.nodes}: say where they meet, as in --set rendezvous=FIRST-MACHINE:29500")
        if self.strategy == "fsdp" and self.precision == "16":
            raise UserError("precision=16 needs whole gradients, which strategy=fsdp has not; set precision=bf16")
        if self.agc and self.strategy == "fsdp":
            raise UserError(
                "agc needs whole gradients, which strategy=fsdp has not; set strategy=ddp, or agc=0 and clip"
            )
        if self.clip and self.agc:
            raise UserError(f"clip={self.clip} and agc={self.agc} both clip gradients; set one of them to 0")

    @property
    def dense(self) -> bool:
        """Whether the task is detection or segmentation."""
        return self.task != "classify"

    def _refuse_other_tasks(self) -> None:
        """Raises `UserError` for what only another task listens to."""
        others = _CLASSIFY if self.dense else _DENSE
        usual = {f.name: f.default for f in fields(self)}
        wrong = [f"{name}={getattr(self, name)}" for name in others if getattr(self, name) != usual[name]]
        if not self.dense:
            wrong += [f"{HEAD_PREFIX}{name}={value}" for name, value in self.head_config.items()]
        if wrong:
            tasks = "classify" if self.dense else ", ".join(TASKS[1:])
            raise UserError(
                f"{', '.join(wrong)}: of no use to task={self.task}, only to {tasks}; leave it out, or give --task"
            )
        if self.longer is not None and self.size is not None and self.longer < self.size:
            raise UserError(f"longer={self.longer} is less than size={self.size}, the shorter side; give more")
        if self.smallest is not None and self.size is not None and self.smallest > self.size:
            raise UserError(f"smallest={self.smallest} is more than size={self.size}; give a number up to that")
        if self.schedule == "steps" and not self.drops:
            raise UserError("schedule=steps: say after which epochs the rate drops, as in --set drops=[8,11]")

    def peak(self) -> float:
        """The peak learning rate at this batch size."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr

    def average_decay(self, step: int) -> float:
        """The decay of the average of the weights in a step, counted from 0, at this batch size."""
        decay = self.ema_decay ** (self.batch_size / self.ema_batch) if self.ema_batch else self.ema_decay
        return min(decay, (1 + step) / (10 + step)) if self.ema_warmup else decay

    def flat(self) -> dict[str, Any]:
        """Plain values under the names that `--set` takes: what config.yaml holds."""
        left_out = {"model_config", "head_config", *(_CLASSIFY if self.dense else _DENSE)}
        values = {f.name: _lists(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}
        values |= {MODEL_PREFIX + name: _lists(value) for name, value in self.model_config.items()}
        return values | {HEAD_PREFIX + name: _lists(value) for name, value in self.head_config.items()}


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "epochs size batch_size accumulate repeats threads nodes keep max_skips longer smallest",
        lambda value: value >= 1,
        "give a whole number of at least 1",
    ),
    (
        "seed workers patience freeze lr_batch ema_batch devices steps warmup_steps",
        lambda value: value >= 0,
        "give a whole number of at least 0",
    ),
    ("lr save_minutes distill_tau power", lambda value: value > 0, "give a positive number"),
    (
        "weight_decay warmup warmup_lr floor_lr clip agc mixup cutmix distortion color_jitter token_weight spike",
        lambda value: value >= 0,
        "give a number of at least 0",
    ),
    (
        "label_smoothing ema_decay erasing drop_path",
        lambda value: 0 <= value < 1,
        "give a number from 0 up to, but not, 1",
    ),
    ("layer_decay", lambda value: 0 < value <= 1, "give a number above 0 and up to 1"),
    ("distill_alpha flip class_balance", lambda value: 0 <= value <= 1, "give a number from 0 to 1"),
)
_WORDS = {
    "task": TASKS,
    "schedule": ("cosine", "steps", "poly"),
    "augment": AUGMENTS,
    "precision": ("auto", "bf16", "16", "32"),
    "on_bad_image": ("error", "skip"),
    "distillation": ("soft", "hard"),
    "strategy": ("auto", "ddp", "fsdp"),
}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (tuple, list)) else value


TYPES = {name: hint for name, hint in typing.get_type_hints(Settings).items() if not name.endswith("_config")}


def settings_from(*layers: Mapping[str, Any]) -> Settings:
    """Settings from flat mappings, later ones winning. Raises `UserError` naming an unknown or wrong entry."""
    values: dict[str, Any] = {}
    model_config: dict[str, Any] = {}
    head_config: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name.startswith(MODEL_PREFIX):
                model_config[name.removeprefix(MODEL_PREFIX)] = _tuples(value)
            elif name.startswith(HEAD_PREFIX):
                head_config[name.removeprefix(HEAD_PREFIX)] = _tuples(value)
            elif name in TYPES:
                values[name] = _convert(name, value)
            else:
                raise UserError(
                    f"there is no setting {name!r}{nearest(name, TYPES)}; valid are {', '.join(TYPES)}, and "
                    f"{MODEL_PREFIX}FIELD for a field of the model's configuration"
                )
    return Settings(**values, model_config=model_config, head_config=head_config)


def _convert(name: str, value: Any) -> Any:
    """The value as the setting's type: YAML reads 1e-3 as text, and 1 where 1.0 is meant."""
    hint = TYPES[name]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(type(item) is int and item > 0 for item in value):
            raise UserError(f"{name}={value!r}: give whole numbers, as in {name}=[8,11]")
        return tuple(value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is bool and isinstance(value, bool):
        return value
    if kind is bool or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{name}={value!r}: give {_KINDS[kind]}")
    try:
        converted = kind(value)
        if kind is int and float(value) != converted:
            raise ValueError
    except ValueError as error:
        raise UserError(f"{name}={value!r}: give {_KINDS[kind]}") from error
    return converted


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


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
