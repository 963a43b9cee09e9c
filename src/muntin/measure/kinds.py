"""Kinds of operation, by the names of PyTorch's operators, of ONNX's, and of inductor's fused kernels.

What a name cannot say its operands do: a copy that cuts a map into windows, a gather that reads a table of weights
and not the tokens.
"""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

UNATTRIBUTED = "unattributed"

# The wrappers (linear around addmm) count with what they wrap; a trailing underscore (in place) is ignored.
_OPERATORS = {
    "matrix product": "mm addmm bmm baddbmm addbmm matmul linear mv dot addmv einsum _linear_pointwise _scaled_mm "
    "mkldnn_linear packed_linear _addmm_activation mkl_linear _mkl_linear _mkl_reorder_linear_weight",
    "convolution": "convolution conv1d conv2d conv3d _convolution mkldnn_convolution cudnn_convolution thnn_conv2d "
    "_slow_conv2d_forward _conv_depthwise2d conv_transpose2d _convolution_pointwise convolution_overrideable "
    "miopen_convolution miopen_depthwise_convolution cudnn_convolution_relu token_convolution "
    "packed_convolution depthwise conv",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math _flash_attention_forward _efficient_attention_forward "
    "_cudnn_attention_forward _fused_sdp_choice _scaled_dot_product_fused_attention_overrideable "
    "cascade window mix",
    "softmax": "softmax _softmax _safe_softmax log_softmax _log_softmax",
    "normalisation": "layer_norm native_layer_norm batch_norm native_batch_norm _batch_norm_impl_index "
    "cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training group_norm native_group_norm "
    "miopen_batch_norm linalg_vector_norm normalize rms_norm _fused_rms_norm var_mean norm",
    "activation": "gelu relu relu6 silu hardswish hardsigmoid sigmoid hardtanh leaky_relu elu tanh mish clamp_min erf",
    "window shifting": "roll index index_select gather take take_along_dim index_put",
    "copy and reshape": "copy clone contiguous cat concat stack pad constant_pad_nd _pad_enum reshape view permute "
    "transpose t as_strided expand expand_as slice select unbind flatten unflatten unsqueeze squeeze to _to_copy empty "
    "empty_like empty_strided new_empty new_zeros zeros zeros_like ones full fill zero resize _unsafe_view view_as "
    "_reshape_alias split split_with_sizes chunk narrow unfold im2col resolve_conj resolve_neg alias detach movedim "
    "numpy_T swapaxes repeat tile type_as lift_fresh set embedding arange iota scalar_tensor view_as_complex "
    "view_as_real linspace _to_dense _local_scalar_dense item full_like new_full ones_like _conj merge",
    "element-wise": "add sub mul div neg exp log sqrt rsqrt pow abs clamp maximum minimum where masked_fill dropout "
    "native_dropout eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or addcmul addcdiv sin "
    "cos floor remainder floor_divide reciprocal square feature_dropout true_divide rsub fmod rotate scale",
}
KINDS = (*_OPERATORS, "other", UNATTRIBUTED)
_KIND_OF = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}

PRODUCTS = ("matrix product", "convolution", "attention")
"""What computes; all other time is memory-bound in the words of EfficientViT's figure 2."""

GROUPS = ("tensor multiplication", "reshape", "normalisation", "copy", "addition", "others")
"""The kinds of EfficientViT's figure 2."""
_COPIES = set(
    "copy clone contiguous cat concat stack pad constant_pad_nd _pad_enum to _to_copy fill zero zeros full Concat Pad "
    "Cast Identity ReorderInput ReorderOutput".split()
)
_ADDITIONS = {"add", "sub", "rsub", "Add", "Sub", "Sum"}

_ONNX = {
    "matrix product": "MatMul Gemm FusedMatMul FusedGemm TransposeMatMul MatMulBnb4 Einsum MatMulNBits",
    "convolution": "Conv FusedConv NhwcFusedConv ConvTranspose NhwcConv",
    "attention": "Attention MultiHeadAttention GroupQueryAttention PackedAttention FlashAttention",
    "softmax": "Softmax LogSoftmax",
    "normalisation": "LayerNormalization SkipLayerNormalization BatchNormalization SimplifiedLayerNormalization "
    "GroupNorm InstanceNormalization LpNormalization GroupNormalization RMSNormalization",
    "activation": "Gelu FastGelu BiasGelu QuickGelu Relu Clip HardSwish HardSigmoid Sigmoid Tanh LeakyRelu Elu Erf "
    "Silu Swish Mish",
    "window shifting": "Gather GatherND GatherElements ScatterND",
    "copy and reshape": "Reshape Transpose Concat Slice Split Expand Squeeze Unsqueeze Flatten Pad Cast Identity Shape "
    "Tile ConstantOfShape Range Size ReorderInput ReorderOutput Constant DepthToSpace SpaceToDepth",
    "element-wise": "Add Sub Mul Div Neg Exp Log Sqrt Pow Abs Max Min Where And Or Not Equal Less LessOrEqual Greater "
    "GreaterOrEqual Sin Cos Floor Mod Reciprocal Sum Round Sign",
}
_ONNX_KIND_OF = {name: kind for kind, names in _ONNX.items() for name in names.split()}

# A fused kernel is of the first of these that it holds: what it would still cost were the rest not there.
_RANK = (
    "convolution",
    "matrix product",
    "attention",
    "softmax",
    "normalisation",
    "window shifting",
    "activation",
    "other",
    "element-wise",
    "copy and reshape",
)


def plain_name(operator: str) -> str:
    """`aten::add_` or `aten.add.Tensor` -> `add`."""
    name = operator.rpartition("::")[2]
    if "." in name:
        name = name.split(".")[1] if name.count(".") > 1 or name.startswith(("aten.", "prims.")) else name.split(".")[0]
    return name if name in _KIND_OF else name.rstrip("_") or name


def kind_of(operator: str) -> str:
    """The kind of an operator such as `aten::addmm`, by its name alone."""
    if operator == "muntin::stage":  # the operators inside have times of their own; what is left is between them
        return UNATTRIBUTED
    return _KIND_OF.get(plain_name(operator), "other")


def kind_of_node(op_type: str) -> str:
    """The kind of an ONNX node such as `MatMul`, by its type alone."""
    return _ONNX_KIND_OF.get(op_type, "other")


def kind_of_fused(kinds: Iterable[str]) -> str:
    """The kind of a kernel that fuses operators of these."""
    found = set(kinds)
    return next((kind for kind in _RANK if kind in found), "other")


def group_of(operator: str, kind: str) -> str:
    """Which of GROUPS an operator of this kind is. Convolutions multiply; a roll, a partition or a gather reorders."""
    name = operator if operator in _ONNX_KIND_OF else plain_name(operator)
    if kind in PRODUCTS:
        return "tensor multiplication"
    if kind == "normalisation":
        return "normalisation"
    if kind == "window shifting":
        return "reshape"
    if kind == "copy and reshape":
        return "copy" if name in _COPIES else "reshape"
    if kind == "element-wise" and (name in _ADDITIONS or re.search(r"fused.*_add(_|$)", name)):
        return "addition"
    return "others"


def cuts_windows(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor is a map cut into windows, or windows put together, before the copy that makes it so.

    (B, rows, cols, w, w, C) over the memory of (B, rows, w, cols, w, C), or the other way round: how timm,
    torchvision, transformers and `cascaded.partition` write it. Patch merging (…, 2, 2, C) crosses its strides
    and is none.
    """
    if len(shape) != 6 or min(shape[1:5]) < 1 or shape[2] == 1 or shape[3] == 1:
        return False
    _, rows, second, third, fourth, _ = strides
    cut = rows == third * shape[3] and second == fourth * shape[4]
    merged = rows == third * shape[3] and third == second * shape[2] and fourth < second
    return (cut and third > second) or merged


def kind_of_call(operator: str, tensors: Sequence[Tensor], of_weights: bool, merges_patches: bool) -> str:
    """The kind of a call, of which the operands are known.

    of_weights: all operands are made from weights alone, so that a gather reads a table (of position biases) and not
        the tokens. merges_patches: the call is within patch merging, whose gather takes the place of its copy.
    """
    kind = kind_of(operator)
    if kind == "window shifting" and (of_weights or merges_patches):
        return "copy and reshape"
    if kind == "copy and reshape" and plain_name(operator) in ("clone", "copy", "contiguous"):
        if any(t.layout.__str__() == "torch.strided" and cuts_windows(t.shape, t.stride()) for t in tensors):
            return "window shifting"
    return kind
