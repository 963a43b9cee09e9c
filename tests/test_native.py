"""Programs of compiled kernels: equal to the folded model at every shape and width of vectors, and kept current."""

import copy
import io
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import muntin
from conftest import error_of, settle
from muntin.layers.opaque import Programmed
from muntin.measure.counter import OperatorCounter
from muntin.models import efficientvit, rmt, swin, swinv2
from muntin.native import build, prepare, program
from test_models import tiny

SHAPES = [(2, 64, 64), (1, 224, 224), (3, 61, 83), (1, 250, 33), (5, 1, 1), (1, 112, 130)]
WIDTHS = {"vectors of 4": "x86-64", "vectors of 8": "haswell", "vectors of 16": "skylake-avx512"}

pytestmark = pytest.mark.skipif(
    program.kernels() is None, reason="programs need g++ with OpenMP, and MUNTIN_NATIVE is not to be 0"
)


EFFICIENTVIT: dict[str, Any] = {
    "key_dim": 16,
    "dims": (32, 64, 96),
    "heads": (2, 4, 3),
    "depths": (1, 1, 2),
    "windows": (7, 7, 4),
    "kernels": (7, 5, 3, 3),
}
SWIN: dict[str, Any] = {"dim": 32, "depths": (2, 2), "heads": (2, 2), "window": (7, 4)}
RMT: dict[str, Any] = {"dims": (32, 64, 64, 64), "heads": (2, 4, 2, 4)}
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {  # family, changes, programs of an optimised copy
    "efficientvit": (efficientvit, EFFICIENTVIT, 4),
    "efficientvit, hardswish": (efficientvit, EFFICIENTVIT | {"act": "hardswish"}, 4),
    "efficientvit, two units": (efficientvit, EFFICIENTVIT | {"ffns": 2}, 4),
    "swin": (swin, SWIN, 3),
    "swin, padded maps": (swin, SWIN | {"small_maps": "pad"}, 3),
    "swin, BR without shift": (swin, SWIN | {"norm": "batch", "act": "relu", "shift": False}, 3),
    "swin, BR": (swin, SWIN | {"norm": "batch", "act": "relu"}, 3),
    "swin, blocks without attention": (swin, SWIN | {"attend": (0, 3)}, 3),
    "swinv2": (swinv2, SWIN | {"pretrained_window": (0, 6)}, 3),
    "swinv2, padded maps": (swinv2, SWIN | {"pretrained_window": (0, 6), "small_maps": "pad"}, 3),
    "rmt": (rmt, RMT, 5),
    "rmt, all decomposed": (rmt, RMT | {"decomposed": (True,) * 4}, 5),
    "rmt, whole": (rmt, RMT | {"decomposed": (False,) * 4}, 5),
    "rmt, patches": (rmt, {**RMT, "stem": "patch", "position_conv": False, "ffn_conv": False}, 5),
}


def model_of(randomise: Any, name: str = "efficientvit", **changes: Any) -> Any:
    """One that all kernels serve, at every width of vectors."""
    family, fields, _ = CASES[name]
    return settle(randomise(tiny(family, **fields | changes))).eval()


def programs(model: torch.nn.Module) -> list[Any]:
    return [m.program for m in model.modules() if isinstance(m, Programmed) and m.program is not None]


def check(randomise: Any, name: str, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> None:
    model = model_of(randomise, name)
    fast, exact = muntin.optimize(model), muntin.runtime.fold(model).double()
    assert len(programs(fast)) == CASES[name][2]
    with torch.no_grad():
        for batch, height, width in shapes:
            image = torch.randn(batch, 3, height, width)
            assert error_of(fast(image), exact(image.double())) < 1e-5, (batch, height, width)


@pytest.mark.parametrize("name", CASES)
def test_programs_equal_the_model_in_float64(name: str, randomise: Any) -> None:
    check(randomise, name)


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(35, 50), (1, 1), (64, 128), (97, 1000), (600, 24)])
def test_products_of_whole_numbers_are_exact(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """At every count of rows that leaves another rest, and columns that end within a vector."""
    layer = torch.nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    layer.weight.copy_(integers(outputs, inputs, dtype=dtype))
    layer.bias.copy_(integers(outputs, dtype=dtype))
    made = program.Program(inputs)
    made.linear(made.input, layer, "relu")
    for rows in (1, 2, 5, 6, 7, 13, 49, 100):
        x = integers(2, inputs, 1, rows, dtype=dtype)
        assert made.serves(x)
        wanted = (x.double().permute(0, 2, 3, 1) @ layer.weight.double().T + layer.bias.double()).relu()
        assert torch.equal(made(x).permute(0, 2, 3, 1), wanted.to(dtype))


@pytest.mark.parametrize("name", ["efficientvit", "swin", "swin, BR", "swinv2", "rmt"])
def test_programs_in_bfloat16(name: str, randomise: Any) -> None:
    """No further from float64 than the layers themselves are. Without instructions for it, float32 multiplies it."""
    model = model_of(randomise, name).bfloat16()
    fast, exact = muntin.optimize(model), copy.deepcopy(model).double()
    layers = copy.deepcopy(fast)
    for module in layers.modules():
        if isinstance(module, Programmed):
            module.program = None
    with torch.no_grad(), OperatorCounter() as counter:
        fast(torch.randn(1, 3, 64, 64).bfloat16())
    assert counter.calls["muntin::program"] == CASES[name][2]
    with torch.no_grad():
        for batch, height, width in SHAPES:
            image = torch.randn(batch, 3, height, width).bfloat16()
            wanted = exact(image.double())
            found = fast(image)
            assert found.dtype == torch.bfloat16
            assert error_of(found, wanted) < max(0.03, 1.5 * error_of(layers(image), wanted)), (batch, height, width)


@pytest.mark.parametrize("name", ["efficientvit", "swin", "swinv2", "rmt"])
def test_how_many_rows_run_together_changes_nothing(name: str, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 48 rows, whatever caches would hold, the usual ones, and layers one after the other."""
    fast = muntin.optimize(model_of(randomise, name))
    images = torch.randn(2, 3, 224, 160)
    found = []
    with torch.no_grad():
        for near, by_rows in ((1, prepare.BY_ROWS), (prepare.NEAR, prepare.BY_ROWS), (prepare.NEAR, ())):
            monkeypatch.setattr(prepare, "NEAR", near)
            monkeypatch.setattr(prepare, "BY_ROWS", by_rows)
            found.append(copy.deepcopy(fast)(images))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def anew() -> Iterator[None]:
    """Kernels are looked for again, in this test and after it."""
    cached = build.library, program.kernels
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture(params=WIDTHS, ids=str)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, anew: None) -> int:
    """Kernels compiled for another machine, which this one can run."""
    name = WIDTHS[request.param]
    needed = {"x86-64": "", "haswell": "avx2", "skylake-avx512": "avx512f"}[name]
    if platform.machine() not in ("x86_64", "AMD64") or needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this machine does not run code for {name}")
    monkeypatch.setattr(build, "FLAGS", [f.replace("=native", f"={name}") for f in build.FLAGS])
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    return int(request.param.split()[-1])


def test_every_width_of_vectors_computes_the_same(width: int, randomise: Any, tmp_path: Path) -> None:
    assert build.library().muntin_lanes() == width
    for name in ("efficientvit", "swin", "swinv2", "rmt"):
        check(randomise, name)
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_batch_in_several_passes(together: int, randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.Program, "_together", lambda *_: together)
    model = model_of(randomise)
    fast, exact = muntin.optimize(model), muntin.runtime.fold(model).double()
    image = torch.randn(5, 3, 61, 83)
    with torch.no_grad():
        assert error_of(fast(image), exact(image.double())) < 1e-5


def test_large_maps_run_one_image_at_a_time() -> None:
    one = programs(muntin.optimize(muntin.create_model("efficientvit_m0").eval()))[0]
    assert one._together(1024, 1024) == 1
    assert one._together(224, 224) == program.CACHED // (112 * 112 * 8)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads(threads: int, randomise: Any) -> None:
    """Other tests have one. Where other work has the cores threads wait for each other, at a large map as often as at a
    small one: here are maps with rows for all of them, odd ones, one image alone, and maps of a single row.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("efficientvit", "swin", "rmt"):
            check(randomise, name, [(2, 64, 64), (3, 61, 83), (5, 1, 1), (1, 112, 130)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "plain"},
        {"norm": "layer"},
        {"interaction": False},
        {"ffns": 0},
        {"value_ratio": 2.0},
        {"cascade": False},
        {"dims": (24, 40, 56), "heads": (1, 1, 1)},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_serve_runs_as_before(changes: dict[str, Any], randomise: Any) -> None:
    model = model_of(randomise, **changes)
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert error_of(muntin.optimize(model)(image), muntin.runtime.fold(model)(image)) < 1e-5


def test_other_types_gradients_and_autocast_take_the_layers(randomise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = muntin.optimize(model_of(randomise))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = fast(image)

        def refuse(*_: Any) -> Any:
            raise AssertionError("a program ran")

        monkeypatch.setattr(program.Program, "run", refuse)
        double = copy.deepcopy(fast).double()
        assert error_of(double(image.double()), wanted) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert error_of(fast(image).float(), wanted) < 0.3
    leaf = image.clone().requires_grad_()
    fast(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


def test_copies_pickles_and_loaded_weights_are_current(randomise: Any) -> None:
    model = model_of(randomise)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1 + 0.5 * torch.rand_like(parameter))
    fast, image = muntin.optimize(model), torch.randn(2, 3, 64, 64)
    buffer = io.BytesIO()
    with torch.no_grad():
        wanted, others = fast(image), muntin.optimize(other)(image)
        assert error_of(others, wanted) > 0.1
        twin = copy.deepcopy(fast)
        torch.save(fast, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
        fast.load_state_dict(muntin.optimize(other).state_dict())
        assert torch.equal(fast(image), others)
        for kept in (twin, saved):
            assert len(programs(kept)) == 4
            assert torch.equal(kept(image), wanted)
        block, theirs = (m.backbone.stages[1].blocks[0] for m in (twin, muntin.optimize(other)))
        block.load_state_dict(theirs.state_dict())  # a part alone
        assert error_of(twin(image), wanted) > 1e-3
        back = copy.deepcopy(fast).bfloat16().float()
        assert 1e-5 < error_of(back(image), others) < 2  # as bfloat16 left the weights


def test_weights_changed_in_place_or_replaced_are_current(randomise: Any) -> None:
    for name in ("efficientvit", "swin", "swinv2", "rmt"):
        fast = muntin.optimize(model_of(randomise, name))
        image = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            before = fast(image)
            for parameter in fast.backbone.parameters():
                parameter.mul_(1.05)
            changed = fast(image)
            assert error_of(changed, before) > 1e-2
            assert torch.equal(changed, copy.deepcopy(fast)(image))
            for module in fast.backbone.stages.modules():
                if isinstance(module, torch.nn.Linear) and module.bias is not None:
                    module.bias = torch.nn.Parameter(module.bias + 0.1, requires_grad=False)
            assert error_of(fast(image), changed) > 1e-3
            assert torch.equal(fast(image), copy.deepcopy(fast)(image))


def test_hooks_below_a_stage_fire(randomise: Any) -> None:
    fast = muntin.optimize(model_of(randomise, "swin"))
    image, seen = torch.randn(1, 3, 64, 64), []
    with torch.no_grad():
        wanted = fast(image)
        hook = fast.backbone.stages[0].blocks[1].register_forward_hook(lambda *_: seen.append(1))
        assert error_of(fast(image), wanted) < 1e-5 and seen
        hook.remove()
        assert torch.equal(fast(image), wanted) and len(seen) == 1


def test_an_optimised_copy_that_trains_again_has_its_gradients(randomise: Any) -> None:
    fast = muntin.optimize(model_of(randomise)).requires_grad_(True)
    fast(torch.randn(1, 3, 224, 224)).sum().backward()  # whose maps have more than one token
    tables = [parameter for name, parameter in fast.named_parameters() if name.endswith("bias_table")]
    assert tables and all(table.grad is not None and table.grad.abs().sum() > 0 for table in tables)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_type_does_not_matter(dtype: torch.dtype, randomise: Any) -> None:
    fast = muntin.optimize(model_of(randomise, "swin"))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = copy.deepcopy(fast)(image)
        torch.set_default_dtype(dtype)
        try:
            found = fast(image)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


def test_a_gate_closes(randomise: Any) -> None:
    model = model_of(randomise)
    gate = model.backbone.stages[1].subsample.reduce.gate
    for bias in (-95.0, -1e4, 95.0):
        gate.expand.bias.data.fill_(bias)
        fast, folded = muntin.optimize(model), muntin.runtime.fold(model)
        image = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert error_of(fast(image), folded(image)) < 1e-5


def test_threads_that_begin_at_once_agree(randomise: Any) -> None:
    image = torch.randn(1, 3, 64, 64)
    model = muntin.optimize(model_of(randomise))
    with torch.no_grad():
        wanted = copy.deepcopy(model)(image)

    def run(fast: Any, stop: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(fast(image), wanted) for _ in range(stop))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            fast = copy.deepcopy(model)  # nothing is arranged yet
            assert all(future.result() for future in [pool.submit(run, fast, 3) for _ in range(4)])


def test_weights_loaded_meanwhile_free_nothing_that_runs(randomise: Any) -> None:
    image = torch.randn(1, 3, 64, 64)
    fast = muntin.optimize(model_of(randomise))
    state = {name: value.clone() for name, value in fast.state_dict().items()}
    with torch.no_grad():
        wanted = fast(image)

    def run() -> bool:
        with torch.no_grad():
            return all(torch.equal(fast(image), wanted) for _ in range(100))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while not future.done():
            fast.load_state_dict(state)  # the same values
        assert future.result()


def test_a_map_of_other_channels_is_refused(randomise: Any) -> None:
    stage = muntin.optimize(model_of(randomise)).backbone.stages[0]
    with pytest.raises(ValueError, match="32 channels was given"):
        stage.program(torch.randn(1, 1, 50, 50))


def test_the_input_is_left_alone_and_outputs_are_their_own(randomise: Any) -> None:
    backbone = model_of(randomise).backbone
    fast = muntin.optimize(backbone)
    image = torch.randn(2, 3, 96, 64)
    before = image.clone()
    with torch.no_grad():
        maps, wanted = fast(image), muntin.runtime.fold(backbone)(image)
        kept = [m.clone() for m in maps]
        fast(torch.randn(2, 3, 96, 64))
    assert torch.equal(image, before)
    for found, again, expected in zip(maps, kept, wanted, strict=True):
        assert torch.equal(found, again)
        assert error_of(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "size"),
    [("efficientvit", (224, 224)), ("efficientvit", (61, 83)), ("swin", (224, 224)), ("swinv2", (224, 224))]
    + [("rmt", (224, 224)), ("rmt", (61, 83))],
)
def test_a_program_counts_what_its_layers_count(name: str, size: tuple[int, int], randomise: Any) -> None:
    """Maps that windows fill: a program leaves out the products of padding."""
    fast = muntin.optimize(model_of(randomise, name))
    layers = copy.deepcopy(fast)
    for module in layers.modules():
        if isinstance(module, Programmed):
            module.program = None
    image = torch.randn(2, 3, *size)
    counters = []
    for form in (fast, layers):
        with torch.no_grad():
            form(image)  # makes the biases, once
            with OperatorCounter() as counter:
                form(image)
        counters.append(counter)
    found, wanted = counters
    assert found.macs["muntin::program"] > 0
    assert found.macs.total() == wanted.macs.total()


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TELL = """
import muntin, torch
model = muntin.optimize(muntin.create_model('efficientvit_m0').eval())
print('layers into one program of compiled kernels' in model.folds, model(torch.randn(1, 3, 64, 64)).shape[1])
print(sum('libgomp' in line and 'r-xp' in line for line in open('/proc/self/maps')))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of kernels that a process without any has built, by a compiler of two words, and what it told."""
    folder = tmp_path_factory.mktemp("kernels")
    return folder, run_python(TELL, CXX="env g++", MUNTIN_CACHE=str(folder)).splitlines()


def test_a_process_without_kernels_builds_them(built: tuple[Path, list[str]]) -> None:
    """With threads that are torch's own: two OpenMP libraries in a process fight for the cores."""
    assert built[1] == ["True 1000", "1"]


def test_a_switch_and_a_broken_compiler_leave_the_layers(
    built: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    file = tmp_path / "file"
    file.touch()
    settings = (
        {"MUNTIN_NATIVE": "0"},
        {"CXX": shutil.which("false") or "false", "MUNTIN_CACHE": str(built[0])},
        {"MUNTIN_CACHE": str(file / "below")},  # a cache that cannot be written
    )
    for setting in settings:
        build.library.cache_clear()
        program.kernels.cache_clear()
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True, action="always") as told:
            for name, value in setting.items():
                patch.setenv(name, value)
            fast: Any = muntin.optimize(muntin.create_model("efficientvit_m0").eval())
        reasons = [str(warning.message) for warning in told]
        assert sum("kernels cannot be compiled" in reason for reason in reasons) == ("MUNTIN_CACHE" in setting), reasons
        assert "layers into one program of compiled kernels" not in fast.folds and not programs(fast)
        with torch.no_grad():
            assert fast(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_a_pickled_copy_runs_without_a_compiler(tmp_path: Path, randomise: Any) -> None:
    fast, image = muntin.optimize(model_of(randomise)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.save((fast, image, fast(image)), tmp_path / "fast.pt")
    code = (
        f"import torch; fast, image, wanted = torch.load({str(tmp_path / 'fast.pt')!r}, weights_only=False); "
        "torch.set_grad_enabled(False); print(torch.allclose(fast(image), wanted, rtol=1e-4))"
    )
    tests = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert run_python(code, MUNTIN_NATIVE="0", PYTHONPATH=tests) == "True"


def test_a_damaged_file_is_built_again(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    (path,) = built[0].iterdir()
    (tmp_path / path.name).write_bytes(b"no library")
    assert run_python(TELL, MUNTIN_CACHE=str(tmp_path)).splitlines() == ["True 1000", "1"]
    assert [(file.name, file.stat().st_size > 10_000) for file in tmp_path.iterdir()] == [(path.name, True)]


@pytest.mark.parametrize("name", ["efficientvit", "swin", "swinv2", "rmt"])
def test_what_is_not_a_number_is_not_hidden(name: str, randomise: Any) -> None:
    fast = muntin.optimize(model_of(randomise, name))
    image = torch.randn(2, 3, 64, 64)
    image[1, :, 20:30, 20:30] = torch.nan
    with torch.no_grad():
        found = fast(image)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_an_image_alone_and_in_a_batch_gives_the_same_bits(randomise: Any) -> None:
    for name in ("efficientvit", "swin", "swinv2", "rmt"):
        for stage in muntin.optimize(model_of(randomise, name)).backbone.stages:
            x = torch.randn(5, stage.program.input.channels, 13, 17)
            with torch.no_grad():
                assert torch.equal(stage.program(x)[3:4], stage.program(x[3:4]))
