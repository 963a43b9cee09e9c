"""Core ML: what the file holds is the model, checked without Core ML; what cannot be expressed is refused."""

import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muntin
from conftest import settle
from muntin.cli import main
from muntin.errors import UserError
from muntin.runtime import ExportError, export, load
from muntin.runtime.targets import Job, coreml, mil
from test_models import families, tiny

needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None,
    reason="coremltools is not here: it needs numpy below 2.4, so `make test-coreml` has an environment of its own",
)
elsewhere = pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here: the file is run and compared")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning"  # coremltools leaves its temporary folder to the collector
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


def conversion_error(report: Any) -> float:
    return float(report.notes[0].rpartition(" by ")[2])


def spec_of(path: Any) -> Any:
    import coremltools

    return coremltools.utils.load_spec(str(path))


@needs_tools
@families()
def test_every_family_converts_and_keeps_its_numbers(family, randomise, tmp_path):
    model = settle(randomise(tiny(family))).eval()
    report = export(model, tmp_path / "m.mlpackage", fixed=(2, 61, 83), progress=False)
    assert conversion_error(report) < 2e-5 and report.max_rank <= 5 and report.fixed == (2, 61, 83)
    assert not {"batch_norm", "cond", "while_loop"} & report.nodes.keys()
    assert report.nodes["softmax"] >= 4 and "const" not in report.nodes
    assert report.bytes > 0 and (tmp_path / "m.mlpackage").is_dir()


@needs_tools
@families()
def test_backbones_return_one_output_for_each_map(family, randomise, tmp_path):
    backbone = settle(randomise(family.BACKBONE(family.TINY))).eval()
    report = export(backbone, tmp_path / "m.mlpackage", fixed=(1, 64, 96), progress=False)
    assert conversion_error(report) < 2e-5
    outputs = spec_of(report.path).description.output
    assert [o.name for o in outputs] == [f"map{i}" for i in range(len(backbone.channels))]


@needs_tools
@families()
def test_half_precision(family, randomise, tmp_path):
    model = settle(randomise(tiny(family))).eval()
    whole, half = (
        export(model, tmp_path / f"{p}.mlpackage", fixed=(1, 64, 64), precision=p, progress=False)
        for p in ("float32", "float16")
    )
    assert conversion_error(whole) < 2e-5 < conversion_error(half) < 2e-2
    assert half.bytes < whole.bytes
    given = spec_of(half.path).description
    kinds = {value.type.multiArrayType.dataType for value in (*given.input, *given.output)}
    assert len(kinds) == 1  # in and out stay float32
    assert kinds == {spec_of(whole.path).description.input[0].type.multiArrayType.dataType}


@needs_tools
@elsewhere
def test_what_was_not_run_is_never_said_to_have_passed(tmp_path):
    report = export(Toy(), tmp_path / "toy.mlpackage", fixed=(1, 8, 8), progress=False)
    assert report.result == "not run" and report.not_run == "Core ML runs on macOS"
    assert report.checks == [] and report.max_error is None
    assert "not run: Core ML runs on macOS" in str(report) and "passed" not in str(report)
    with pytest.raises(UserError, match=r"toy.mlpackage.*Core ML runs on macOS"):
        load(report.path)


@needs_tools
def test_names_sizes_and_metadata(tmp_path):
    model = tiny(muntin.models.FAMILIES[0])
    report = export(model, tmp_path / "m.mlpackage", classes=CLASSES, preprocessing=PREPROCESSING, progress=False)
    spec = spec_of(report.path)
    (given,), (output,) = spec.description.input, spec.description.output
    assert given.name == "image" and list(given.type.multiArrayType.shape) == [1, 3, 72, 88]
    assert output.name == "logits" and list(output.type.multiArrayType.shape) == [1, 10]
    metadata = dict(spec.description.metadata.userDefined)
    assert json.loads(metadata["classes"]) == CLASSES and metadata["model"] == "tiny"
    assert json.loads(metadata["preprocessing"])["mean"] == PREPROCESSING["mean"]
    assert sorted(p.name for p in report.path.iterdir()) == ["Data", "Manifest.json"]


@needs_tools
def test_the_command_works_in_this_environment(tmp_path, capsys):
    out = tmp_path / "m.mlpackage"
    assert main(["export", "swin_free_digits", "--random-weights", "--to", "coreml", "--out", str(out)]) == 0
    assert out.is_dir() and "Core ML" in capsys.readouterr().out


@needs_tools
def test_with_preprocessing_inside_it_takes_an_image(tmp_path, randomise):
    model = settle(randomise(tiny(muntin.models.FAMILIES[2]))).eval()
    options: dict[str, Any] = {"preprocessing": PREPROCESSING, "with_preprocessing": True, "progress": False}
    report = export(model, tmp_path / "m.mlpackage", **options)
    kind = spec_of(report.path).description.input[0].type
    assert kind.WhichOneof("Type") == "imageType"
    assert (kind.imageType.height, kind.imageType.width) == (72, 88)
    assert conversion_error(report) < 2e-5
    with pytest.raises(UserError, match="holds one image.*batch 2"):
        export(model, tmp_path / "two.mlpackage", fixed=(2, 72, 88), **options)
    assert [p.name for p in tmp_path.iterdir()] == ["m.mlpackage"]


@needs_tools
@pytest.mark.parametrize(
    ("inside", "words"),
    [
        (lambda x: torch.erfinv(x.tanh()), "erfinv"),
        (lambda x: x.reshape(2, 2, 2, 4, 2, 4).permute(3, 0, 5, 2, 4, 1).sin().reshape(1, 4, 8, 8), "rank"),
    ],
)
def test_what_core_ml_lacks_is_named(inside, words, tmp_path):
    with pytest.raises(UserError, match=f"Core ML cannot express this model.*{words}"):
        export(Toy(inside), tmp_path / "m.mlpackage", fixed=(1, 8, 8), progress=False)
    assert list(tmp_path.iterdir()) == []


@needs_tools
def test_another_operation_is_written_and_said_to_be_unchecked(tmp_path):
    report = export(Toy(torch.floor), tmp_path / "m.mlpackage", fixed=(1, 8, 8), progress=False)
    assert "not checked" in report.notes[0] and "floor" in report.notes[0]


@needs_tools
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "m.mlpackage"
    export(Toy(), path, fixed=(1, 8, 8), progress=False)
    before = (path / "Manifest.json").read_bytes()
    monkeypatch.setitem(mil.OPERATIONS, "relu", lambda a: a["x"].relu() + 0.1)
    with pytest.raises(ExportError, match="Core ML file.*differ from the model"):
        export(Toy(), path, fixed=(1, 8, 8), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.mlpackage"]
    assert (path / "Manifest.json").read_bytes() == before


def job(precision: str = "float32") -> Job:
    image = torch.zeros(1, 3, 8, 8)
    return Job(Toy().eval(), image, (1, 8, 8), precision, {}, ("logits",), 20)


def test_bfloat16_is_refused(tmp_path):
    with pytest.raises(UserError, match="float32 or float16, not in bfloat16"):
        coreml.write(job("bfloat16"), tmp_path / "m.mlpackage")


def test_without_the_package_the_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UserError, match=r"coremltools.*environment of its own.*pip install 'muntin\[coreml\]'"):
        coreml.write(job(), tmp_path / "m.mlpackage")


def test_a_numpy_that_it_fails_with_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", SimpleNamespace())
    monkeypatch.setattr("numpy.__version__", "2.4.1")
    with pytest.raises(UserError, match=r"cannot convert with numpy 2\.4\.1"):
        coreml.write(job(), tmp_path / "m.mlpackage")


class Var:
    """A value of a program: `val` where it is constant."""

    def __init__(self, val: Any = None, kind: str = "fp32") -> None:
        self.val = val
        self.dtype = type(kind, (), {})


def program(operation: str, kind: str = "fp32", outputs: int = 1, **constants: Any) -> Any:
    """One operation on the input."""
    image, found = Var(), [Var(kind=kind) for _ in range(outputs)]
    inputs = {"x": image} | {name: Var(value) for name, value in constants.items()}
    op = SimpleNamespace(op_type=operation, inputs=inputs, outputs=found)
    main = SimpleNamespace(inputs={"image": image}, operations=[op], outputs=found)
    return SimpleNamespace(functions={"main": main})


def array(*values: Any) -> Any:
    import numpy as np

    return np.array(values)


X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("operation", "constants", "wanted"),
    [
        ("pad", {"pad": array(0, 0, 0, 0, 1, 2, 3, 4)}, F.pad(X, (3, 4, 1, 2))),
        ("gather", {"indices": array([2, -1], [0, 1]), "axis": 1}, X[:, [[2, 2], [0, 1]]]),
        (
            "slice_by_index",
            {"begin": array(0, 1, 0, 1), "end": array(0, 2, 4, 5), "stride": array(1, 1, 1, 2)}
            | {"begin_mask": array(True, False, True, False), "end_mask": array(True, False, True, False)}
            | {"squeeze_mask": array(False, True, False, False)},
            X[:, 1, :, 1:5:2],
        ),
        ("reduce_l2_norm", {"axes": array(-1), "keep_dims": True}, X.norm(dim=-1, keepdim=True)),
        ("expand_dims", {"axes": array(0, -1)}, X[None, ..., None]),
        ("reshape", {"shape": array(0, -1)}, X.reshape(2, -1)),
        ("layer_norm", {"axes": array(-1), "epsilon": 0.1}, F.layer_norm(X, (6,), eps=0.1)),
        ("matmul", {"y": X.numpy(), "transpose_x": True}, X.mT @ X),
        ("gelu", {"mode": "TANH_APPROXIMATION"}, F.gelu(X, approximate="tanh")),
        (
            "conv",
            {"weight": X[..., :3].numpy(), "pad_type": "custom", "pad": array(1, 0, 0, 2), "strides": array(1, 2)},
            F.conv2d(F.pad(X, (0, 2, 1, 0)), X[..., :3], stride=(1, 2)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operations_are_core_mls(operation: str, constants: dict[str, Any], wanted: Tensor) -> None:
    torch.testing.assert_close(mil.evaluate(program(operation, **constants), X), [wanted])


def test_several_outputs_and_half_precision() -> None:
    found = mil.evaluate(program("split", outputs=3, axis=1, num_splits=3), X)
    assert all(torch.equal(f, w) for f, w in zip(found, X.split(1, 1), strict=True))
    (half,) = mil.evaluate(program("mul", kind="fp16", y=1e5), X)
    assert half.isinf().any() and half.dtype == torch.float32  # overflow shows


def test_an_operation_that_is_not_computed_here_is_named() -> None:
    with pytest.raises(mil.Unknown, match="resample"):
        mil.evaluate(program("resample"), X)
