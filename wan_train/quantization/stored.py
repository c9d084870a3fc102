"""How checkpoints store matrices, and how those of a DiT's blocks are stored in memory.

8-bit files: plain ones are all e4m3; scaled ones (ComfyUI's, musubi-tuner's) have a float32 scale for each matrix, per
tensor, per output, or per group of inputs. `M` below is a module's official dotted name.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.precision import widened
from wan_train.quantization.schemes import MULTIPLES, SCALE, SCHEMES, Scheme, install, scale_shape
from wan_train.quantization.settings import FastWeightSettings, WeightSettings
from wan_train.storage import Header, TensorSource, read_tensors

Shapes = Mapping[str, tuple[int, ...]]

_SCALES = (".scale_weight", ".weight_scale")
_AUXILIARY = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class StoragePlan:
    """How matrices of the blocks are stored in memory, by module; modules in neither table keep the file's dtype.

    `schemes`: quantised while loading. `kept`: the file's codes with their scale (out or 1, groups, 1), or None without
    one, multiplied as in `scheme_of_kept`.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    kept: Mapping[str, Tensor | None] = field(default_factory=dict)
    scheme_of_kept: Scheme = SCHEMES["fp8"]

    def codes(self) -> set[str]:
        """Return the names of tensors with codes or scales, which must not be cast later."""
        modules = set(self.schemes) | set(self.kept)
        return {f"{module}.{leaf}" for module in modules for leaf in ("weight", SCALE)}

    def code_dtypes(self, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Return the dtype of each quantised weight by name; `stored` has the file's dtypes by name."""
        of_scheme = {scheme: scheme.quantise(torch.zeros(1, 1)).weight.dtype for scheme in set(self.schemes.values())}
        quantised = {f"{module}.weight": of_scheme[scheme] for module, scheme in self.schemes.items()}
        return quantised | {f"{module}.weight": stored[f"{module}.weight"] for module in self.kept}


NOTHING_QUANTISED = StoragePlan()


def install_plan(model: nn.Module, plan: StoragePlan, shapes: Shapes) -> None:
    """Prepare the Linears of a model on the meta device for the plan; `shapes` of weights by official name."""
    linears = {module: scheme.linear for module, scheme in plan.schemes.items()}
    scales = {module: scale_shape(scheme, shapes[f"{module}.weight"]) for module, scheme in plan.schemes.items()}
    for module, scale in plan.kept.items():
        linears[module] = plan.scheme_of_kept.linear
        scales[module] = None if scale is None else tuple(scale.shape)
    install(model, linears, {module: shape for module, shape in scales.items() if shape is not None})


def is_auxiliary(name: str) -> bool:
    """Return whether a tensor of a scaled file is a scale or other metadata rather than a weight."""
    return name.endswith(_AUXILIARY) or name.rpartition(".")[2] == _MARKER


def storage_dtype(header: Header) -> torch.dtype:
    """Return the dtype of the file's matrices; the narrowest one, because fp8 files keep some blocks wide."""
    matrices = [d for name, d in header.dtypes.items() if name.endswith("self_attn.q.weight") or "attn1.to_q" in name]
    return min(matrices or header.dtypes.values(), key=lambda dtype: dtype.itemsize)


def is_scaled(header: Header) -> bool:
    """Return whether the file has scales."""
    return any(name.endswith(_SCALES) for name in header.shapes)


def check_storage(header: Header, settings: WeightSettings, label: str) -> None:
    """Raise InputError for a storage precision that this file cannot provide."""
    stored = storage_dtype(header)
    if stored not in (*_FP8, *_WIDE):
        raise InputError(f"{label} stores its matrices as {stored}: give a bf16, fp16, fp32 or fp8 file")
    if is_scaled(header):
        check_scales(header, label)
    if stored not in _FP8:
        return
    if not (settings.fp8_base or settings.int8_base):
        raise InputError(
            f"{label} is an fp8 file: add --fp8_base (--fp8 in the generator), or give a bf16 or fp16 file"
        )
    if settings.fp8_scaled and not is_scaled(header):
        raise InputError(
            f"{label} is an fp8 file without scales, and --fp8_scaled cannot restore the precision it has lost: "
            "omit --fp8_scaled, or give a bf16 or fp16 file"
        )


def check_scales(header: Header, label: str) -> None:
    """Raise InputError unless each 8-bit matrix of a scaled file has a scale that fits, judged by its header."""
    scaled = set()
    for name in (name for name in header.shapes if name.endswith(_SCALES)):
        module = name.rpartition(".")[0]
        _check_dtype(module, header.dtypes[name])
        _three_axes(module, header.shapes[name], header.shapes.get(f"{module}.weight"))
        scaled.add(f"{module}.weight")
    codes = [name for name, dtype in header.dtypes.items() if dtype in _FP8 and name.endswith(".weight")]
    lacking = [name for name in codes if len(header.shapes[name]) == 2 and name not in scaled]
    if lacking:
        raise InputError(f"{label} has no scale for the 8-bit weight {lacking[0]}: give a complete file")


def plan_storage(
    header: Header,
    matrices: Shapes,
    scales: Mapping[str, Tensor],
    settings: WeightSettings,
    touched: Container[str] = (),
) -> StoragePlan:
    """Plan the storage of the matrices (out, in) that are quantised; `scales` by module as in `read_scales`.

    Matrices changed by a LoRA (`touched`) are quantised again, with scales, even if the file's codes are kept
    otherwise.
    """
    wanted = _scheme_name(settings)
    if wanted is None:
        return StoragePlan()
    schemes: dict[str, Scheme] = {}
    kept: dict[str, Tensor | None] = {}
    stored = storage_dtype(header)
    fp8_file = stored in _FP8
    for module, shape in matrices.items():
        name = _scheme_for(module, shape, wanted, settings)
        serves = wanted != "fp8_fast" or (name == wanted and _can_multiply(stored, scales.get(module)))
        if fp8_file and module not in touched and serves and name != "int8":
            kept[module] = scales.get(module)
        elif name is not None:
            schemes[module] = SCHEMES["fp8_scaled" if fp8_file and name == "fp8" else name]
    return StoragePlan(schemes, kept, SCHEMES["fp8_fast" if wanted == "fp8_fast" else "fp8"])


def scheme_names(settings: WeightSettings) -> tuple[str, ...]:
    """Return the names of the schemes that store matrices with these settings."""
    wanted = _scheme_name(settings)
    if wanted is None:
        return ()
    return (wanted, "fp8_scaled") if wanted == "fp8_fast" else (wanted,)


def _scheme_name(settings: WeightSettings) -> str | None:
    if settings.int8_base:
        return "int8"
    if isinstance(settings, FastWeightSettings) and settings.fp8_fast:
        return "fp8_fast"
    if settings.fp8_base:
        return "fp8_scaled" if settings.fp8_scaled else "fp8"
    return None


def _scheme_for(module: str, shape: tuple[int, ...], wanted: str, settings: WeightSettings) -> str | None:
    if wanted == "int8" and module.endswith("ffn.2") and not settings.int8_ffn2:
        return None
    if any(side % MULTIPLES.get(wanted, 1) for side in shape):
        return "fp8_scaled" if wanted == "fp8_fast" else None
    return wanted


def _can_multiply(stored: torch.dtype, scale: Tensor | None) -> bool:
    """Return whether fp8 products can use a file's codes: CUDA requires e4m3 and at most one scale per output."""
    return stored is torch.float8_e4m3fn and scale is not None and scale.shape[1] == 1


def read_scales(
    source: TensorSource, header: Header, rename: Callable[[str], str], shapes: Shapes
) -> dict[str, Tensor]:
    """Return the scales of a scaled file by module, each (out or 1, groups, 1) float32."""
    if not is_scaled(header):
        return {}
    found = {}
    for name, tensor in read_tensors(source):
        ending = next((ending for ending in _SCALES if name.endswith(ending)), None)
        if ending is not None:
            module = rename(name.removesuffix(ending))
            _check_dtype(module, tensor.dtype)
            axes = _three_axes(module, tensor.shape, shapes.get(f"{module}.weight"))
            found[module] = tensor.to(torch.float32, copy=True).reshape(axes)
    return found


def _check_dtype(module: str, dtype: torch.dtype) -> None:
    if dtype not in _WIDE:
        raise InputError(f"the scale of {module} is stored as {dtype}: give a file with float32 scales")


def _three_axes(module: str, scale: Iterable[int], matrix: Iterable[int] | None) -> tuple[int, ...]:
    """Return a scale's shape in a file, from () and (out,) to (out, groups, 1), as (out or 1, groups, 1)."""
    given, sides = tuple(scale), tuple(matrix or ())
    count = math.prod(given)
    axes = given
    if count and len(given) < 3:
        axes = (1, 1, 1) if count == 1 else (given[0], count // given[0], 1)
    fits = count and len(sides) == 2 and len(axes) == 3 and axes[2] == 1
    if not fits or axes[0] not in (1, sides[0]) or sides[1] % axes[1]:
        raise InputError(f"the scale of {module} has shape {list(given)}, which does not fit its matrix {list(sides)}")
    return axes


def unscaled(
    tensors: Iterable[tuple[str, Tensor]], scales: Mapping[str, Tensor], kept: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a scaled file: codes multiplied by their scale, in float32.

    Codes of `kept` modules are not multiplied but followed by their scale; other auxiliary tensors are dropped.
    """
    for name, tensor in tensors:
        if is_auxiliary(name):
            continue
        module = name.removesuffix(".weight")
        scale = scales.get(module) if name != module else None
        if scale is None:
            yield name, tensor
        elif module in kept:
            yield name, tensor
            yield f"{module}.{SCALE}", scale
        else:
            yield name, widened(tensor, scale, torch.float32)


def dtypes_kept(
    stored: Mapping[str, torch.dtype], dtype: torch.dtype | None, codes: set[str]
) -> Callable[[str, Tensor], torch.dtype]:
    """Return the function from name and tensor to storage dtype: `dtype`, or by default the file's.

    `stored` has the file's dtypes by name; 8-bit ones become bfloat16. Codes and scales keep their dtype.
    """

    def kept(name: str, tensor: Tensor) -> torch.dtype:
        if name in codes:
            return tensor.dtype
        own = stored.get(name, tensor.dtype)
        return dtype or (torch.bfloat16 if own.itemsize == 1 else own)

    return kept
