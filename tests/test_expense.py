"""A line about long epochs where there is no GPU."""

import re

import pytest
import torch

import muntin
from muntin.data.datasets import Images, Splits
from muntin.tasks import expense, training
from muntin.tasks.expense import long_epochs, products_per_second
from muntin.tasks.recipes import read_recipe
from muntin.tasks.settings import settings_from


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(expense, "products_per_second", lambda: 100.0)


def of(recipe, **settings):
    return settings_from({"size": 224}, read_recipe(recipe), settings)


@pytest.fixture(scope="module")
def swin():
    with torch.device("meta"):
        return muntin.create_model("swin_t", 1000)


def test_a_recipe_for_gpus_says_what_an_epoch_takes_and_what_to_do(swin):
    line = long_epochs(swin, "swin_t", of("in1k/swin_t"), 1_281_167)
    gmacs = 3 * 1_281_167 * 4.5  # swin_t's published multiply-adds
    work = re.search(r"an epoch of swin_t over 1,281,167 images at 224 pixels takes ([\de.+]+) multiply-adds", line)
    assert work and float(work[1]) == pytest.approx(1e9 * gmacs, rel=0.03)
    hours = re.search(r"([\d.]+) hours or more at the 100e9 a second", line)
    assert hours and float(hours[1]) == pytest.approx(gmacs / 100 / 3600, rel=0.03)
    assert (
        "and there are 300; consider a GPU, fewer images, published weights and few epochs (--recipe finetune)" in line
    )
    assert "--model efficientvit_m0" in line and "--set accumulate=8 if memory is short" in line and "\n" not in line


def test_the_advice_leaves_out_what_is_so_already(swin):
    line = long_epochs(swin, "efficientvit_m0", of("finetune"), 1_281_167)
    assert "finetune" not in line and "--model" not in line and "accumulate" not in line


@pytest.mark.parametrize("images", [1000, 20_000])
def test_little_work_is_not_spoken_of(swin, images):
    assert long_epochs(swin, "swin_t", of("in1k/swin_t"), images) == ""


def test_nor_is_a_machine_with_a_gpu(swin, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert long_epochs(swin, "swin_t", of("in1k/swin_t"), 1_281_167) == ""


def test_the_rate_is_that_of_a_product(monkeypatch):
    monkeypatch.setattr(expense, "PRODUCT", 256)
    assert 0.1 < products_per_second() < 1e5


def test_training_says_it_before_it_begins(tmp_path, monkeypatch):
    """On a CPU alone, with ImageNet's recipe and a million images, and nothing is refused."""

    class Begun(Exception):
        pass

    def fit(*_args, **_more):
        raise Begun

    count = 1_000_000
    images = Images(list(range(count)), [0] * count, ["a", "b"], lambda position: None)
    splits = Splits(images, Images([-1], [0], ["a", "b"], lambda position: None), None, False, given=True)
    preprocessing = {"size": [224, 224], "resize": 256, "mean": [0.5] * 3, "std": [0.5] * 3}
    monkeypatch.setattr(training, "_data", lambda *_: (splits, preprocessing))
    monkeypatch.setattr(training, "fit", fit)
    said = []
    with pytest.raises(Begun):
        training.train(tmp_path / "run", recipe="in1k/efficientvit_m1", data="digits", report=said.append)
    assert any(line.startswith("no GPU here: an epoch of efficientvit_m1 over 1,000,000 images") for line in said)
