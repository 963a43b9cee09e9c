"""Where the time of a forward pass goes, by kind of operation; the kinds add up to the measured wall time."""

import json
import os
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muntin.errors import UserError

UNATTRIBUTED = "unattributed"

# The wrappers (linear around addmm) count with what they wrap; a trailing underscore (in place) is ignored.
_OPERATORS = {
    "matrix product": "mm addmm bmm baddbmm addbmm matmul linear mv dot addmv einsum _linear_pointwise _scaled_mm "
    "mkldnn_linear _addmm_activation mkl_linear _mkl_linear _mkl_reorder_linear_weight",
    "convolution": "convolution conv1d conv2d conv3d _convolution mkldnn_convolution cudnn_convolution thnn_conv2d "
    "_slow_conv2d_forward _conv_depthwise2d conv_transpose2d _convolution_pointwise convolution_overrideable "
    "miopen_convolution miopen_depthwise_convolution cudnn_convolution_relu",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math _flash_attention_forward _efficient_attention_forward "
    "_cudnn_attention_forward _fused_sdp_choice",
    "softmax": "softmax _softmax _safe_softmax log_softmax _log_softmax",
    "normalisation": "layer_norm native_layer_norm batch_norm native_batch_norm _batch_norm_impl_index "
    "cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training group_norm native_group_norm "
    "miopen_batch_norm linalg_vector_norm normalize rms_norm _fused_rms_norm",
    "activation": "gelu relu relu6 silu hardswish hardsigmoid sigmoid hardtanh leaky_relu elu tanh mish clamp_min",
    "window shifting": "roll index index_select gather take take_along_dim index_put embedding",
    "copy and reshape": "copy clone contiguous cat concat stack pad constant_pad_nd _pad_enum reshape view permute "
    "transpose t as_strided expand expand_as slice select unbind flatten unflatten unsqueeze squeeze to _to_copy empty "
    "empty_like empty_strided new_empty new_zeros zeros zeros_like ones full fill zero resize _unsafe_view view_as "
    "_reshape_alias split split_with_sizes chunk narrow unfold im2col resolve_conj resolve_neg alias detach movedim "
    "numpy_T swapaxes repeat tile type_as lift_fresh set",
    "element-wise": "add sub mul div neg exp log sqrt rsqrt pow abs clamp maximum minimum where masked_fill dropout "
    "native_dropout eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or addcmul addcdiv sin "
    "cos floor remainder floor_divide reciprocal square feature_dropout true_divide rsub",
}
KINDS = (*_OPERATORS, "other", UNATTRIBUTED)
_KIND_OF = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}


def kind_of(operator: str) -> str:
    """The kind of a profiled operator such as `aten::addmm`."""
    name = operator.rpartition("::")[2]
    return _KIND_OF.get(name) or _KIND_OF.get(name.rstrip("_")) or "other"


@dataclass(frozen=True)
class Operator:
    """One operator: milliseconds and calls in a forward pass, without what it calls itself."""

    name: str
    kind: str
    ms: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one forward pass by kind; they add up to `wall_ms`.

    `wall_ms` was measured around the profiled call, `plain_ms` (median) without the profiler, whose own cost is
    the difference; what no operator accounts for (Python, launching, an idle GPU) is "unattributed".
    """

    kinds: dict[str, float]
    operators: list[Operator]
    wall_ms: float
    plain_ms: float
    device: str
    threads: int
    shape: tuple[int, ...]

    def share(self, kind: str) -> float:
        """Part of the wall time, 0..1."""
        return self.kinds[kind] / self.wall_ms

    def table(self) -> str:
        lines = [f"{'kind':<18} {'ms':>9} {'share':>7}", "-" * 36]
        for kind, ms in sorted(self.kinds.items(), key=lambda item: -item[1]):
            if ms > 0:
                lines.append(f"{kind:<18} {ms:>9.3f} {self.share(kind):>7.1%}")
        lines.append(f"{'measured':<18} {self.wall_ms:>9.3f} {1:>7.1%}")
        lines.append(f"without the profiler {self.plain_ms:.3f} ms; images {'x'.join(map(str, self.shape))}")
        return "\n".join(lines)

    def json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _wall(model: nn.Module, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _profiled(model: nn.Module, x: Tensor) -> tuple[float, list[Operator]]:
    """Wall time of one call, and the time of each operator in it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports on stderr that it starts and stops
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if x.is_cuda else [])
    with torch.profiler.profile(activities=activities) as profiler:
        wall = _wall(model, x)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in profiler.events():
        # Kernels are listed once more by themselves; the operator that launched them has their time already.
        if event.device_type == torch.autograd.DeviceType.CPU and "::" in event.name:
            microseconds = event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
            found[event.name, _kind_in_context(event)].append(microseconds / 1000)
    operators = [Operator(name, kind, sum(times), len(times)) for (name, kind), times in found.items()]
    return wall, sorted(operators, key=lambda operator: -operator.ms)


def _kind_in_context(event: Any) -> str:
    """What an operator calls is of its kind (a roll's copies are shifting), but a product's copies are copies."""
    kind = kind_of(event.name)
    outer = event.cpu_parent
    while outer is not None:
        if kind_of(outer.name) not in ("other", "matrix product", "copy and reshape", "element-wise"):
            kind = kind_of(outer.name)
        outer = outer.cpu_parent
    return kind


def profile(model: nn.Module, x: Tensor, *, calls: int = 5, warmup: int = 3) -> Profile:
    """Measure one forward pass by kind of operation, in inference mode.

    model: any module; it runs in evaluation mode and is left as it was.
    x: (B, 3, H, W) images on the model's device.
    calls: profiled passes, of which the median is taken; as many run before without the profiler.
    Raises UserError where there is nothing to run.
    """
    if calls < 1 or x.numel() == 0:
        raise UserError(f"{calls} calls on images of shape {tuple(x.shape)} measure nothing; give at least one of each")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(warmup):
                model(x)
            plain = statistics.median(_wall(model, x) for _ in range(calls))
            _profiled(model, x)  # a first use sets the profiler up, which is not the model's time
            runs = sorted((_profiled(model, x) for _ in range(calls)), key=lambda run: run[0])
            wall, operators = runs[calls // 2]
    finally:
        for module, training in modes.items():
            module.training = training
    kinds: defaultdict[str, float] = defaultdict(float)
    for operator in operators:
        kinds[operator.kind] += operator.ms
    attributed = sum(kinds.values())
    wall = max(wall, attributed)  # clocks of two sources may differ by a little
    complete = {kind: kinds[kind] for kind in KINDS if kind != UNATTRIBUTED} | {UNATTRIBUTED: wall - attributed}
    return Profile(
        kinds=complete,
        operators=operators,
        wall_ms=wall,
        plain_ms=plain,
        device=str(x.device),
        threads=torch.get_num_threads(),
        shape=tuple(x.shape),
    )
