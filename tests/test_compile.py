"""`muntin.compile`: equal to the model at every shape, with no more than two graphs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import muntin
from conftest import error_of, settle
from muntin.layers.opaque import OpaqueStage
from muntin.models.classifier import Classifier
from test_models import families, small, tiny

SHAPES = [
    (2, 224, 224),
    (1, 224, 224),
    (5, 96, 160),
    (2, 64, 64),
    (3, 61, 83),
    (1, 448, 320),
    (5, 9, 5),
    (1, 33, 47),
    (2, 32, 32),
    (1, 5, 5),
    (2, 3, 1),
]


class Counting:
    """A backend that counts the graphs that it compiles."""

    def __init__(self, name: str) -> None:
        self.compile = torch._dynamo.lookup_backend(name)
        self.graphs = 0
        self.operators: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        self.operators |= {str(node.target).removesuffix(".default") for node in graph.graph.nodes}
        return self.compile(graph, inputs)


@pytest.fixture
def symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they are where a stage is no operator."""
    monkeypatch.setattr(OpaqueStage, "enroll", lambda stage: None)


@pytest.fixture(autouse=True)
def clean() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class WithMaps(Classifier):
    """Every map of the backbone, and the logits."""

    def forward(self, image: Tensor) -> Any:
        maps: Any = self.backbone(image)
        return [*maps, self.head(maps[-1])]


def check_two_graphs(model: Any, backend: str) -> set[str]:
    """Equal to the model at every shape, within two graphs, whose operators are returned. What folding alone changes is
    tested with folding. With symbols a graph takes half a minute: half of it Dynamo's, where backend "eager" ends.
    """
    folded = muntin.runtime.fold(model)
    counting = Counting(backend)
    fast = muntin.compile(model, backend=counting)
    for batch, height, width in SHAPES:
        image = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            found, wanted = (y if isinstance(y, list) else [y] for y in (fast(image), folded(image)))
            for one, other in zip(found, wanted, strict=True):
                assert error_of(one, other) < 1e-4, (batch, height, width)
    assert counting.graphs == 2
    assert not hasattr(image, "_dynamo_dynamic_indices")  # the caller's tensor bears no marks
    return counting.operators


@pytest.mark.filterwarnings("default")  # the compiler's own
@families()
def test_two_graphs_serve_all_shapes_of_every_family(family: Any, randomise: Any) -> None:
    """On a CPU, where a stage is one operator."""
    assert "muntin.stage" in check_two_graphs(settle(randomise(tiny(family))).eval(), "aot_eager")


@pytest.mark.filterwarnings("default")
@families()
def test_two_graphs_serve_all_shapes_by_symbols(family: Any, randomise: Any, symbols: None) -> None:
    """On other devices without kernels. The maps and the logits of all stages, which are traced once for both."""
    row = small(family).config
    model = WithMaps("small", family.BACKBONE(row), family.HEAD(row, 10), 10)
    found = check_two_graphs(settle(randomise(model)).eval(), "aot_eager")
    assert not any("muntin.stage" in name or "attention" in name for name in found if name.startswith("muntin"))


@pytest.mark.filterwarnings("default")
@families()
def test_a_compiled_backbone_returns_its_maps(family: Any, randomise: Any) -> None:
    backbone = settle(randomise(family.BACKBONE(family.TINY))).eval()
    fast = muntin.compile(backbone, backend="aot_eager")
    with torch.no_grad():
        for size in ((64, 96), (61, 83)):
            image = torch.randn(2, 3, *size)
            for found, wanted in zip(fast(image), muntin.runtime.fold(backbone)(image), strict=True):
                assert error_of(found, wanted) < 1e-4


@pytest.mark.filterwarnings("default")
def test_a_compiled_copy_is_its_own_and_autocast_casts(randomise: Any) -> None:
    model = randomise(muntin.create_model("swin_t", 10, dim=16, depths=(1, 2), heads=(1, 2), window=4)).eval()
    fast = muntin.compile(model, backend="aot_eager")
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = fast(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert 1e-5 < error_of(fast(image), wanted) < 0.3
        twin = copy.deepcopy(fast)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert error_of(twin(image), wanted) < 1e-5
        assert error_of(fast(image), model(image)) < 1e-5


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("backend", "small_maps", "depths"),
    [("inductor", "shrink", (2, 1)), ("aot_eager", "pad", (1, 2, 2, 1))],
)
def test_two_graphs_serve_all_shapes_of_swin(
    backend: str, small_maps: str, depths: tuple[int, ...], randomise: Any
) -> None:
    heads = (1, 2, 4, 8)[: len(depths)]
    config: Any = {"dim": 16, "depths": depths, "heads": heads, "window": 4, "small_maps": small_maps}
    model = randomise(muntin.create_model("swin_t", 10, **config)).eval()
    check_two_graphs(model, backend)


@pytest.mark.filterwarnings("default")
def test_many_models_of_one_class_compile() -> None:
    """They share the code of one forward, whose recompilations torch limits to 8."""
    config: Any = {"dim": 16, "depths": (1,), "heads": (1,), "window": 4}
    for classes in range(2, 12):
        model = muntin.compile(muntin.create_model("swin_t", classes, **config).eval(), backend="eager")
        with torch.no_grad():
            assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)


@pytest.mark.filterwarnings("default")
def test_compiled_training_has_the_same_gradients(randomise: Any) -> None:
    config: Any = {"dim": 16, "depths": (2, 1), "heads": (1, 2), "window": 4}
    model = randomise(muntin.create_model("swin_t", 10, **config)).train()
    image = torch.randn(2, 3, 34, 40)
    model(image).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    muntin.compile(model, backend="aot_eager")(image).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("default")
@families()
def test_compiled_inference_follows_the_weights(family: Any, randomise: Any) -> None:
    """Trained, loaded and replaced weights show at the next call; those that only change values compile nothing."""
    model: Any = settle(randomise(tiny(family))).eval()
    counting = Counting("aot_eager")
    fast = muntin.compile(model, backend=counting)
    image = torch.randn(2, 3, 64, 64)

    def error() -> float:
        return error_of(fast(image), muntin.runtime.fold(model)(image))

    with torch.no_grad():
        assert error() < 1e-4
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert error() < 1e-4
        model.load_state_dict(settle(randomise(tiny(family), seed=3)).state_dict())
        assert error() < 1e-4
        assert counting.graphs == 1
        model.head.reset(7)
        assert error() < 1e-4
        assert fast(image).shape == (2, 7)
        fast.double()
        assert error_of(fast(image.double()), model(image.double())) < 1e-9
    assert list(fast.state_dict()) == [f"model.{name}" for name in model.state_dict()]


@pytest.mark.filterwarnings("default")
@families()
def test_inductor_takes_every_family(family: Any, randomise: Any) -> None:
    """Operators that only a tracing backend can run would show here."""
    model = settle(randomise(tiny(family))).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert error_of(muntin.compile(model)(image), muntin.runtime.fold(model)(image)) < 1e-4


@pytest.mark.filterwarnings("default")
@families()
def test_two_graphs_hold_the_operators_of_the_kernels(family: Any, randomise: Any, symbols: None) -> None:
    """Traced by Dynamo alone: how AOTAutograd takes each operator is tested with the kernels, by `opcheck`."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with muntin.kernels.use(True):
        found = check_two_graphs(settle(randomise(small(family))).eval(), "eager")
    operator = {"rmt": "manhattan_attention", "efficientvit": "packed_linear"}.get(
        family.__name__.rpartition(".")[2], "window_attention"
    )  # EfficientViT's kernel is for eager code
    assert f"muntin.{operator}" in found
