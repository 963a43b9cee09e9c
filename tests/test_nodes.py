"""Nodes of norms and activations in exported graphs: known answers for single layers, and for small models."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import muntin
from muntin.measure.nodes import LAYERS, OURS, WRITTEN_OUT, NodeReport, _alone, exported, graph_of, nodes
from muntin.runtime.tracing import quiet

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

TINY: dict[str, Any] = {"dim": 16, "depths": (1, 2), "heads": (1, 2), "window": (7, 4)}
ALONE = _alone()


def _older(module: nn.Module, opset: int) -> list[str]:
    """The operators that the exporter without torch.export writes for a module, constants left out."""
    file = io.BytesIO()
    with quiet():
        torch.onnx.export(module.eval(), (torch.randn(2, 4, 8),), file, opset_version=opset, dynamo=False)
    kinds = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    return [kind for kind in kinds if kind not in ("Constant", "Identity")]


@pytest.fixture(scope="module")
def alone():
    return {
        (name, form): graph_of(name, ALONE[name], (16, 16), form) for name in LAYERS for form in (WRITTEN_OUT, OURS)
    }


@pytest.mark.parametrize(("layer", "form", "count"), [
    ("LayerNorm", WRITTEN_OUT, 9), ("LayerNorm", OURS, 1),
    ("GELU", WRITTEN_OUT, 5), ("GELU", OURS, 1),
    ("BatchNorm", WRITTEN_OUT, 1), ("BatchNorm", OURS, 0),
    ("ReLU", WRITTEN_OUT, 1), ("ReLU", OURS, 1),
])  # fmt: skip
def test_what_a_layer_becomes(alone, layer, form, count):
    graph = alone[layer, form]
    assert graph.layers == {name: int(name == layer) for name in LAYERS}
    assert graph.exported.layers[layer] == count == graph.exported.total - 2  # between two convolutions
    assert sum(graph.exported.layers.values()) == count


@pytest.mark.parametrize(("layer", "count"), [("LayerNorm", 1), ("GELU", 1), ("BatchNorm", 0), ("ReLU", 0)])
@pytest.mark.parametrize("form", [WRITTEN_OUT, OURS])
def test_onnx_runtime_joins_what_was_written_out(alone, layer, count, form):
    assert alone[layer, form].optimised["ONNX Runtime"].layers[layer] == count


@pytest.mark.parametrize(("layer", "count"), [("GELU", 0), ("BatchNorm", 0), ("ReLU", 0)])
def test_openvino_puts_activations_and_batch_norm_into_the_convolution(alone, layer, count):
    assert alone[layer, WRITTEN_OUT].optimised["OpenVINO"].layers[layer] == count
    assert alone["LayerNorm", OURS].optimised["OpenVINO"].layers["LayerNorm"] >= 1


@pytest.mark.parametrize(("layer", "opset"), [("LayerNorm", 16), ("GELU", 19)])
def test_written_out_is_what_older_opsets_hold(alone, layer, opset):
    module = nn.LayerNorm(8) if layer == "LayerNorm" else nn.GELU()
    written = exported(ALONE[layer], (16, 16), WRITTEN_OUT).graph.node
    assert [node.op_type for node in written if node.name.startswith(f"{layer}.")] == _older(module, opset)
    assert len(_older(module, 20)) == 1


@pytest.mark.parametrize("name", ["swin_t", "swin_free_t_br"])
def test_both_forms_compute_what_the_model_computes(name):
    model = muntin.create_model(name, num_classes=5, **TINY).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    for form in (WRITTEN_OUT, OURS):
        proto = exported(model, (64, 64), form)
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            wanted = model(image).numpy()
        (got,) = session.run(None, {"image": image.numpy()})
        assert np.abs(got - wanted).max() <= 1e-4 * wanted.std()


def test_a_model_has_a_node_for_each_layer_or_nine():
    graph = graph_of("swin", muntin.create_model("swin_t", num_classes=5, **TINY), (64, 64), WRITTEN_OUT)
    norms, gelus = graph.layers["LayerNorm"], graph.layers["GELU"]
    assert (norms, gelus) == (1 + 3 * 2 + 1 + 1, 3)  # after the patches, two in each block, merging, at the end
    assert graph.exported.layers == {"LayerNorm": 9 * norms, "GELU": 5 * gelus, "BatchNorm": 0, "ReLU": 0}
    assert graph.optimised["ONNX Runtime"].layers["LayerNorm"] == norms
    assert graph.optimised["ONNX Runtime"].layers["GELU"] == gelus


def test_the_report_shows_layers_files_and_runtimes(alone):
    report = NodeReport(list(alone.values()))
    lines = str(report).splitlines()
    assert lines[2].split() == ["LayerNorm", "layers", "1", "-", "-", "-"]
    assert lines[3].split() == ["written", "out", "the", "file", "11", "9", "-", "-", "-"]
    assert report.json()[0]["exported"]["operators"]["ReduceMean"] == 2


def test_an_unknown_model():
    with pytest.raises(muntin.errors.UserError, match="swin_t"):
        nodes(["swin_tt"])
