"""Recipes: what they resolve to against the published tables, and two steps of each on synthetic images."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import model_parameters
from timm.utils.agc import adaptive_clip_grad
from torch import nn

import muntin
from muntin.cli import main
from muntin.data.augment import Photographs
from muntin.data.datasets import Images, Splits
from muntin.data.loading import EpochBatches
from muntin.data.token_labels import DenseLabels
from muntin.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from muntin.errors import UserError
from muntin.models import FAMILIES, list_models
from muntin.tasks import fitting
from muntin.tasks.base import Task, frozen
from muntin.tasks.classification import Classification
from muntin.tasks.distillation import Teacher
from muntin.tasks.fitting import augmentation
from muntin.tasks.optimizer import classifiers, clip_gradients, decays, groups, layers, rate
from muntin.tasks.ranks import Ranks
from muntin.tasks.recipes import read_recipe, recipes
from muntin.tasks.settings import Settings, settings_from
from muntin.tasks.training import resolved

IN1K = sorted(name.removeprefix("in1k/") for name in recipes() if name.startswith("in1k/"))
COMMON = {
    "label_smoothing": 0.1,
    "randaugment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "erasing": 0.25,
    "augment": "photographs",
    "weights": "",
    "layer_decay": 1.0,
    "accumulate": 1,
    "freeze": 0,
}
MIXED = {"mixup": 0.8, "cutmix": 1.0}
# The published table (Swin section 4.1; EfficientViT and RMT: their released training settings).
FAMILY: dict[str, dict[str, Any]] = {
    "swin": MIXED | {"epochs": 300, "weight_decay": 0.05, "warmup": 20.0, "clip": 5.0, "agc": 0.0, "repeats": 1}
    | {"ema_decay": 0.0, "warmup_lr": 5e-7, "floor_lr": 5e-6},
    "efficientvit": MIXED | {"epochs": 300, "weight_decay": 0.025, "warmup": 5.0, "clip": 0.0, "agc": 0.02}
    | {"repeats": 3, "ema_decay": 0.99996, "ema_batch": 0, "ema_warmup": False, "warmup_lr": 1e-6, "floor_lr": 1e-5},
    "rmt": MIXED | {"epochs": 300, "weight_decay": 0.05, "warmup": 5.0, "clip": 0.0, "agc": 0.0, "repeats": 3}
    | {"ema_decay": 0.99996, "ema_batch": 512, "ema_warmup": False, "warmup_lr": 1e-6, "floor_lr": 1e-5},
}  # fmt: skip
PEAKS = {  # at batch 512, 1024, 2048
    "swin": (5e-4, 1e-3, 2e-3),
    "efficientvit": (1e-3, 2e-3, 4e-3),
    "rmt": (5e-4, 1e-3, 2e-3),
}
BATCH = {"swin": 1024, "efficientvit": 2048, "rmt": 2048}
DROP_PATH = {"t": 0.2, "s": 0.3, "b": 0.5, "l": 0.2}


def family_of(name: str) -> str:
    return next(family for family in ("efficientvit", "rmt", "swin") if name.startswith(family))


def of_recipe(name: str, **settings: Any) -> Settings:
    return settings_from(read_recipe(name), settings)


def test_there_is_a_recipe_for_every_published_model() -> None:
    assert {name for name in list_models() if name != "swin_free_digits"} <= set(IN1K)


@pytest.mark.parametrize("name", [name for name in IN1K if not name.endswith(("384", "512"))])
def test_recipes_are_what_the_papers_state(name: str) -> None:
    family = family_of(name)
    wanted = COMMON | FAMILY[family] | {"batch_size": BATCH[family]}
    if name.endswith("_1000_distilled"):
        wanted |= {"epochs": 1000, "teacher": "timm:regnety_160.deit_in1k", "distill_alpha": 0.5, "distill_tau": 1.0}
        wanted |= {"model.distilled": True}
    if name.endswith("_token_label"):
        wanted |= {"epochs": 310, "mixup": 0.0, "cutmix": 0.0, "repeats": 1, "token_weight": 0.5, "mix_token": True}
        wanted |= {"drop_path": 0.1}
    found = resolved(f"in1k/{name}")
    assert {key: found[key] for key in wanted} == wanted
    assert found["size"] == (256 if name.startswith("swinv2") else 224)
    assert name.startswith(found["model"])
    if family == "swin":
        assert found["drop_path"] == (0.1 if name == "swinv2_l" else DROP_PATH[name.replace("_free", "").split("_")[1]])
    elif family == "efficientvit":
        assert found["drop_path"] == 0.0
    for batch, peak in zip((512, 1024, 2048), PEAKS[family], strict=True):
        assert of_recipe(f"in1k/{name}", batch_size=batch).peak() == pytest.approx(peak)


def test_the_families_are_compared_on_the_digits_under_the_same_settings() -> None:
    """But for the learning rate, each its best, and the size: EfficientViT's stem alone halves the image four times."""
    found = {name: resolved(name) for name in recipes() if name.startswith("digits/")}
    assert {family_of(row["model"]) for row in found.values()} == {"swin", "efficientvit", "rmt"}
    own = {"model", "lr", "size"}
    common = [{k: v for k, v in row.items() if k not in own and not k.startswith("model.")} for row in found.values()]
    assert len(common) == 6 and all(row == common[0] for row in common)
    assert {name for name, row in found.items() if row["size"] != 32} == {"digits/efficientvit"}
    assert all(set(read_recipe("digits")) <= set(read_recipe(name)) for name in found)


@pytest.mark.parametrize(("name", "drop_path"), [("rmt_t", 0.1), ("rmt_s", 0.15), ("rmt_b", 0.4), ("rmt_l", 0.5)])
def test_the_average_of_rmt_and_its_drop_path(name: str, drop_path: float) -> None:
    assert resolved(f"in1k/{name}")["drop_path"] == drop_path
    assert of_recipe(f"in1k/{name}").average_decay(10**6) == pytest.approx(0.99984, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "steps", "wanted"),
    [  # step 0, the end of the warm-up, half of the cosine, the last step; 10 steps an epoch
        ("in1k/swin_t", 10, {0: 5e-7, 100: 5e-7 + (1e-3 - 5e-7) / 2, 200: 1e-3, 1600: (1e-3 + 5e-6) / 2, 3000: 5e-6}),
        ("in1k/efficientvit_m0", 10, {0: 1e-6, 50: 4e-3, 1525: (4e-3 + 1e-5) / 2, 3000: 1e-5}),
        ("in1k/rmt_s", 10, {0: 1e-6, 50: 2e-3, 1525: (2e-3 + 1e-5) / 2, 3000: 1e-5}),
        ("in1k/efficientvit_m0_1000_distilled", 10, {0: 1e-6, 50: 4e-3, 10000: 1e-5}),
        ("in1k/rmt_l_token_label", 10, {0: 1e-6, 50: 2e-3, 1575: (2e-3 + 1e-5) / 2, 3100: 1e-5}),
    ],
)
def test_the_schedule_of_a_recipe(name: str, steps: int, wanted: dict[int, float]) -> None:
    settings = of_recipe(name)
    for step, value in wanted.items():
        assert settings.peak() * rate(step, settings, steps) == pytest.approx(value, rel=1e-9), step
    last = settings.peak() * rate(settings.epochs * steps - 1, settings, steps)
    assert settings.floor_lr is not None and settings.floor_lr < last < 1.001 * settings.floor_lr


@pytest.mark.parametrize("name", ["swin_t", "swinv2_t", "swin_free_t_br", "efficientvit_m0", "rmt_t", "rmt_b"])
def test_the_decay_group_of_every_parameter_by_name(name: str) -> None:
    with torch.device("meta"):
        model = muntin.create_model(name)
    settings = of_recipe(f"in1k/{name}")
    found = {n: group["weight_decay"] for group in groups(model, settings) for n in group["names"]}  # type: ignore
    free = ("bias", "bias_table", "logit_scale", "position.fc1.weight", "position.fc2.weight")
    for module_name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            key = f"{module_name}.{own}"
            norm = isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d))
            wanted = 0.0 if norm or key.endswith(free) else settings.weight_decay
            assert found.pop(key) == wanted, key
            if key.endswith(("gamma1", "gamma2", "scale1", "scale2")):
                assert parameter.shape[:3] == (1, 1, 1) and wanted  # RMT's layer scales decay
    assert not found


def test_the_augmentation_of_the_recipes_is_timms() -> None:
    preprocessing = {"size": (224, 224), "resize": 256, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    made = augmentation(of_recipe("in1k/swin_t"), preprocessing | {"interpolation": "bicubic", "channels": "RGB"})
    assert isinstance(made, Photographs)
    text = repr(made)
    for part in ("RandomResizedCrop", "scale=(0.08, 1.0)", "bicubic", "RandomHorizontalFlip(p=0.5)", "RandAugment(n=2"):
        assert part in text, part
    for operation in ("AutoContrast", "PosterizeIncreasing", "SolarizeAdd", "ShearX", "TranslateYRel"):
        assert f"name={operation}, p=0.5, m=9, mstd=0.5" in text, operation


def test_layers_learn_more_slowly_from_the_head_down() -> None:
    model = muntin.create_model("swin_t", 3, dim=8, depths=(2, 1), heads=(1, 2), window=4)
    places = layers(model)
    assert places["backbone.stem.proj.weight"] == 0
    assert places["backbone.stages.0.blocks.1.mlp.fc1.weight"] == 2
    assert places["backbone.stages.1.blocks.0.mlp.fc1.weight"] == places["backbone.stages.1.merge.norm.weight"] == 3
    assert places["head.fc.weight"] == 4
    found: Any = groups(model, Settings(lr=0.1, layer_decay=0.5))
    scales = {name: group["lr"] for group in found for name in group["names"]}
    assert scales == {name: pytest.approx(0.1 * 0.5 ** (4 - place)) for name, place in places.items()}


def test_frozen_stages_keep_weights_and_statistics() -> None:
    model = muntin.create_model("efficientvit_m0", 3)
    task = Classification(model, Settings(freeze=2, ema_decay=0.0), 10, 3)
    parts = frozen(model, 2)
    assert [*parts] == [model.backbone.stem, model.backbone.stages[0], model.backbone.stages[1]]
    trained = {name for group in groups(model, task.settings) for name in group["names"]}  # type: ignore
    wanted = ("backbone.stages.2.", "head.")
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(wanted)}
    norms = [(name, m.training) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(training == name.startswith(wanted) for name, training in norms)
    with pytest.raises(UserError, match=r"freeze=5: the model has 3 stages"):
        Classification(model, Settings(freeze=5), 10, 3)


def test_adaptive_clipping_by_hand() -> None:
    """A row's gradient is no longer than agc times its weights' norm; the last layer is left alone (Brock, eq. 3)."""
    model = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore
    norm = clip_gradients(model, Settings(clip=0.0, agc=0.02))
    assert norm == pytest.approx(torch.cat([g.flatten() for g in before.values()]).norm().item())
    weight: Any = model["body"].weight
    for row, gradient, was in zip(weight.detach(), weight.grad, before["body.weight"], strict=True):
        limit = 0.02 * row.norm().clamp(min=1e-3)
        torch.testing.assert_close(gradient, was * min(1.0, float(limit / was.norm())))
    assert torch.equal(model["head"].weight.grad, before["head.weight"])  # type: ignore


def tiny(label: str, **config: Any) -> Any:
    family = next(f for f in FAMILIES if label in f.VARIANTS)
    return muntin.models.Classifier(
        label,
        family.BACKBONE(replace(family.TINY, **config), out_indices=(-1,), drop_path=0.0),
        family.HEAD(replace(family.TINY, **config), 5),
        5,
    )


@pytest.mark.parametrize("label", ["swin_t", "swin_free_b_br", "swinv2_t", "efficientvit_m0", "rmt_t"])
def test_adaptive_clipping_is_timms(label: str) -> None:
    """All but the classifier are clipped, the head's norm and projection too."""
    model = tiny(label)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    other = copy.deepcopy(model)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        b.grad = a.grad.clone()
    clip_gradients(model, Settings(clip=0.0, agc=0.02))
    adaptive_clip_grad(model_parameters(other, exclude_head=True), 0.02)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "config", "wanted"),
    [
        ("efficientvit_m0", {"distilled": True}, {"head.fc", "head.fc_distilled"}),
        ("rmt_t", {"token_label": True}, {"head.fc", "head.fc_tokens"}),
    ],
)
def test_every_classifier_is_left_alone(label: str, config: dict[str, Any], wanted: set[str]) -> None:
    model = tiny(label, **config)
    names = {id(module): name for name, module in model.named_modules()}
    assert {names[id(layer)] for layer in classifiers(model)} == wanted


@pytest.mark.parametrize(
    ("name", "images", "batch"),
    [  # training images, less a tenth for validation
        ("cifar10", 45_000, 128),
        ("cifar100", 45_000, 128),
        ("flowers102", 1020, 64),
        ("oxford_pets", 3312, 64),
        ("stanford_cars", 7330, 128),
    ],
)
def test_transfer_takes_steps_enough_for_its_average(name: str, images: int, batch: int) -> None:
    settings = of_recipe(f"transfer/{name}")
    assert settings.batch_size == batch
    steps = settings.epochs * (images // batch)
    half_life = math.log(0.5) / math.log(settings.average_decay(10**6))
    assert steps >= 4000 and half_life < 0.1 * steps
    assert settings.peak() == pytest.approx(1e-3 * batch / 512)
    header = recipes()[f"transfer/{name}"].read_text()
    assert f"One GPU, {batch} images a step" in header and "The rate of 1e-3 is for 512 images" in header


def test_timm_has_the_teacher_that_recipes_name() -> None:
    teachers = {read_recipe(name).get("teacher") for name in recipes() if name.endswith("distilled")}
    assert teachers == {"timm:regnety_160.deit_in1k"}
    name = "regnety_160.deit_in1k"
    assert timm.is_model(name) and name in timm.list_pretrained("regnety_160*")
    stated = timm.get_pretrained_cfg(name)
    assert stated is not None and stated.has_weights and stated.num_classes == 1000 and stated.tag == "deit_in1k"


def test_repeated_augmentation_gives_each_image_several_times_in_a_row() -> None:
    batches = EpochBatches(60, 12, seed=1, repeats=3)
    batches.set_epoch(2)
    found = [item for batch in batches for item in batch]
    assert len(found) == 60  # as many as without
    for first in range(0, 60, 3):
        assert {position for _, position in found[first : first + 3]} == {found[first][1]}
        assert [epoch for epoch, _ in found[first : first + 3]] == [6, 7, 8]  # other augmentations each time
    assert len({position for _, position in found}) == 20


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_step_has_the_same_images_however_it_is_divided(repeats: int) -> None:
    whole = EpochBatches(50, 24, seed=1, repeats=repeats)
    for parts, processes in ((2, 1), (1, 2), (3, 4)):
        shares = [
            EpochBatches(50, 24, seed=1, repeats=repeats, parts=parts, share=(rank, processes))
            for rank in range(processes)
        ]
        for share in shares:
            assert len(share) == len(whole) * parts
        pieces = list(zip(*shares, strict=True))
        steps = [pieces[first : first + parts] for first in range(0, len(pieces), parts)]
        found = [[item for piece in step for share in piece for item in share] for step in steps]
        assert found == list(whole)
    with pytest.raises(UserError, match=r"7 images cannot be shared out over 4 processes in 2 parts"):
        EpochBatches(7, 24, seed=1, parts=2, share=(0, 4))


def synthetic(count: int) -> Images:
    pictures = [Image.effect_noise((72, 64), 90).convert("RGB") for _ in range(count)]
    return Images(list(range(count)), [i % 2 for i in range(count)], ["a", "b"], lambda position: pictures[position])


@pytest.mark.parametrize("name", [name for name in sorted(recipes()) if "task" not in read_recipe(name)])
def test_every_recipe_takes_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the family's tiny configuration, and what the recipe says of the model's where that is no size."""
    found: Any = of_recipe(name)
    config = {k: v for k, v in found.model_config.items() if not isinstance(v, tuple)}
    label = found.model or "swin_t"
    family = next((f for f in FAMILIES if label in f.VARIANTS), None)
    assert family is not None, label
    if name == "digits":
        config = {}
    tiny = replace(family.TINY, **config)
    model = muntin.models.Classifier(
        label, family.BACKBONE(tiny, out_indices=(-1,), drop_path=found.drop_path or 0.0), family.HEAD(tiny, 2), 2
    )
    settings = replace(found, epochs=1, batch_size=6, size=64, precision="32", workers=0, weights="", save_minutes=99)
    images = synthetic(12)
    learned: dict[str, Any] = {}
    if settings.teacher:
        teacher = muntin.models.Classifier(label, family.BACKBONE(tiny, out_indices=(-1,)), family.HEAD(tiny, 2), 2)
        usual = IMAGENET_MEAN, IMAGENET_STD
        learned["teacher"] = Teacher(teacher, (64, 64), usual, usual)
    if name.endswith("_token_label"):
        labels = tmp_path / "labels"
        labels.mkdir()
        for key in images.keys:
            scores = torch.rand(2, 5, 5)
            torch.save(torch.stack([scores, torch.arange(2)[:, None, None].expand(2, 5, 5)]), labels / f"{key}.pt")
        settings = replace(settings, token_labels=str(labels))
        learned["labels"] = DenseLabels(labels, images)
    steps: list[float] = []
    taken = Task.optimizer_step

    def optimizer_step(self: Task, *args: Any, **kwargs: Any) -> None:
        taken(self, *args, **kwargs)
        steps.append(float(self.loss_sum))

    monkeypatch.setattr(Task, "optimizer_step", optimizer_step)
    preprocessing = {"size": (64, 64), "resize": 73, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    preprocessing |= {"interpolation": "bicubic", "channels": "RGB"}
    before = [parameter.clone() for parameter in model.parameters()]
    splits = Splits(images, replace(synthetic(4), keys=["v0", "v1", "v2", "v3"]), None, False)
    fitting.fit(tmp_path, settings, model, splits, preprocessing, lambda _: None, Ranks(), **learned)
    assert len(steps) == 2 and steps[1] > steps[0] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_print_config_shows_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "in1k/rmt_s", "--set", "batch_size=1024", "--print-config"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "model: rmt_s",
        "batch_size: 1024",
        "repeats: 3",
        "drop_path: 0.15",
        "model.decay_range: [4, 4, 6, 6]",
    ):
        assert f"\n{line}\n" in shown
    assert all(f"\n{name}:" in f"\n{shown}" for name in Settings().flat())


def test_recipes_are_listed_and_near_names_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in recipes())
    assert main(["train", "--recipe", "in1k/swin_tt"]) == 2
    assert "there is no recipe 'in1k/swin_tt' (did you mean 'in1k/swin_t'" in capsys.readouterr().err


def test_a_recipe_of_another_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: detekt\n")
    with pytest.raises(UserError, match="task='detekt' is unknown.*valid are classify, detect, instance, segment"):
        resolved(config=tmp_path / "c.yaml")


def test_both_ways_of_clipping_are_refused() -> None:
    with pytest.raises(UserError, match=r"clip=5.0 and agc=0.02 both clip gradients"):
        Settings(agc=0.02)


def test_one_dimensional_parameters_never_decay() -> None:
    assert not decays("any.weight", nn.Parameter(torch.ones(3)))
    assert decays("any.weight", nn.Parameter(torch.ones(3, 1)))
