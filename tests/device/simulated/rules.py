"""What CUDA's kernels refuse and fake kernels do not check: dtypes, layouts, sizes, devices of generators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.device.simulated.generators import device_type_of

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
_ONE_DTYPE = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::mv", "aten::addmv", "aten::dot"),
    *("aten::linear", "aten::convolution", "aten::convolution_backward"),
    *("aten::native_layer_norm", "aten::native_group_norm", "aten::_fused_rms_norm"),
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"),
    "aten::_scaled_dot_product_cudnn_attention",
}
# What CUDA has for 8-bit floats: the product, copies, fills, comparisons and views.
_WITH_FP8 = {
    *("aten::_scaled_mm", "aten::_to_copy", "aten::copy_", "aten::clone", "aten::cat", "aten::_pin_memory"),
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::full", "aten::zeros", "aten::fill_", "aten::zero_", "aten::isnan", "aten::eq", "aten::ne", "aten::flip"),
    *("aten::detach", "aten::alias", "aten::lift_fresh", "aten::view", "aten::_unsafe_view", "aten::_reshape_alias"),
    *("aten::as_strided", "aten::slice", "aten::select", "aten::expand", "aten::t", "aten::transpose", "aten::permute"),
    *("aten::unsqueeze", "aten::squeeze", "aten::split", "aten::split_with_sizes", "aten::unbind"),
    *("aten::set_", "aten::resize_", "aten::_has_compatible_shallow_copy_type", "prim::device"),
}
_LOOKUPS = ("aten::index_select", "aten::embedding", "aten::gather")
_MIN_INT8_ROWS = 16  # _int_mm needs more
_FP8_CAPABILITY = (8, 9)


class Refused(RuntimeError):
    """An operator that a GPU would refuse."""


def check(
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: Sequence[Tensor],
    *,
    capability: tuple[int, int],
    find: Callable[[str], None],
) -> None:
    """Raise Refused for what a kernel refuses, and report what may have no kernel to `find`."""
    near = [tensor for tensor in tensors if tensor.device.type == "cuda"]
    _check_generator(kwargs.get("generator"), "cuda" if near else torch.device(kwargs.get("device") or "cpu").type)
    if not near:
        return
    dtypes = {tensor.dtype for tensor in near}
    if name in _ONE_DTYPE:
        if len(dtypes) > 1:
            raise Refused(f"{name}: expected one dtype, found {sorted(map(str, dtypes))}")
        if dtypes & {*FP8, *_INTEGERS}:
            raise Refused(f"{name}: no CUDA kernel for {dtypes.pop()}")
    if dtypes & set(FP8) and name not in _WITH_FP8:
        find(f"fp8 operator: CUDA may have no kernel for {name} of fp8")
    if name in _LOOKUPS and any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
        raise Refused(f"{name}: indices and table are on different devices")
    if name == "aten::_int_mm":
        _check_int8(*args[:2])
    if name == "aten::_scaled_mm":
        if capability < _FP8_CAPABILITY:
            raise Refused("torch._scaled_mm needs compute capability 8.9 or later")
        out = kwargs.get("out_dtype") or (args[6] if len(args) > 6 else None)
        _check_fp8(*args[:4], out=out)


def _check_generator(generator: torch.Generator | None, expected: str) -> None:
    if generator is not None and device_type_of(generator) != expected:
        raise Refused(f"Expected a '{expected}' device type for generator but found '{device_type_of(generator)}'")


def _check_int8(left: Tensor, right: Tensor) -> None:
    if left.shape[0] <= _MIN_INT8_ROWS:
        raise Refused(f"_int_mm: self.size(0) needs to be greater than {_MIN_INT8_ROWS}, but got {left.shape[0]}")
    if left.shape[1] % 8 or right.shape[1] % 8 or not left.shape[1]:
        raise Refused(f"_int_mm: sizes must be multiples of 8: {tuple(left.shape)} {tuple(right.shape)}")


def _check_fp8(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, *, out: torch.dtype | None) -> None:
    """Check `_scaled_mm`, whose scales are one number each or one per row and per column."""
    if left.stride(1) != 1 or right.stride(0) != 1:
        raise Refused(f"_scaled_mm: self must be row-major, mat2 column-major: {left.stride()} {right.stride()}")
    if left.shape[1] % 16 or right.shape[1] % 16:
        raise Refused(f"_scaled_mm: sizes must be multiples of 16: {tuple(left.shape)} {tuple(right.shape)}")
    if rows.numel() == columns.numel() == 1:
        return
    if tuple(rows.shape) != (left.shape[0], 1) or tuple(columns.shape) != (1, right.shape[1]):
        raise Refused(f"_scaled_mm: row-wise scales of shapes {tuple(rows.shape)} and {tuple(columns.shape)}")
    if not (rows.is_contiguous() and columns.is_contiguous()):
        raise Refused("_scaled_mm: both scales must be contiguous")
    if {rows.dtype, columns.dtype} != {torch.float32}:
        raise Refused("_scaled_mm: both scales must be float32")
    if out != torch.bfloat16:
        raise Refused(f"_scaled_mm: row-wise scales are supported with bfloat16 results only, not {out}")
