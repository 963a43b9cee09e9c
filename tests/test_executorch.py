"""ExecuTorch: files run in its own runtime and compared; constants of a fixed graph; refusals."""

import importlib.util
import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from conftest import settle
from muntin.cli import main
from muntin.errors import UserError
from muntin.models import FAMILIES
from muntin.runtime import export, load
from muntin.runtime.constants import fold_constants
from muntin.runtime.targets import Job, executorch
from test_models import families, tiny

needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="executorch is not here: it pins many packages, so `make test-executorch` has an environment of its own",
)

PREPROCESSING: dict[str, Any] = {"size": [72, 88], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
CLASSES = [f"class {i}" for i in range(9)] + ["Übergröße & <bone>"]


class Toy(nn.Module):
    """Smallest thing that exports, with an operation of one's choice inside."""

    num_classes = 3

    def __init__(self, inside=torch.relu):
        super().__init__()
        self.conv, self.fc, self.inside = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), inside

    def forward(self, x):
        return self.fc(self.inside(self.conv(x)).mean((2, 3)))


@needs_tools
@families()
def test_every_family_runs_at_its_size(family, randomise, tmp_path):
    model = settle(randomise(tiny(family))).eval()
    report = export(model, tmp_path / "m.pte", fixed=(2, 61, 83), progress=False)
    assert report.result == "passed" and report.max_error < 2e-5
    assert len(report.checks) >= 3 and {(c.batch, c.height, c.width) for c in report.checks} == {(2, 61, 83)}
    by_place = {
        place: sum(n for name, n in report.nodes.items() if name.startswith(place))
        for place in ("xnnpack.", "portable.")
    }
    assert sum(by_place.values()) == sum(report.nodes.values())
    assert by_place["xnnpack."] > 4 * by_place["portable."]
    assert not any(name in report.nodes for name in ("portable.linear", "portable.addmm", "portable.convolution"))
    assert f"XNNPACK takes {by_place['xnnpack.']} of {sum(report.nodes.values())} operations" in report.notes[0]


@needs_tools
def test_the_command_works_in_this_environment(tmp_path, capsys):
    out = tmp_path / "m.pte"
    assert main(["export", "swin_free_digits", "--random-weights", "--to", "executorch", "--out", str(out)]) == 0
    assert out.is_file() and "passed" in capsys.readouterr().out


@needs_tools
def test_a_backbone_with_names_classes_and_another_size(tmp_path, randomise):
    backbone = settle(randomise(FAMILIES[0].BACKBONE(FAMILIES[0].TINY))).eval()
    export(backbone, tmp_path / "m.pte", fixed=(1, 64, 96), progress=False)
    engine = load(tmp_path / "m.pte")
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for found, wanted in zip(engine(image), backbone(image), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="64"):
        engine(torch.randn(1, 3, 64, 97))


@needs_tools
def test_bytes_in_and_metadata_back(tmp_path, randomise):
    model = settle(randomise(tiny(FAMILIES[2]))).eval()
    report = export(
        model, tmp_path / "m.pte", classes=CLASSES, preprocessing=PREPROCESSING, with_preprocessing=True, progress=False
    )
    assert report.fixed == (1, 72, 88) and report.max_error < 1e-4
    engine = load(tmp_path / "m.pte")
    assert engine.classes == CLASSES and engine.name == "tiny"
    assert engine.preprocessing["mean"] == PREPROCESSING["mean"]
    assert engine(torch.zeros(1, 72, 88, 3, dtype=torch.uint8)).shape == (1, 10)


@needs_tools
def test_what_it_lacks_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match="ExecuTorch cannot express this model.*erfinv"):
        export(Toy(lambda x: torch.erfinv(x.tanh())), tmp_path / "m.pte", fixed=(1, 8, 8), progress=False)
    assert list(tmp_path.iterdir()) == []


@needs_tools
def test_a_foreign_file(tmp_path):
    (tmp_path / "m.pte").write_bytes(b"not a program")
    with pytest.raises(UserError, match="m.pte is not an ExecuTorch file"):
        load(tmp_path / "m.pte")


def job(precision: str = "float32") -> Job:
    image = torch.zeros(1, 3, 8, 8)
    return Job(Toy().eval(), image, (1, 8, 8), precision, {}, ("logits",), 20)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_other_precisions_are_refused_with_the_reason(precision, tmp_path):
    with pytest.raises(UserError, match=f"no ExecuTorch export in {precision}: .*; choose float32"):
        executorch.write(job(precision), tmp_path / "m.pte")


def test_without_the_package_the_install_line_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(UserError, match=r"executorch.*environment of its own.*pip install 'muntin\[executorch\]'"):
        executorch.write(job(), tmp_path / "m.pte")
    (tmp_path / "m.pte").write_bytes(b"")
    with pytest.raises(UserError, match=r"m.pte needs the package executorch.*muntin\[executorch\]"):
        executorch.open(tmp_path / "m.pte")


def depends(program: torch.export.ExportedProgram) -> list[bool]:
    """For each operation whether it depends on the image."""
    marked = {node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs}
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            found.append(any(given in marked for given in node.all_input_nodes))
            marked.add(node)
    return found


@families()
def test_nothing_is_left_that_does_not_depend_on_the_image(family, randomise):
    model = settle(randomise(tiny(family))).eval().requires_grad_(False)
    before = json.dumps({name: value.double().sum().item() for name, value in model.state_dict().items()})
    image = torch.randn(2, 3, 61, 83)
    traced = torch.export.export(model, (image,), strict=False)
    folded = fold_constants(traced, image)
    found = depends(folded)
    assert found and all(found) and not all(depends(traced))
    torch.testing.assert_close(folded.module()(image), model(image), atol=2e-4, rtol=1e-4)
    after = json.dumps({name: value.double().sum().item() for name, value in model.state_dict().items()})
    assert before == after  # constants are computed beside the weights, not in them
