"""Every engine behind one call: the same kind in and out, metadata, and refusals that say what to do."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import muntin
from conftest import error_of, settle
from muntin.errors import UserError
from muntin.models import FAMILIES, efficientvit, rmt, swinv2
from muntin.runtime import ExportError, fold, load
from muntin.runtime.export import export
from muntin.runtime.inputs import normalised
from muntin.runtime.placing import check_writable, placed
from test_export import CLASSES, PREPROCESSING, Toy
from test_models import small, tiny

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ENGINES = {"onnx": "onnx", "xml": "openvino", "pt2": "pt2"}
SIZES: Any = {"sizes": [(8, 9), (16, 12)], "batches": [1, 3]}
every = pytest.mark.parametrize("suffix", ENGINES)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, Any]:
    """A small model and its file for every engine."""
    torch.manual_seed(0)
    model = Toy().eval()
    folder = tmp_path_factory.mktemp("toys")
    for suffix in ENGINES:
        export(
            model, folder / f"m.{suffix}", classes=CLASSES, preprocessing=PREPROCESSING, progress=False, **SIZES
        )  # fmt: skip
    return {"model": model} | {suffix: folder / f"m.{suffix}" for suffix in ENGINES}


@every
def test_the_same_kind_in_and_out(toys, suffix):
    engine = load(toys[suffix])
    images = torch.randn(3, 3, 17, 21)
    found = engine(images)
    with torch.no_grad():
        assert error_of(found, toys["model"](images)) < 1e-5
    given = images.numpy()[:, :, ::-1].copy()[:, :, ::-1]  # not contiguous
    given.flags.writeable = False  # of which torch would warn
    array = engine(given)
    assert isinstance(array, np.ndarray) and np.allclose(array, found.numpy(), atol=1e-6)
    assert engine(images.double()).dtype == torch.float32


@every
def test_what_a_file_says_about_itself(toys, suffix):
    engine = load(toys[suffix])
    assert (engine.engine, engine.name, engine.classes) == (ENGINES[suffix], "Toy", CLASSES)
    assert engine.preprocessing["mean"] == PREPROCESSING["mean"] and engine.preprocessing["size"] == [64, 64]
    assert (engine.precision, engine.layout, engine.fixed) == ("float32", "NCHW", None)
    assert engine.metadata["dtype"] == "float32" and engine.metadata["outputs"] == ["logits"]


def test_a_pt2_file_holds_no_image(tmp_path):
    """torch.export keeps the example that it traced, megabytes of it."""
    report = export(Toy(), tmp_path / "m.pt2", sizes=[(224, 224)], batches=[1], progress=False)
    assert report.bytes < 200_000


@every
def test_images_of_another_kind_are_refused(toys, suffix):
    engine = load(toys[suffix])
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(UserError, match="batch, 3, height, width"):
            engine(wrong)
    with pytest.raises(UserError, match="uint8.*normalise them first"):
        engine(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(("family", "suffix"), [(f, "onnx") for f in FAMILIES] + [(swinv2, "pt2"), (rmt, "xml")])
def test_every_family_at_one_odd_size(family, suffix, randomise, tmp_path):
    """A graph of one size: few nodes, no index arithmetic left in it, and nothing but that size goes in."""
    model = settle(randomise(tiny(family))).eval()
    report = export(model, tmp_path / f"m.{suffix}", fixed=(1, 61, 83), progress=False)
    assert report.max_error <= 2e-5 and report.max_rank <= 5 and len(report.checks) == 3
    if suffix == "onnx":
        assert not {"If", "Loop", "NonZero", "Range", "Shape", "Mod", "Div"} & report.nodes.keys() - {
            "Div" if family is swinv2 else ""
        }  # of cosines
        assert sum(report.nodes.values()) <= 400
        kinds = [type(module) for module in fold(model).modules()]
        assert report.nodes.get("LayerNormalization", 0) == kinds.count(nn.LayerNorm)
        assert report.nodes.get("Gelu", 0) == kinds.count(nn.GELU)
        assert linear_ranks(report.path) <= {2, 3}
    engine = load(report.path)
    assert engine.fixed == (1, 61, 83)
    for shape in ((2, 3, 61, 83), (1, 3, 83, 61)):
        with pytest.raises(UserError, match=rf"batch 1 at 61x83 and got batch {shape[0]} at {shape[2]}x{shape[3]}"):
            engine(torch.zeros(shape))


def linear_ranks(path: Path) -> set[int]:
    """Dimensions of what is multiplied by a weight."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    return {ranks[node.input[0]] for node in products}


def test_openvino_and_pt2_take_any_size(randomise, tmp_path):
    model = settle(randomise(small(rmt))).eval()
    for suffix in ("xml", "pt2"):
        report = export(model, tmp_path / f"m.{suffix}", preprocessing={"size": 64}, progress=False)
        assert len({(c.height, c.width) for c in report.checks}) >= 4 and len({c.batch for c in report.checks}) >= 3
        assert report.max_error <= 2e-5 and report.max_rank <= 5
        images = torch.randn(4, 3, 70, 131)
        with torch.no_grad():
            assert error_of(load(report.path)(images), model(images)) < 2e-5


def test_the_least_side_of_a_program_is_measured(tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(4)))

        def forward(self, x):
            return self.convs(x).mean((2, 3))

    report = export(Deep(), tmp_path / "m.pt2", sizes=[(5, 16), (20, 21)], batches=[1, 2], progress=False)
    engine = load(report.path)
    assert report.least_side == engine.least_side == engine.metadata["least_side"]
    least = report.least_side
    assert 9 <= least <= 16 and {(c.height, c.width) for c in report.checks} == {(least, 16), (20, 21)}
    assert engine(torch.zeros(1, 3, least, least)).shape == (1, 3)
    with pytest.raises(UserError, match=f"takes images from {least} pixels a side and got {least - 1}x32"):
        engine(torch.zeros(1, 3, least - 1, 32))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@every
def test_precisions(suffix, precision, randomise, tmp_path):
    model = settle(randomise(tiny(efficientvit))).eval()
    report = export(model, tmp_path / f"m.{suffix}", precision=precision, fixed=(2, 64, 48), progress=False)
    assert 1e-5 < report.max_error <= report.tolerance == {"float16": 3e-2, "bfloat16": 1.5e-1}[precision]
    engine = load(report.path)
    found = engine(torch.randn(2, 3, 64, 48))
    assert engine.precision == report.precision == precision and found.dtype == torch.float32
    # ONNX Runtime's CPU has no bfloat16 convolution: OpenVINO runs such a file
    elsewhere = suffix == "onnx" and precision == "bfloat16"
    assert engine.engine == ("openvino" if elsewhere else ENGINES[suffix])
    assert report.engine == ("OpenVINO" if elsewhere or suffix == "xml" else report.engine)
    weights = sum(p.numel() for p in model.parameters())
    stored = report.path.with_suffix(".bin") if suffix == "xml" else report.path
    if suffix != "pt2":  # whose graph weighs more than so small a model
        assert stored.stat().st_size < 3.3 * weights + 300_000


def test_no_token_is_misplaced_in_bfloat16(randomise, tmp_path):
    """Integers that a runtime in bfloat16 computes as floats are off beyond 256, quotients before."""
    model = settle(randomise(muntin.create_model("swin_t", 10, depths=(2,), heads=(3,)))).eval()
    report = export(
        model, tmp_path / "m.xml", precision="bfloat16", sizes=[(224, 224), (56, 84), (64, 96)], batches=[1],
        progress=False,
    )  # fmt: skip
    assert report.max_error < 0.03  # 0.01; with windows found by division 0.07


def test_float32_is_not_computed_in_bfloat16(toys):
    """OpenVINO's own choice on machines with bfloat16 instructions."""
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert error_of(load(toys["xml"])(images), toys["model"](images)) < 1e-5


@every
def test_bytes_in_with_preprocessing_inside(suffix, tmp_path):
    torch.manual_seed(0)
    model = Toy().eval()
    report = export(
        model, tmp_path / f"m.{suffix}", preprocessing=PREPROCESSING, with_preprocessing=True, progress=False, **SIZES
    )  # fmt: skip
    engine = load(report.path)
    assert (engine.layout, engine.dtype, engine.metadata["layout"]) == ("NHWC", torch.uint8, "NHWC")
    assert engine.preprocessing["inside"] is True and "bytes" in str(report)
    images = torch.randint(256, (2, 11, 10, 3), dtype=torch.uint8)
    mean, std = torch.tensor(PREPROCESSING["mean"]), torch.tensor(PREPROCESSING["std"])
    by_hand = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(normalised(images, PREPROCESSING), by_hand)
    with torch.no_grad():
        assert error_of(engine(images), model(by_hand)) < 1e-5
    with pytest.raises(UserError, match="bytes: it normalises itself"):
        engine(images.float())
    with pytest.raises(UserError, match=r"takes \(batch, height, width, 3\) bytes"):
        engine(images.permute(0, 3, 1, 2))


def test_preprocessing_must_say_mean_and_std(tmp_path):
    with pytest.raises(UserError, match="needs the mean"):
        export(Toy(), tmp_path / "m.onnx", with_preprocessing=True)


@every
def test_a_backbone_returns_its_maps(suffix, randomise, tmp_path):
    backbone: Any = settle(randomise(efficientvit.BACKBONE(efficientvit.TINY, out_indices=(1, 2)))).eval()
    report = export(backbone, tmp_path / f"b.{suffix}", fixed=(1, 96, 65), progress=False)
    engine = load(report.path)
    images = torch.randn(1, 3, 96, 65)
    with torch.no_grad():
        wanted = backbone(images)
    found = engine(images)
    assert isinstance(found, list) and len(found) == 2
    assert all(error_of(f, w) < 2e-5 for f, w in zip(found, wanted, strict=True))
    assert all(isinstance(array, np.ndarray) for array in engine(images.numpy()))
    assert engine.metadata["outputs"] == ["map0", "map1"]
    assert engine.metadata["strides"] == list(backbone.strides)
    assert engine.metadata["channels"] == list(backbone.channels)


def test_someone_elses_model_at_one_size(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    size = model.default_cfg["input_size"][1]
    for suffix in ("onnx", "xml"):
        report = export(model, tmp_path / f"m.{suffix}", fixed=(2, size, size), progress=False)
        assert report.max_error <= 1e-4 and load(report.path).fixed == (2, size, size)


@pytest.mark.parametrize("suffix", ["xml", "pt2", "onnx"])
def test_a_file_that_is_no_model(suffix, tmp_path):
    path = tmp_path / f"junk.{suffix}"
    path.write_bytes(b"not a graph")
    with pytest.raises(UserError, match=rf"junk\.{suffix} is not .*export it again"):
        load(path)


@pytest.mark.parametrize(("suffix", "package"), [("onnx", "onnxruntime"), ("xml", "openvino")])
def test_a_missing_package_gets_its_install_line(toys, suffix, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}; .*pip install 'muntin\[export\]'"):
        load(toys[suffix])


def test_both_files_of_openvino_stay_as_they_were(tmp_path):
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_bytes(b"earlier")
    with pytest.raises(ExportError, match="OpenVINO differs"):
        export(Toy(), tmp_path / "m.xml", tolerance=0.0, progress=False, **SIZES)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.xml": b"earlier", "m.bin": b"earlier"}


def test_folders_are_placed_whole_or_not_at_all(tmp_path):
    final = tmp_path / "m.mlpackage"
    final.mkdir()
    (final / "old").write_text("old")
    check_writable(final, folder=True)

    def fill(partial: Path) -> None:
        partial.mkdir()
        (partial / "new").write_text("new")

    with pytest.raises(ExportError), placed(final) as partial:
        fill(partial)
        raise ExportError("wrong")
    assert os.listdir(tmp_path) == ["m.mlpackage"] and os.listdir(final) == ["old"]
    with placed(final) as partial:
        fill(partial)
    assert os.listdir(tmp_path) == ["m.mlpackage"] and os.listdir(final) == ["new"]


class Bits(Toy):
    def forward(self, x):
        return super().forward(torch.bitwise_and((x * 9).long(), 7).float())


class Branch(Toy):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Decomposed(Toy):
    def forward(self, x):
        return torch.linalg.svdvals(x[:, 0])[:, :3]


def test_tensorrt_takes_batch_norms_that_are_not_folded(tmp_path):
    model = muntin.create_model("swin_t", 5, dim=16, depths=(1,), heads=(1,), norm="batch").eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    report = export(model, tmp_path / "m.engine", preprocessing={"size": 64}, progress=False)
    assert report.result in ("not run", "passed")


class OneSize(Toy):
    def forward(self, x):
        assert x.shape[2] == 32
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        (Bits, "m.engine", "TensorRT cannot express this model.*BitwiseAnd"),
        (Decomposed, "m.onnx", "ONNX cannot express this model.*svd"),
        (Branch, "m.pt2", r"data-dependent.*test_engines.py:\d+: .*values of a tensor"),
        (OneSize, "m.xml", r"height.*constant.*fixed=\(batch, height, width\)"),
    ],
)
def test_what_a_target_cannot_express_is_named(model, name, words, tmp_path, capfd):
    with pytest.raises(UserError, match=words):
        export(model(), tmp_path / name, preprocessing={"size": 32}, progress=False)
    assert list(tmp_path.iterdir()) == [] and "def forward" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fixed": (0, 8, 8)}, r"give \(batch, height, width\)"),
        ({"fixed": (1, 8, 8), "sizes": [(9, 9)]}, "batch 1 at 8x8 alone"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export(Toy(), tmp_path / "m.onnx", **options)


def test_tensorrt_without_tensorrt(tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "m.engine"
    report = export(Toy(), path, precision="bf16", preprocessing={"size": [40, 48]}, progress=False)
    if report.not_run is None:
        pytest.skip("TensorRT is here")
    assert report.result == "not run" and report.checks == [] and report.max_error is None
    assert "passed" not in str(report) and json.loads(report.json())["result"] == "not run"
    assert [p.name for p in tmp_path.iterdir()] == ["m.engine.onnx"] and report.path.name == "m.engine.onnx"
    (line,) = report.notes
    assert line == (
        "build it with: trtexec --onnx=m.engine.onnx --saveEngine=m.engine --minShapes=image:1x3x32x32 "
        "--optShapes=image:8x3x40x48 --maxShapes=image:32x3x80x96 --bf16"
    )
    assert "Shapes" not in export(Toy(), path, fixed=(1, 8, 8), progress=False).notes[0]
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot run here: TensorRT"):
        load(path)


def test_a_report_of_one_size_says_so(tmp_path):
    assert "float32, 2x8x12, " in str(export(Toy(), tmp_path / "m.onnx", fixed=(2, 8, 12), progress=False))
    assert "any batch, height and width" in str(export(Toy(), tmp_path / "m.onnx", progress=False, **SIZES))
    assert muntin.export is export
