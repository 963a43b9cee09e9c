"""Settings and recipes of detection and segmentation against what the papers and their configurations state."""

import pytest

from muntin.errors import UserError
from muntin.tasks.asked import ask
from muntin.tasks.optimizer import rate
from muntin.tasks.recipes import read_recipe, recipes
from muntin.tasks.settings import Settings, settings_from

DENSE = [name for name in recipes() if read_recipe(name).get("task", "classify") != "classify"]


def of_recipe(name: str, **settings) -> Settings:
    return settings_from(read_recipe(name), settings)


@pytest.mark.parametrize("name", [name for name in DENSE if name.startswith("coco/")])
def test_coco_recipes_are_those_of_the_specification(name: str) -> None:
    settings = of_recipe(name)
    head, times = name.removeprefix("coco/").split("_rmt")[0].split("_efficientvit")[0].rsplit("_", 1)
    assert (settings.head, settings.task) == (head, "detect" if head == "retinanet" else "instance")
    epochs, drops = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[times]
    assert (settings.epochs, settings.drops, settings.batch_size) == (epochs, drops, 16)
    assert (settings.smallest, settings.crop) == ((480, True) if times == "3x" else (None, False))
    steps = 7329  # of an epoch: 117266 images with objects, 16 at once
    published = {"rmt_l": 2e-4, "rmt_b": 2e-4 if times == "3x" else 4e-4}.get(settings.model or "", 4e-4)
    peak = published if "rmt" in name and head != "retinanet" else 1e-4
    found = [rate(step, settings, steps) * settings.peak() for step in (0, 250, 500)]
    assert found == pytest.approx([peak * 1e-3, peak * 0.5005, peak])
    for drop, before, after in zip(drops, (1, 0.1), (0.1, 0.01), strict=True):
        assert rate(drop * steps - 1, settings, steps) == pytest.approx(before)
        assert rate(drop * steps, settings, steps) == pytest.approx(after)
    assert rate(epochs * steps - 1, settings, steps) == pytest.approx(0.01)
    assert settings.weight_decay == (1e-4 if "rmt" in name and head == "retinanet" else 0.05)
    assert settings.freeze_norms == ("efficientvit" in name)
    assert of_recipe(name, batch_size=8).peak() == pytest.approx(peak / 2)


def test_ade20k_recipes_are_those_of_the_specification() -> None:
    upernet, fpn = of_recipe("ade20k/upernet_160k"), of_recipe("ade20k/semantic_fpn_80k")
    assert (upernet.size, upernet.batch_size, upernet.weight_decay, upernet.drop_path) == (512, 16, 0.01, 0.3)
    found = [rate(step, upernet, 1263) * 6e-5 for step in (1500, 80_000, 160_000)]
    assert found == pytest.approx([6e-5 * (1 - 1500 / 160_000), 3e-5, 0])
    assert rate(750, upernet, 1263) == pytest.approx(0.5 * (1 - 750 / 160_000), rel=1e-4)
    assert (fpn.size, fpn.batch_size, fpn.weight_decay, fpn.peak()) == (512, 16, 1e-4, 1e-4)
    assert rate(40_000, fpn, 1263) == pytest.approx(0.5**0.9)
    assert rate(0, fpn, 1263) == 1


@pytest.mark.parametrize("name", DENSE)
def test_headers_give_the_command_of_their_recipe(name: str) -> None:
    header = recipes()[name].read_text().split("task:")[0]
    task = read_recipe(name)["task"]
    assert f"--recipe {name} " in header if "/" in name and "scenes" not in name else f"--task {task} " in header
    assert all(line.startswith("#") and len(line) <= 160 for line in header.splitlines())


def test_settings_of_another_task_are_refused() -> None:
    with pytest.raises(UserError, match="mixup=0.5: of no use to task=detect, only to classify"):
        Settings(task="detect", mixup=0.5)
    with pytest.raises(UserError, match="head=upernet, drops=.8,.: of no use to task=classify"):
        Settings(head="upernet", drops=(8,))
    with pytest.raises(UserError, match="head.channels=64: of no use to task=classify"):
        settings_from({"head.channels": 64})
    with pytest.raises(UserError, match="longer=500 is less than size=800"):
        Settings(task="detect", size=800, longer=500)
    with pytest.raises(UserError, match="schedule=steps: say after which epochs"):
        Settings(task="detect", schedule="steps")
    with pytest.raises(UserError, match="drops='x': give whole numbers"):
        settings_from({"task": "detect", "drops": "x"})


def test_flat_settings_hold_those_of_the_task_and_come_back() -> None:
    told = {
        "task": "instance",
        "drops": [8, 11],
        "schedule": "steps",
        "head.channels": 64,
        "model.window": [4, 8, 4, 2],
    }
    flat = settings_from(told).flat()
    assert flat["drops"] == [8, 11] and flat["head.channels"] == 64 and "mixup" not in flat
    assert settings_from(flat).flat() == flat
    assert "drops" not in Settings().flat()


def test_a_recipe_of_another_task_is_refused() -> None:
    with pytest.raises(UserError, match="recipe coco/mask_rcnn_1x is for task=instance, not detect"):
        ask(None, "coco/mask_rcnn_1x", None, {"task": "detect"})
    with pytest.raises(UserError, match="recipe in1k/swin_t is for task=classify, not segment"):
        ask(None, "in1k/swin_t", None, {"task": "segment"})


def test_a_task_without_a_recipe_takes_its_own() -> None:
    assert ask(None, None, None, {"task": "instance", "data": "coco"}).settings.head == "mask_rcnn"
    found = ask(None, None, None, {"task": "segment", "data": "coco", "model": "swin_s"})
    assert (found.settings.schedule, found.folder.name) == ("poly", "coco-upernet-swin_s")
