"""Exported files: the same numbers at every size and batch, metadata, and nothing left where a check fails."""

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import muntin
from conftest import settle
from muntin.errors import UserError
from muntin.run import save_model
from muntin.runtime import ExportError, load
from muntin.runtime.export import default_sizes, export, verify
from test_models import families, small

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TINY: dict[str, Any] = {"dim": 16, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)}
PREPROCESSING: dict[str, Any] = {
    "size": [64, 64],
    "resize": None,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "channels": "RGB",
}
CLASSES = ["cat", "dog & <bone>", "Übergröße"]


class Toy(nn.Module):
    """Smallest thing that exports."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Swin with shifts in training mode, its file and the report."""
    torch.manual_seed(0)
    model = muntin.create_model("swin_t", num_classes=3, **TINY).train()
    model.head.eval()
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    report = export(model, path, classes=CLASSES, preprocessing=PREPROCESSING, progress=False)
    return model, path, report


def test_it_was_compared_at_many_sizes_and_batches(exported):
    _, path, report = exported
    assert path.is_file() and report.bytes == path.stat().st_size
    assert len({(c.height, c.width) for c in report.checks}) >= 4
    assert len({c.batch for c in report.checks}) >= 3
    assert any(c.height % 2 and c.width % 2 for c in report.checks)
    assert report.max_error <= 1e-5
    assert "passed" in str(report) and f"{report.max_error:.1e}" in str(report)
    assert json.loads(report.json())["max_error"] == report.max_error


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (224, 64), (61, 83)])
def test_sizes_that_were_not_checked_agree_too(exported, size):
    model, path, _ = exported
    assert verify(model, load(path), [size], [1, 4])[0].error < 1e-5


def test_the_model_is_left_as_it_was(exported):
    model, _, _ = exported
    assert model.training and model.backbone.training and not model.head.training


@families()
def test_every_family_at_every_size(family, randomise, tmp_path):
    """Checked at odd and tiny sizes before it is kept; no runtime here meets a tensor above rank 5 or a branch."""
    model = settle(randomise(small(family))).eval()
    report = export(model, tmp_path / "m.onnx", preprocessing={"size": 64}, progress=False)
    assert report.max_error <= 2e-5 and report.max_rank <= 5
    assert not {"If", "Loop", "NonZero", "BatchNormalization"} & report.nodes.keys()


def test_names_and_metadata(exported):
    _, path, _ = exported
    file = onnx.load(path)
    assert [i.name for i in file.graph.input] == ["image"]
    assert [o.name for o in file.graph.output] == ["logits"]
    dims = file.graph.input[0].type.tensor_type.shape.dim
    assert [bool(d.dim_param) for d in dims] == [True, False, True, True]
    metadata = {p.key: p.value for p in file.metadata_props}
    assert metadata["model"] == "swin_t" and metadata["layout"] == "NCHW"
    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["config"])["depths"] == [1, 1, 2, 1]
    assert json.loads(metadata["preprocessing"])["mean"] == PREPROCESSING["mean"]
    assert int(metadata["least_side"]) >= 1
    assert not any(node.metadata_props for node in file.graph.node)  # they would hold paths of this machine


def test_ranks_and_nodes_are_what_runtimes_fuse(exported):
    _, path, report = exported
    file = onnx.load(path)
    inferred = onnx.shape_inference.infer_shapes(file)
    ranks = [len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info]
    ranks += [len(t.dims) for t in file.graph.initializer]
    assert max(ranks) <= 5 and report.max_rank <= 5
    assert report.nodes["LayerNormalization"] == 1 + 2 * 5 + 3 + 1  # stem, blocks, merges, head
    assert report.nodes["Gelu"] == 5
    assert report.nodes["Softmax"] == 5
    assert report.nodes["Conv"] == 1
    assert report.nodes["MatMul"] + report.nodes.get("Gemm", 0) == 5 * 6 + 3 + 1
    assert not {"If", "Loop", "NonZero"} & report.nodes.keys()  # nothing depends on data
    assert sum(report.nodes.values()) == len(file.graph.node)


def test_batch_norm_and_relu_without_shift(tmp_path):
    torch.manual_seed(0)
    model = muntin.create_model("swin_free_t_br", num_classes=3, dim=16, depths=(1, 1), heads=(1, 2), window=(7, 14))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    report = export(model, tmp_path / "br.onnx", sizes=[(64, 64), (61, 83), (33, 70), (7, 5)], progress=False)
    assert report.nodes["Relu"] == 2 and "Gelu" not in report.nodes and "LayerNormalization" not in report.nodes
    assert report.max_rank <= 5


def test_numpy_and_torch_in_and_the_same_out(exported):
    model, path, _ = exported
    engine = load(path)
    images = torch.randn(2, 3, 40, 56)
    found = engine(images)
    assert isinstance(found, torch.Tensor) and found.shape == (2, 3)
    array = engine(images.numpy())
    assert isinstance(array, np.ndarray) and np.array_equal(array, found.numpy())
    assert engine.classes == CLASSES and engine.name == "swin_t"
    assert engine.preprocessing["size"] == [64, 64]
    for wrong in (images[0], images[:, :1], images[:0]):
        with pytest.raises(UserError, match="batch, 3, height, width"):
            engine(wrong)
    with pytest.raises(UserError, match="numpy array or a torch tensor"):
        engine([[1.0]])  # type: ignore[type-var]


def test_a_run_is_an_engine(tmp_path):
    model = muntin.create_model("swin_t", num_classes=3, **TINY).eval()
    save_model(tmp_path / "model.safetensors", model, classes=CLASSES, preprocessing=PREPROCESSING)
    images = torch.randn(2, 3, 40, 40)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        engine = load(path)
        with torch.no_grad():
            torch.testing.assert_close(engine(images), model(images))
        assert engine.classes == CLASSES


def test_a_failed_check_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "toy.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError, match=r"was not written: at batch \d, \d+x\d+ ONNX Runtime differs"):
        export(Toy(), path, tolerance=0.0, sizes=[(8, 9)], batches=[1, 3], progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.onnx"]
    assert path.read_bytes() == b"earlier"


def test_an_engine_that_computes_something_else_is_found_out():
    model = Toy().eval()
    with torch.no_grad():
        reference = {1: model(torch.zeros(1, 3, 8, 8))}
    assert verify(model, lambda x: model(x) + reference[1] * 0, [(8, 8)], [1])[0].error == 0
    assert verify(model, lambda x: model(x) + 0.1, [(8, 8)], [1])[0].error > 1e-2
    with pytest.raises(ExportError, match="returns"):
        verify(model, lambda x: model(x)[:, :2], [(8, 8)], [1])


def test_an_error_inside_a_model_is_not_the_users(tmp_path):
    class Broken(Toy):
        def forward(self, x):
            raise RuntimeError("inside the model")

    with pytest.raises(Exception, match="inside the model") as caught:
        export(Broken(), tmp_path / "m.onnx", progress=False)
    assert not isinstance(caught.value, UserError)
    assert list(tmp_path.iterdir()) == []


def test_loggers_are_put_back(tmp_path):
    before = logging.getLogger("torch.onnx").level
    export(Toy(), tmp_path / "toy.onnx", sizes=[(8, 8)], batches=[1], progress=False)
    assert logging.getLogger("torch.onnx").level == before


@pytest.mark.parametrize("name", ["m.tflite", "m", "m.ONNX.gz"])
def test_an_unknown_suffix_names_the_valid_ones(tmp_path, name):
    with pytest.raises(UserError, match=r"valid are: \.onnx"):
        export(Toy(), tmp_path / name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["a", "b"]}, "2 class names given for a model of 3"),
        ({"sizes": [(0, 4)]}, "at least 1"),
        ({"batches": []}, "at least one"),
    ],
)
def test_bad_arguments(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        export(Toy(), tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write.*file"):
        export(Toy(), tmp_path / "file" / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match="a folder has this name"):
        export(Toy(), tmp_path / "folder.onnx")


def test_a_folder_that_has_the_weights_name_stays(tmp_path):
    (tmp_path / "m.bin").mkdir()
    (tmp_path / "m.bin" / "mine").write_text("kept")
    with pytest.raises(UserError, match="m.bin: a folder has this name"):
        export(Toy(), tmp_path / "m.xml", progress=False)
    assert (tmp_path / "m.bin" / "mine").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_memory_is_asked_for_before_it_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("muntin.measure.memory.available", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"not enough memory: this model at batch 64, 64x64 .* batch \d+ fits"):
        export(Toy(), tmp_path / "m.onnx", fixed=(64, 64, 64), progress=False)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"not enough memory: .* batch \d+ fits"):
        export(Toy(), tmp_path / "m.onnx", fixed=(10_000_000, 224, 224), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_is_not_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="opset 9: PyTorch writes this model in opset 18; give --opset 18"):
        export(Toy(), tmp_path / "m.onnx", opset=9, progress=False)
    assert export(Toy(), tmp_path / "m.onnx", opset=18, sizes=[(8, 9)], batches=[1], progress=False).opset == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_compared_in_float32(tmp_path, dtype):
    model = Toy().to(dtype)
    report = export(model, tmp_path / "m.onnx", sizes=[(8, 9)], batches=[1], progress=False)
    assert report.max_error < 1e-5 and next(model.parameters()).dtype == dtype


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "missing.onnx")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a graph")
    with pytest.raises(UserError, match="junk.onnx is not an ONNX file"):
        load(junk)
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="of a kind that Muntin does not run"):
        load(tmp_path / "model.pt")
    with pytest.raises(UserError, match="checkpoint"):
        load(tmp_path)
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Add", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([node], "g", [value("a", 1, [2]), value("b", 1, [2])], [value("c", 1, [2])])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="foreign.onnx takes a"):
        load(tmp_path / "foreign.onnx")


def test_a_fixed_file_says_what_it_takes(tmp_path):
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("ReduceMean", ["image"], ["logits"], keepdims=0)
    graph = onnx.helper.make_graph([node], "g", [value("image", 1, [1, 3, 8, 8])], [value("logits", 1, [])])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "fixed.onnx")
    with pytest.raises(UserError, match="exported for batch 1 at 8x8 and got batch 1 at 9x8"):
        load(tmp_path / "fixed.onnx")(torch.zeros(1, 3, 9, 8))


def test_default_sizes_hold_odd_and_small_ones():
    for size in ((224, 224), (32, 32), (8, 300)):
        sizes = default_sizes(size)
        assert len(set(sizes)) >= 4 and sizes[0] == size and min(map(min, sizes)) >= 1
        assert any(h % 2 and w % 2 for h, w in sizes)
