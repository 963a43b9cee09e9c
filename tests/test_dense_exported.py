"""Exported detectors and segmenters at work: what the run that they were made from finds, by the same commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import muntin
from muntin.cli import main
from muntin.data.device import Prepare
from muntin.errors import UserError
from muntin.measure import bench
from muntin.run import Run, save_model
from muntin.runtime import Engine, dense_engine, load, sources
from muntin.runtime.targets import Opened
from muntin.tasks import evaluate, predict, predict_dense
from muntin.tasks.dense_inference import segment
from muntin.tasks.trained_dense import of_file

pytest.importorskip("torchvision")
pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

CLASSES = ["cup", "ball"]
PALETTE = [(9, 8, 7), (250, 0, 3)]
PREPROCESSING: dict[str, Any] = {
    **{"size": [48, 48], "resize": None, "fit": {"shorter": 48, "longer": 48}, "channels": "RGB"},
    **{"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2], "interpolation": "bilinear", "palette": PALETTE},
}
BACKBONE: dict[str, Any] = {"dim": 8, "depths": (1,), "heads": (1,), "window": 4}  # tracing takes long by stage
HEADS: dict[str, dict[str, Any]] = {
    "retinanet": {"strides": (4, 8), "channels": 8, "anchor_octave": 2, "score_threshold": 0.005, "detections": 9},
    "semantic_fpn": {"channels": 8, "width": 8, "subpixels": 2},
}
FILES = {
    "retinanet": {"one.xml": {"fixed": (1, 48, 48)}},
    "semantic_fpn": {
        "any.onnx": {"sizes": [(48, 48)], "batches": [2]},
        "bytes.xml": {"with_preprocessing": True, "fixed": (3, 48, 32)},
    },
}


def saved(head: str, folder: Path) -> Path:
    """A run of a small model that finds something."""
    torch.manual_seed(0)
    model = muntin.create_dense(head, "swin_t", 2, head_config=HEADS[head], **BACKBONE)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)) and not name.startswith("backbone"):
                gain = 0.1 if name.endswith(("boxes", "bbox_reg", "bbox_pred")) else 1.4
                module.weight.normal_(0, gain / module.weight[0].numel() ** 0.5)
    save_model(folder / "model.safetensors", model, classes=CLASSES, preprocessing=PREPROCESSING)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of either kind with its files, square images with boxes and masks, and others with label maps."""
    place = tmp_path_factory.mktemp("exported")
    for head, files in FILES.items():
        source = sources.open_source(saved(head, place / head), sources.Weights())
        about: dict[str, Any] = {"classes": source.classes, "preprocessing": source.preprocessing, "progress": False}
        for name, options in files.items():
            muntin.export(source.model, place / head / name, **about, **options)
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for part in ("maps/images/test", "maps/masks/test", "coco/test", "coco/annotations"):
        (place / part).mkdir(parents=True)
    for i in range(3):
        Image.fromarray(draw.integers(0, 255, (80, 60, 3), dtype=np.uint8)).save(place / f"maps/images/test/{i}.png")
        labels = draw.integers(0, 2, (4, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
        Image.fromarray(labels).save(place / f"maps/masks/test/{i}.png")
        Image.fromarray(draw.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(place / f"coco/test/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 60, "height": 60})
        for k in range(2):
            x, y, w, h = (int(v) for v in draw.integers((0, 0, 20, 20), 30))
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            fields = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": outline}
            annotations.append({"id": len(annotations), "image_id": i, "category_id": k} | fields)
    (place / "maps/classes.txt").write_text("\n".join(CLASSES))
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (place / "coco/annotations/instances_test.json").write_text(json.dumps(document))
    return place


def found_by(path: Path, images: Path, out: Path, **views: Any) -> dict[str, Any]:
    predict_dense(path, [images], out, **views)
    return json.loads((out / "predictions.json").read_text())


def labels_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "labels").iterdir())]


@pytest.mark.parametrize("views", [{}, {"flip": True}], ids=str)
def test_a_detectors_file_finds_and_scores_what_its_run_does(place: Path, tmp_path: Path, views: Any) -> None:
    paths, data = (place / "retinanet", place / "retinanet/one.xml"), place / "coco"
    wanted, found = (evaluate(path, str(data), **views) for path in paths)
    assert found.objects == 6 and found.classes == CLASSES
    for name, value in wanted.figures.items():
        assert found.figures[name] == (value if value is None else pytest.approx(value, abs=1e-4)), name
    one, other = (found_by(path, data / "test", tmp_path / path.name, **views) for path in paths)
    assert one["categories"] == other["categories"]
    assert len(one["annotations"]) == len(other["annotations"]) > 8
    for row, same in zip(one["annotations"], other["annotations"], strict=True):
        assert (row["image_id"], row["category_id"]) == (same["image_id"], same["category_id"])
        assert row["score"] == pytest.approx(same["score"], abs=1e-4)
        assert row["bbox"] == pytest.approx(same["bbox"], abs=0.05)


@pytest.mark.parametrize("views", [{}, {"scales": (0.75, 1.0), "flip": True}, {"crop": 32}], ids=str)
def test_a_segmenters_file_labels_and_scores_what_its_run_does(place: Path, tmp_path: Path, views: Any) -> None:
    paths, data = (place / "semantic_fpn", place / "semantic_fpn/any.onnx"), place / "maps"
    wanted, found = (evaluate(path, str(data), **views) for path in paths)
    assert found.miou == pytest.approx(wanted.miou, abs=2e-3) and found.classes == CLASSES
    one, other = (found_by(path, data / "images", tmp_path / path.name, **views) for path in paths)
    assert [row["label_map"] for row in one["images"]] == [row["label_map"] for row in other["images"]]
    maps, same = (labels_of(tmp_path / path.name) for path in paths)
    assert 0.01 < np.mean(maps) < 0.99 and np.mean(np.array(maps) != np.array(same)) < 1e-3
    with Image.open(tmp_path / "any.onnx/labels/0.png") as label_map:
        assert label_map.getpalette()[:6] == [value for colour in PALETTE for value in colour]


def test_a_segmenters_file_of_one_size_and_batch_is_a_window(place: Path, tmp_path: Path) -> None:
    run, path = Run.open(place / "semantic_fpn"), place / "semantic_fpn/bytes.xml"
    found_by(path, place / "maps/images", tmp_path)
    pictures = [Image.open(place / f"maps/images/test/{i}.png") for i in range(3)]
    wanted = segment(run.model(), pictures, run.preprocessing, crop=(48, 32))
    for found, label_map in zip(labels_of(tmp_path), wanted, strict=True):
        assert 0.01 < found.mean() < 0.99 and (found != label_map.numpy()).mean() < 1e-3
    assert evaluate(path, str(place / "maps"), crop=24).pixels == 3 * 80 * 60
    with pytest.raises(UserError, match="was exported for 48x32 alone.*leave --crop 40 out"):
        evaluate(path, str(place / "maps"), crop=40)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_file_of_one_size_sees_smaller_images_with_their_mean_around_them(place: Path, task: str) -> None:
    file, head = ("one.xml", "retinanet") if task == "detect" else ("bytes.xml", "semantic_fpn")
    engine, model = dense_engine(place / head / file), Run.open(place / head).model()
    pixels = torch.randint(256, (2, 3, 30, 20), dtype=torch.uint8)
    mean = (255 * torch.tensor(PREPROCESSING["mean"])).round().to(torch.uint8)
    filled = mean[:, None, None].expand(2, 3, 48, engine.engine.fixed[2]).clone()
    filled[:, :, :30, :20] = pixels
    prepare = Prepare(PREPROCESSING["mean"], PREPROCESSING["std"])
    with torch.no_grad():
        if task == "segment":
            wanted = model(prepare(filled))[:, :, :30, :20]
            torch.testing.assert_close(engine(pixels), wanted, rtol=0, atol=1e-4)
            return
        found = engine(prepare(pixels))
        images = torch.zeros(2, 3, 48, 48)
        images[:, :, :30, :20] = prepare(pixels)
        for one, other in zip(found, model(images), strict=True):
            inside = (other["boxes"][:, 0] < 20) & (other["boxes"][:, 1] < 30)
            assert len(one["boxes"]) > 2
            torch.testing.assert_close(one["scores"], other["scores"][inside], rtol=0, atol=1e-4)


def test_a_detectors_file_of_one_size_refuses_larger_images(place: Path) -> None:
    path, data = place / "retinanet/one.xml", str(place / "coco")
    with pytest.raises(UserError, match="one.xml was exported for batch 1 at 48x48 and got batch 1 at 96x96; resize"):
        evaluate(path, data, scales=(2.0,))


def test_the_commands_take_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector, segmenter = str(place / "retinanet/one.xml"), str(place / "semantic_fpn/any.onnx")
    assert main(["eval", detector, "--data", str(place / "coco"), "--json", str(tmp_path / "eval.json")]) == 0
    assert "3 images, 6 objects" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval.json").read_text())["classes"] == CLASSES
    assert main(["predict", segmenter, str(place / "maps/images"), "--out", str(tmp_path / "maps"), "--flip"]) == 0
    assert "3 images" in capsys.readouterr().out and len(labels_of(tmp_path / "maps")) == 3

    def refused(told: str, *words: str) -> None:
        assert main(list(words)) == 2
        assert told in capsys.readouterr().err

    images = str(place / "maps/images")
    refused("a sliding window (--crop) is for segmentation", "eval", detector, "--crop", "32")
    refused("does not say which images it was trained on", "eval", segmenter)
    refused("--top 3 is for classifiers", "predict", detector, images, "--top", "3")
    with pytest.raises(UserError, match="is of task=segment and no classifier"):
        predict(segmenter, [images])


def test_a_file_that_says_too_little_is_refused(place: Path) -> None:
    metadata = load(place / "semantic_fpn/any.onnx").metadata

    def refused(told: str, **said: Any) -> None:
        with pytest.raises(UserError, match=told):
            of_file(Engine(Path("m.onnx"), "onnx", Opened(lambda images: [images], metadata | said)))

    refused(r"m.onnx does not say how its images are prepared \(fit, std\)", preprocessing={"mean": [0, 0, 0]})
    refused("m.onnx does not name its classes", classes=[])


def test_a_classifier_is_sent_elsewhere(tmp_path: Path) -> None:
    model = muntin.create_model("swin_t", num_classes=2, **BACKBONE)
    preprocessing = {key: value for key, value in PREPROCESSING.items() if key not in ("fit", "palette")}
    save_model(tmp_path / "model.safetensors", model, classes=CLASSES, preprocessing=preprocessing)
    with pytest.raises(UserError, match="is a classifier; call muntin.tasks.predict"):
        predict_dense(tmp_path, [tmp_path], tmp_path / "out")


def test_a_bench_measures_what_an_engine_takes(place: Path, tmp_path: Path) -> None:
    folder = saved("retinanet", tmp_path / "run")
    quick: dict[str, Any] = {"size": 48, "rounds": 2, "seconds": 0.01, "progress": False}
    report = bench(str(folder), [1, 2], engine=["eager", "compile"], **quick)
    assert [(row.engine, row.batch) for row in report.rows] == [("eager", 1), ("eager", 2)]
    (told,) = report.skipped
    assert "(compile): a detector's steps hang on what it finds" in told
    assert json.loads((folder / "bench.json").read_text())["rows"]
    file = bench([str(place / "retinanet/one.xml")], [1, 2], **quick)
    assert [(row.engine, row.batch, row.height) for row in file.rows] == [("openvino", 1, 48)]
    assert "is a detector for one image at a time and got 2" in file.skipped[0]
    with pytest.raises(UserError, match="nothing was measured: .*compile.*see optimize and onnx"):
        bench("retinanet:efficientvit_m0", engine="compile", **quick)


def test_a_head_and_a_model_are_exported_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is a model's name, without weights: give --weights FILE"):
        sources.open_source("semantic_fpn:efficientvit_m0", sources.Weights())
    source = sources.open_source("semantic_fpn:efficientvit_m0", sources.Weights(random=True), (64, 96))
    assert source.stem == "semantic_fpn-efficientvit_m0" and source.model.num_classes == 150
    assert source.preprocessing["fit"] == {"shorter": 64, "longer": 256}
    torch.save(source.model.state_dict(), tmp_path / "whole.pth")
    loaded = sources.open_source("semantic_fpn:efficientvit_m0", sources.Weights(str(tmp_path / "whole.pth")))
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    backbone = {k: v for k, v in source.model.state_dict().items() if k.startswith("backbone")}
    torch.save(backbone, tmp_path / "backbone.pth")

    def refused(told: str, *words: str) -> None:
        assert main(["export", *words]) == 2
        assert told in capsys.readouterr().err

    refused("would stay random", "semantic_fpn:efficientvit_m0", "--weights", str(tmp_path / "backbone.pth"))
    refused("published weights of swin_t are a classifier's", "mask_rcnn:swin_t", "--pretrained")
    refused("did you mean 'mask_rcnn'", "mask_rcn:swin_t", "--random-weights")
    refused("did you mean", "mask_rcnn:swin_tt", "--random-weights")
    refused("exported whole: leave --backbone out", "mask_rcnn:swin_t", "--random-weights", "--backbone")
