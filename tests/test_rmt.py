"""RMT against the slow reference, the authors and forms written out by hand; its weights, costs and refusals.

Each mutation of the reference in the list is a mistake that is easily made: with any of them the comparison fails.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muntin
from conftest import error_of, filled, settle
from muntin.errors import UserError
from muntin.layers import manhattan
from muntin.layers.drop import DropPath
from muntin.layers.manhattan import ManhattanAttention
from muntin.layers.reference import rmt as reference
from muntin.measure.cost import cost
from muntin.models import create_backbone, create_model, rmt
from muntin.models.rmt import Rmt, RmtBlock
from muntin.weights import convert, load_checkpoint

BASE: dict[str, Any] = {
    "dims": (8, 16, 16, 32),
    "depths": (1, 1, 2, 1),
    "heads": (2, 1, 4, 2),
    "mlp_ratios": (2, 3, 2, 2),
    "layer_scale": (False, False, True, True),
    "projection": 24,
}
SIZES = [(1, 1), (3, 5), (16, 16), (23, 37), (64, 64), (61, 83), (96, 40), (5, 70), (130, 9)]
MERGING: dict[str, Any] = {"dims": (8, 16, 32, 64), "stem": "patch", "downsample": "merge"}
PAIR: dict[str, Any] = {
    "dims": (8, 16),
    "depths": (1, 1),
    "heads": (2, 1),
    "mlp_ratios": (2, 3),
    "layer_scale": (False, True),
    "decay_range": (4, 6),
    "decomposed": (True, False),
}
"""Two stages alone."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "patch stem": {"stem": "patch"},
    "patches of 3": {"stem": "patch", "patch": 3, "patch_norm": False},
    "patch merging": MERGING,
    "no position convolution": {"position_conv": False},
    "no local enhancement": {"local_enhancement": False},
    "no convolution in the feed-forward part": {"ffn_conv": False},
    "no softmax": {"decay": "no_softmax", "decomposed": (True, False, True, False)},
    "no decay": {"decay": "none", "decomposed": (True, False, True, False)},
    "whole everywhere": {"decomposed": (False, False, False, False)},
    "decomposed everywhere": {"decomposed": (True, True, True, True)},
    "no projection": {"projection": 0},
    "no layer scale": {"layer_scale": (False, False, False, False)},
    "layer scale everywhere": {"layer_scale": (True, True, True, True)},
    "other decay": {"decay_min": 1.5, "decay_range": (1, 3.5, 6, 2)},
}


def _image(size: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _model(randomise: Any, classes: int = 5, **config: Any) -> Any:
    return randomise(create_model("rmt_s", classes, **BASE | config))


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert [y.shape for y in found] == [y.shape for y in wanted]
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, wanted, strict=True)
    )


def inference(model: Any, image: Tensor) -> Any:
    """Fused attention, the columns of one image at a time."""
    with torch.inference_mode():
        return model(image)


def gradients(model: Any, image: Tensor) -> Any:
    """Explicit products."""
    return model(image)


def symbolic(model: Any, image: Tensor) -> Any:
    """What `muntin.compile` traces: no complex numbers, convolutions that it does not look into."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return model(image)


def folded(model: Any, image: Tensor) -> Any:
    """What `muntin.optimize` runs, and what is exported."""
    with torch.inference_mode():
        return muntin.optimize(model)(image)


PATHS: dict[str, Callable[[Any, Tensor], Any]] = {
    "inference": inference,
    "gradients": gradients,
    "symbolic": symbolic,
    "folded": folded,
}


# The published figures

PUBLISHED = {
    "rmt_t": (14_334_216, 2.637),
    "rmt_s": (26_967_240, 4.777),
    "rmt_b": (54_154_896, 10.373),
    "rmt_l": (95_464_864, 19.488),
    "rmt_swin_t": (28_379_848, 4.739),
    "rmt_swin_s": (49_793_224, 9.278),
    "rmt_deit_s": (22_094_440, 4.597),
}


@pytest.mark.parametrize(("name", "figures"), PUBLISHED.items())
def test_parameters_and_products(name: str, figures: tuple[int, float]) -> None:
    with torch.device("meta"):
        found = cost(create_model(name))
    assert found.parameters == figures[0]
    assert round(found.gmacs, 3) == figures[1]
    assert set(PUBLISHED) == set(rmt.VARIANTS)


@pytest.mark.parametrize(
    ("name", "place", "parameters"),
    [("rmt_s", True, 27_992_240), ("rmt_b", "stage", 54_667_896), ("rmt_l", "stage", 96_105_864)],
)
def test_parameters_with_token_labels(name: str, place: Any, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, token_label=place)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_maps_of_the_published_rows() -> None:
    with torch.device("meta"):
        image = torch.empty(1, 3, 224, 224)
        assert [m.shape[1:] for m in create_backbone("rmt_s")(image)] == [
            (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7),
        ]  # fmt: skip
        deit = create_backbone("rmt_deit_s")
        assert [m.shape[1:] for m in deit(image)] == [(384, 14, 14)] and deit.strides == (16,) == (deit.stem.stride,)


# The authors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["rmt_decomposed", "rmt_full", "rmt_maps"])
def test_authors(name: str, path: str, golden: Any) -> None:
    file = golden(name)
    config = dict(file.config)
    variant, classes, norms = config.pop("model"), config.pop("num_classes", None), config.pop("out_norm", False)
    if classes is not None:
        model: Any = create_model(variant, classes, **config).eval()
    else:
        model = create_backbone(variant, out_norm=norms, **config).eval()
    report = load_checkpoint(model, file.weights)
    assert report.dialect == "authors" and len(report.loaded) + _counters(model) == len(model.state_dict())
    for image, wanted in file.pairs:
        found = PATHS[path](model, image)
        found = found if classes is None else [found]
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert error_of(one.detach(), other) < 1e-5


def _counters(model: nn.Module) -> int:
    return sum(name.endswith("num_batches_tracked") for name in model.state_dict())


@pytest.mark.parametrize("name", ["rmt_decomposed", "rmt_full", "rmt_maps"])
def test_reference_is_the_authors(name: str, golden: Any) -> None:
    file = golden(name)
    state = convert(file.weights)
    for image, wanted in file.pairs:
        if "num_classes" in file.config:
            found = [reference.rmt_logits(image, state, file.config)]
        else:
            found = reference.rmt(image, state, file.config)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert error_of(one, other) < 1e-5


# The slow reference


def _cases() -> Iterator[Any]:
    """Every size with the model itself, every ablation at two sizes."""
    for size in SIZES:
        yield pytest.param({}, size, id=f"{size[0]}x{size[1]}")
    draw = random.Random(2)
    for name, changes in ABLATIONS.items():
        for size in draw.sample(SIZES, 2):
            yield pytest.param(changes, size, id=f"{name}-{size[0]}x{size[1]}")


@pytest.mark.parametrize(("changes", "size"), list(_cases()))
def test_fast_equals_reference(changes: dict[str, Any], size: tuple[int, int], randomise: Any) -> None:
    model = randomise(create_backbone("rmt_s", out_norm=True, **BASE | changes)).double().eval()
    image = _image(size)
    wanted = reference.rmt(image, model.state_dict(), asdict(model.config))
    for name, run in PATHS.items():
        assert _largest([y.detach() for y in run(model, image)], wanted) < 1e-10, name


@pytest.mark.parametrize("changes", [{}, {"token_label": True}, {"token_label": "stage"}, {"projection": 0}], ids=str)
def test_logits_equal_reference(changes: dict[str, Any], randomise: Any) -> None:
    model = _model(randomise, **changes).double().eval()
    image = _image((61, 83))
    wanted = reference.rmt_logits(image, model.state_dict(), asdict(model.config))
    for name, run in PATHS.items():
        assert _largest([run(model, image).detach()], [wanted]) < 1e-10, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("path", ["inference", "symbolic"])
def test_dtypes(path: str, dtype: torch.dtype, bound: float, randomise: Any) -> None:
    model = settle(_model(randomise)).eval().to(dtype)
    image = _image((61, 83)).to(dtype)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    wanted = reference.rmt_logits(image.double(), state, asdict(model.config))
    assert error_of(PATHS[path](model, image), wanted) < bound


@pytest.mark.parametrize("changes", [{}, MERGING, {"decay": "no_softmax"}, {"token_label": True}], ids=str)
def test_gradients_equal_reference(changes: dict[str, Any], randomise: Any) -> None:
    model = _model(randomise, **changes).double().train()
    image = _image((43, 34))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    wanted, found = reference.rmt_logits(image, state, asdict(model.config), training=True), model(image)
    wanted, found = (x if isinstance(x, tuple) else (x,) for x in (wanted, found))
    assert _largest(list(found), list(wanted)) < 1e-10
    for outputs in (wanted, found):
        sum(y.square().mean() for y in outputs).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - state[name].grad).abs().max() < 1e-8 * (1 + state[name].grad.abs().max()), name


def test_reference_shares_nothing_with_the_package() -> None:
    with open(reference.__file__) as file:
        assert "muntin" not in file.read()


# Mutations of the reference, one mistake each


def _attend_with(**changes: Any) -> Callable[[Any], None]:
    return lambda patch: _wrap(patch, "attention", lambda right: lambda x, s, n, c: right(x, s, n, c | changes))


def _block_with(**changes: Any) -> Callable[[Any], None]:
    return lambda patch: _wrap(patch, "block", lambda right: lambda x, s, n, c: right(x, s, n, c | changes))


def _after_linear(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def make(right: Any) -> Any:
        return lambda x, s, n: change(right(x, s, n)) if n.endswith(end) else right(x, s, n)

    return lambda patch: _wrap(patch, "linear", make)


def _before(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda patch: _wrap(patch, name, lambda right: lambda x, *rest: right(change(x), *rest))


def _distances(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Any], None]:
    return lambda patch: _wrap(patch, "distances", lambda right: lambda *args: change(*right(*args)))


def _wrap(patch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any]) -> None:
    patch.setattr(reference, name, make(getattr(reference, name)))


def _halves(right: Any) -> Any:
    """Rotation of pairs of channels half a head apart."""

    def wrong(x: Tensor) -> Tensor:
        order = torch.arange(x.shape[-1]).view(2, -1).t().reshape(-1)
        turned = torch.empty_like(x)
        turned[..., order] = right(x[..., order])
        return turned

    return wrong


MUTATIONS: dict[str, Callable[[Any], None]] = {
    "distance along the other axis": _distances(lambda dy, dx: (dx, dy)),
    "distance squared": _distances(lambda dy, dx: (dy**2, dx**2)),
    "distance along rows alone": _distances(lambda dy, dx: (0 * dy, dx)),
    "one decay for all heads": _attend_with(decay_range=0),
    "decay from another base": _attend_with(decay_min=3),
    "no decay": _attend_with(decay="none"),
    "no softmax": _attend_with(decay="no_softmax"),
    "whole attention": _attend_with(decomposed=False),
    "decomposed attention": _attend_with(decomposed=True),
    "one head": _attend_with(heads=1),
    "no local enhancement": _attend_with(local_enhancement=False),
    "local enhancement of another kernel": _after_linear("attention.v", lambda v: v * 1.01),
    "another scale": _after_linear("attention.qk", lambda qk: qk * 1.01),
    "q and k the other way around": _after_linear("attention.qk", lambda qk: torch.cat(qk.chunk(2, -1)[::-1], -1)),
    "no rotation": lambda patch: patch.setattr(reference, "rotate", lambda x: x),
    "rotation of halves": lambda patch: _wrap(patch, "rotate", _halves),
    "rotation the other way": _before("rotate", lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)),
    "tanh in GELU": lambda patch: patch.setattr(reference, "gelu", lambda x: F.gelu(x, approximate="tanh")),
    "eps of other norms in blocks": lambda patch: patch.setattr(reference, "BLOCK_EPS", 1e-5),
    "eps of blocks in other norms": lambda patch: patch.setattr(reference, "EPS", 1e-6),
    "no layer scale": _block_with(layer_scale=False),
    "no position convolution": _block_with(position_conv=False),
    "no convolution in the feed-forward part": _block_with(ffn_conv=False),
}


@pytest.fixture(scope="module")
def intact() -> tuple[Any, Tensor, dict[str, list[Tensor]]]:
    """A model, an image and the model's maps on every path."""
    backbone = create_backbone("rmt_s", out_norm=True, **BASE)
    model, image = settle(filled(backbone)).double().eval(), _image((61, 83))
    paths = ("inference", "gradients", "symbolic")
    return model, image, {path: [y.detach() for y in PATHS[path](model, image)] for path in paths}


@pytest.mark.parametrize("mistake", [None, *MUTATIONS])
def test_mutations_show(mistake: str | None, intact: Any) -> None:
    model, image, found = intact
    with pytest.MonkeyPatch.context() as patch:
        if mistake is not None:
            MUTATIONS[mistake](patch)
        wanted = reference.rmt(image, model.state_dict(), asdict(model.config))
    for path, maps in found.items():
        error = _largest(maps, wanted)
        assert error < 1e-10 if mistake is None else error > 1e-7, path


# Ablations and parts, written out by hand


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_the_model(name: str, randomise: Any) -> None:
    plain, changed = _model(randomise).eval(), _model(randomise, **ABLATIONS[name]).eval()
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (plain, changed)]
    if shapes[0] == shapes[1]:
        image = _image((61, 83), dtype=torch.float32)
        assert error_of(changed(image), plain(image)) > 1e-3


@pytest.mark.parametrize("decay", ["softmax", "no_softmax", "none"])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_attention_by_hand(decay: str, decomposed: bool, local: bool, randomise: Any) -> None:
    """Equations 4 to 9 of the paper, one head of two channels, whose rotation is by one radian per token."""
    layer = randomise(ManhattanAttention(2, 1, 2.0, 6.0, decomposed, local, decay)).double()
    height, width = 3, 4
    x = torch.randn(1, height * width, 2, dtype=torch.float64)
    q, k = layer.qk(x)[0].chunk(2, -1)
    v = layer.v(x)[0]
    n = torch.arange(height * width)
    y, z = n // width, n % width
    cos, sin = n.double().cos(), n.double().sin()
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    q, k = (turn @ q[..., None])[..., 0], (turn @ k[..., None])[..., 0] / math.sqrt(2)
    dy, dx = (y[:, None] - y).abs(), (z[:, None] - z).abs()

    def weights(distance: Tensor, seen: Tensor) -> Tensor:
        logits = q @ k.T
        if decay == "no_softmax":
            return logits * 0.75**distance * seen
        logits = logits if decay == "none" else logits + math.log(0.75) * distance
        return logits.masked_fill(~seen, -math.inf).softmax(-1)

    if decomposed:
        wanted = weights(dy, dx == 0) @ weights(dx, dy == 0) @ v
    else:
        wanted = weights(dy + dx, dy >= 0) @ v
    if local:
        wanted = wanted + layer.local(v.T.view(1, 2, height, width)).flatten(2)[0].T
    wanted = layer.proj(wanted)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x, (height, width))[0], wanted)


def test_block_by_hand(randomise: Any) -> None:
    config = replace(Rmt(**BASE), depths=(1, 1, 1, 1))
    block = randomise(RmtBlock(config, 2, 0.0)).double().eval()
    x, size = torch.randn(2, 15, 16, dtype=torch.float64), (5, 3)

    def mapped(layer: nn.Module, tokens: Tensor) -> Tensor:
        return layer(tokens.transpose(1, 2).reshape(2, -1, *size)).flatten(2).transpose(1, 2)

    y = x + mapped(block.position.conv, x)
    y = y + block.scale1.flatten() * block.attention(F.layer_norm(y, (16,), *block.norm1.parameters(), 1e-6), size)
    z = F.gelu(block.mlp.fc1(F.layer_norm(y, (16,), *block.norm2.parameters(), 1e-6)))
    z = block.mlp.fc2(z + mapped(block.mlp.mix.conv, z))
    torch.testing.assert_close(block(x, size), y + block.scale2.flatten() * z)


def test_layer_scale_starts_small_and_is_decayed() -> None:
    """The authors store it as (1, 1, 1, C), so that a rule for one-dimensional parameters passes it by."""
    model = create_model("rmt_s", 5, **BASE)
    scales = {n: p for n, p in model.named_parameters() if "scale" in n}
    assert len(scales) == 2 * (2 + 1)
    assert all(p.ndim == 4 and p.eq(1e-6).all() for p in scales.values())


def test_initialisation() -> None:
    model = create_model("rmt_s", dims=(32, 64, 128, 256), depths=(1, 1, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.bias.eq(0).all() and module.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_drop_path_grows_linearly() -> None:
    model = create_model("rmt_s", drop_path=0.15, **BASE)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.15 * i / 4 for i in range(5)])


@pytest.mark.parametrize("place", [True, "projection", "stage"])
def test_token_labels(place: Any, randomise: Any) -> None:
    model = settle(_model(randomise, token_label=place))
    image = _image((64, 96), dtype=torch.float32)
    classes, tokens = model.train()(image)
    assert classes.shape == (2, 5) and tokens.shape == (2, 2 * 3, 5)
    logits = model.eval()(image)
    last = model.backbone(image)[-1]
    features = last if place == "stage" else model.head.features(last)
    labels = model.head.fc_tokens(features.flatten(2).transpose(1, 2))
    wanted = model.head.fc(model.head.features(last).mean((2, 3))) + 0.5 * labels.max(1).values
    torch.testing.assert_close(logits, wanted)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3) and model.train()(image)[1].shape == (2, 6, 3)


def test_fused_attention_equals_explicit_products(randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in training, on the CPU."""
    model = settle(_model(randomise))
    image = _image((61, 83), dtype=torch.float32)
    wanted = model(image)
    monkeypatch.setattr(ManhattanAttention, "_fused", staticmethod(lambda x: True))
    assert error_of(model(image).detach(), wanted.detach()) < 1e-5


@pytest.mark.parametrize("piece", [1, 300, 1 << 20])
@pytest.mark.parametrize("decay", ["softmax", "none"])
def test_short_attentions_in_pieces_equal_fused_ones(piece: int, decay: str, randomise: Any) -> None:
    model = _model(randomise, decay=decay).double().eval()
    image = _image((61, 83), batch=3)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(manhattan, "SHORT", 0)
        wanted = model(image)
        patch.setattr(manhattan, "SHORT", 64)
        patch.setattr(manhattan, "PIECE", piece)
        assert error_of(model(image), wanted) < 1e-10


@pytest.mark.filterwarnings("default")  # the exporter's own
@pytest.mark.parametrize("changes", [{}, {"decay": "no_softmax", **MERGING}], ids=["rmt", "ablation"])
def test_exported_graphs(changes: dict[str, Any], randomise: Any, tmp_path: Any) -> None:
    """ONNX Runtime and OpenVINO at sizes that tracing never saw; ranks that Core ML takes, linears on rank 3. One stage
    of each kind of attention: test_export.py traces all four, which takes long.
    """
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    model = settle(_model(randomise, **changes | PAIR)).eval()
    sizes = [(64, 64), (61, 83), (9, 5), (1, 1)]
    report = muntin.export(model, tmp_path / "m.onnx", sizes=sizes, batches=[1, 3], progress=False)
    assert report.max_rank <= 5 and report.max_error < 1e-5
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx")).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    weights = {tensor.name for tensor in graph.initializer}
    linears = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(linears) >= 4 * 2 and {ranks[node.output[0]] for node in linears} <= {2, 3}
    engine = openvino.Core().compile_model(tmp_path / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in sizes[:3]:
        image = _image(size, dtype=torch.float32)
        with torch.inference_mode():
            assert error_of(torch.from_numpy(engine(image.numpy())[0]), model(image)) < 1e-5


def test_tables_are_made_once_and_large_ones_not_kept(randomise: Any) -> None:
    model = _model(randomise, decomposed=(True, True, True, False)).eval()
    image = _image((64, 48), dtype=torch.float32)
    made = []
    for _ in range(2):
        with torch.no_grad():
            model(image)
        made.append([table.cache_info().misses for table in _tables()])
    assert made[0] == made[1]
    layer = ManhattanAttention(4, 2, 2, 4, False)
    large = manhattan.kept_whole_decay, manhattan.kept_rotation
    before = [table.cache_info().misses for table in large]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manhattan, "KEPT", 8)
        layer(torch.randn(1, 6, 4), (2, 3))
    assert [table.cache_info().misses for table in large] == before
    assert not [name for name, _ in model.named_buffers() if "running" not in name and "batches" not in name]


def _tables() -> list[Any]:
    return [manhattan.kept_rotation, manhattan.axis_decay, manhattan.kept_whole_decay]


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("changes", [{}, MERGING], ids=["conv", "merge"])
def test_two_graphs_serve_large_batches_and_small_images(changes: dict[str, Any], randomise: Any) -> None:
    """A convolution that the compiler looked into would ask for more than 15 images, and for more than 20480 values."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = settle(_model(randomise, depths=(1, 1, 1, 1), **changes)).eval()
    fast = muntin.compile(model, backend=backend)
    for batch, height, width in ((2, 64, 64), (1, 96, 80), (17, 40, 33), (1, 20, 9)):
        image = _image((height, width), batch, torch.float32)
        with torch.no_grad():
            assert error_of(fast(image), model(image)) < 1e-5, (batch, height, width)
    assert len(graphs) == 2
    torch._dynamo.reset()


# Weights


def test_weights_there_and_back(randomise: Any) -> None:
    model = _model(randomise, token_label=True)
    ours = model.state_dict()
    theirs = convert(ours, "authors")
    assert {"patch_embed.proj.10.running_var", "layers.2.downsample.reduction.bias", "aux_head.weight"} <= set(theirs)
    assert theirs["layers.2.blocks.1.retention.k_proj.weight"].shape == (16, 16)
    assert theirs["layers.2.blocks.1.gamma_1"].shape == (1, 1, 1, 16)
    back = convert(theirs)
    assert set(back) == set(ours) and all(torch.equal(back[name], ours[name]) for name in ours)


def test_detection_files_and_derived_buffers(randomise: Any) -> None:
    model = randomise(create_backbone("rmt_s", out_norm=True, **BASE))
    theirs = convert({f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}, "authors")
    assert "extra_norms.3.weight" in theirs
    derived = {f"layers.{s}.Relpos.{name}": torch.zeros(4) for s in range(4) for name in ("angle", "decay")}
    fresh = create_backbone("rmt_s", out_norm=True, **BASE)
    report = load_checkpoint(fresh, {f"backbone.{name}": t for name, t in (theirs | derived).items()})
    assert len(report.ignored) == 8 and not report.unexpected and not report.missing
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({"depths": (1, 1, 3, 1)}, {}, r"depths 1-1-3-1.*depths 1-1-2-1"),
        ({"mlp_ratios": (4, 4, 3, 3)}, {}, r"mlp_ratios 4-4-3-3.*mlp_ratios 2-3-2-2"),
        ({"token_label": True}, {}, r"token_label projection.*the model is rmt_s"),
        ({"token_label": "stage"}, {"token_label": True}, r"token_label stage.*token_label projection"),
    ],
)
def test_weights_of_another_row_are_named(
    theirs: dict[str, Any], ours: dict[str, Any], words: str, randomise: Any
) -> None:
    with pytest.raises(UserError, match="another model: .*" + words):
        load_checkpoint(create_model("rmt_s", 5, **BASE | ours), _model(randomise, **theirs).state_dict())


def test_heads_for_other_classes_are_replaced(randomise: Any) -> None:
    model = create_model("rmt_s", 3, token_label="stage", **BASE)
    report = load_checkpoint(model, _model(randomise, token_label="stage").state_dict())
    assert sorted(report.replaced) == [f"head.{n}.{w}" for n in ("fc", "fc_tokens") for w in ("bias", "weight")]


# Refusals


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dims": (8, 16, 16)}, r"dims=\(8, 16, 16\): give a tuple with one value for the 4 stages"),
        ({"depths": 3}, "dims=.*one value for each stage"),
        ({"heads": (3, 1, 4, 2)}, r"8 channels in stage 0.*heads=3.*even width"),
        ({"heads": (8, 1, 4, 2)}, r"8 channels in stage 0.*heads=8.*even width"),
        ({"depths": (1, 1, 0, 1)}, "depths=.*at least 1"),
        ({"mlp_ratios": (2, 2, "x", 2)}, "mlp_ratios=.*positive numbers"),
        ({"mlp_ratios": (0.1, 2, 2, 2)}, "stage 0 of 8 channels is left no hidden channel"),
        ({"decay_min": 0}, "decay_min=0: give a number above 0"),
        ({"decay_range": (1, 2, 3, math.nan)}, "decay_range=.*from 0 up"),
        ({"decay": "softmin"}, "decay='softmin': valid are 'softmax', 'no_softmax', 'none'"),
        ({"decomposed": (1, 1, 1, 0)}, "decomposed=.*True or False"),
        ({"layer_scale": True}, "layer_scale=True: give a tuple"),
        ({"token_label": "tokens"}, "token_label='tokens': valid are False, True"),
        ({"token_label": True, "projection": 0}, "needs a projection.*'stage'"),
        ({"projection": None}, "projection=None: give a width, or 0"),
        ({"stem": "conv", "patch": 16}, "patch=16 be 4"),
        ({"stem": "linear"}, "stem='linear': valid are 'conv', 'patch'"),
        ({"downsample": "merge"}, "doubles the channels"),
        ({"window": 7}, "no field 'window'.*valid are dims, depths"),
    ],
)
def test_impossible_configurations_say_what_is_valid(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_model("rmt_s", **BASE | config)


def test_configurations_travel_as_plain_data() -> None:
    row = Rmt(**json.loads(json.dumps(asdict(Rmt(**BASE, token_label=True)))))
    assert row == Rmt(**BASE, token_label="projection") and isinstance(row.dims, tuple)
