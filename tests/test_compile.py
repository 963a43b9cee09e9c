"""`muntin.compile`: equal to the model at every shape, with no more than two graphs."""

from typing import Any

import pytest
import torch

import muntin
from conftest import error_of, settle
from muntin.models import efficientvit, rmt, swinv2
from test_models import families, tiny

SHAPES = [
    (2, 128, 128),
    (1, 128, 128),
    (5, 96, 160),
    (2, 64, 64),
    (3, 61, 83),
    (1, 224, 160),
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

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return self.compile(graph, inputs)


@pytest.fixture(autouse=True)
def clean() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_two_graphs(model: Any, backend: str) -> None:
    """Equal to the model at every shape, within two graphs. What folding alone changes is tested with folding."""
    folded = muntin.runtime.fold(model)
    counting = Counting(backend)
    fast = muntin.compile(model, backend=counting)
    for batch, height, width in SHAPES:
        image = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            assert error_of(fast(image), folded(image)) < 1e-4, (batch, height, width)
    assert counting.graphs == 2
    assert not hasattr(image, "_dynamo_dynamic_indices")  # the caller's tensor bears no marks


@pytest.mark.filterwarnings("default")  # the compiler's own
@families()
def test_two_graphs_serve_all_shapes_of_every_family(family: Any, randomise: Any) -> None:
    check_two_graphs(settle(randomise(tiny(family))).eval(), "aot_eager")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("backend", "small_maps", "depths"),
    [("inductor", "shrink", (2, 1)), ("aot_eager", "pad", (1, 2))],
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
    counting = Counting("eager")
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
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (swinv2, {"depths": (1, 2), "heads": (1, 2), "window": (4, 4), "pretrained_window": (0, 6)}),
        (efficientvit, {}),
        (rmt, {}),
    ],
    ids=["swinv2", "efficientvit", "rmt"],
)
def test_inductor_takes_the_other_families(family: Any, changes: Any, randomise: Any) -> None:
    """As it takes Swin above. Operators that only a tracing backend can run would show here."""
    model = settle(randomise(tiny(family, **changes))).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert error_of(muntin.compile(model)(image), muntin.runtime.fold(model)(image)) < 1e-4


@pytest.mark.filterwarnings("default")
@families()
def test_two_graphs_hold_the_operators_of_the_kernels(family: Any, randomise: Any) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    with muntin.kernels.use(True):
        check_two_graphs(settle(randomise(tiny(family))).eval(), "aot_eager")
