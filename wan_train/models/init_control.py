"""New control layers for a plain model: `--init_control` adds them to a T2V or I2V checkpoint while it is read.

At the first step the model computes the same as the base: the new columns of the patch embedding, the camera adapter's
first and last convolutions, the image values in cross-attention (`v_img`), VACE's `before_proj` and `after_proj` and
the motion controller's last Linear are zero, so that only zeros are added. The outputs are bit-identical unless kernels
round differently because matrices are wider, or text rows follow image rows. There are two exceptions: a reference's
tokens (`ref_conv`) are part of the sequence even if they are zeros, and the mask columns of an I2V base are dropped for
tasks whose layout has images without a mask (VideoX-Fun's Wan2.1 control models).

The inputs of zero layers are not zero, or neither would ever receive a gradient: VACE's patch embedding copies the
base's for inactive and reactive latents, VACE blocks are copies of the base blocks that they give hints to, image keys
are copies of the text keys, and the rest is drawn at random, seeded by name (uniform with variance 1/(3 fan_in), as
torch initialises Linears).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan_train.errors import InputError
from wan_train.flow.keyed import generator_of
from wan_train.models.dit.control import CAMERA_SHRINK
from wan_train.models.stacks import BASE, hinted_layers, read_block_name
from wan_train.models.variants import FRAME_STEP, ControlInputs, Variant
from wan_train.models.weights import Shapes

REFERENCE, MOTION = "reference", "motion"  # kinds of --init_control other than "auto"
CLIP_WIDTH = 1280  # of the published image encoder
CAMERA_CHANNELS = 24  # six Pluecker coordinates for each of four pixel frames
VACE_MASK_CHANNELS = 64  # of the VACE context, after inactive and reactive latents
DEEP = 40  # with at least this many blocks VACE has one for every fifth, otherwise for every second, as published
PATCH = "patch_embedding.weight"

Pairs = Iterable[tuple[str, Tensor]]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """A new tensor that does not depend on the base: constant `value`, or random, seeded by its name, if `fan_in` is
    set."""

    shape: tuple[int, ...]
    value: float = 0.0
    fan_in: int = 0

    def tensor(self, name: str) -> Tensor:
        """Return the tensor in float32."""
        if not self.fan_in:
            return torch.full(self.shape, self.value)
        limit = 1 / math.sqrt(self.fan_in)
        return torch.empty(self.shape).uniform_(-limit, limit, generator=generator_of(f"init_control/{name}"))


@dataclass(frozen=True)
class Derived:
    """A new tensor computed from one of the base's."""

    base: str
    shape: tuple[int, ...]
    change: Change = lambda tensor: tensor


@dataclass(frozen=True)
class NewLayers:
    """Tensors added to a base, by official name. A `derived` tensor may replace one of the base."""

    made: Mapping[str, Made] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all new and changed tensors."""
        return {name: new.shape for table in (self.made, self.derived) for name, new in table.items()}

    @property
    def idle(self) -> list[str]:
        """Return the weights that have no effect until they are trained."""
        zeros = [name for name, new in self.made.items() if name.endswith(".weight") and not (new.value or new.fan_in)]
        return [*(name for name in self.derived if name == PATCH), *zeros]

    def __or__(self, other: "NewLayers") -> "NewLayers":
        return NewLayers({**self.made, **other.made}, {**self.derived, **other.derived})


def new_layers(shapes: Shapes, variant: Variant, model_kind: str, label: str) -> NewLayers:
    """Return the layers that a base with `shapes` (official names) lacks for a task.

    `model_kind` "auto" adds those that every model of the task has, "reference" also those for a reference image, and
    "motion" a motion controller only. Raises InputError, naming the base by `label`, if the base cannot be extended or
    lacks nothing.
    """
    _require_plain(shapes, label)
    if model_kind == MOTION:
        return _motion(shapes)
    control = variant.control or ControlInputs()
    if model_kind == REFERENCE and not control.reference:
        raise InputError(f"--init_control reference: --task {variant.name} takes no reference image: use auto")
    parts = NewLayers()
    if shapes[PATCH][1] != variant.in_dim:
        parts |= _widened(shapes, variant, label)
    if control.reference and (model_kind == REFERENCE or variant.experts is not None):
        parts |= _reference(shapes)
    if control.camera:
        parts |= _camera(shapes)
    if control.vace:
        parts |= _vace(shapes)
    reads_clip = "img_emb.proj.0.weight" in shapes
    if variant.reads_clip and not reads_clip:
        parts |= _clip(shapes)
    if reads_clip and not variant.reads_clip:
        raise InputError(f"{label} uses CLIP image tokens, but --task {variant.name} does not: give a T2V model")
    if not parts.shapes:
        raise InputError(
            f"--init_control {model_kind}: {label} has all layers of --task {variant.name}: omit the option"
        )
    return parts


def initialised(tensors: Pairs, new: NewLayers) -> Iterator[tuple[str, Tensor]]:
    """Yield a base's tensors (official names) and the new layers, these in the dtype of its patch embedding."""
    by_base: dict[str, list[str]] = {}
    for name, derived in new.derived.items():
        by_base.setdefault(derived.base, []).append(name)
    dtype = torch.float32
    for name, tensor in tensors:
        if name == PATCH:
            dtype = tensor.dtype
        if name not in new.derived:
            yield name, tensor
        for added in by_base.get(name, ()):
            yield added, new.derived[added].change(tensor)
    for name, made in new.made.items():
        yield name, made.tensor(name).to(dtype)


def _require_plain(shapes: Shapes, label: str) -> None:
    submodules = {name.partition(".")[0] for name in shapes}
    has = submodules & {"ref_conv", "control_adapter", "vace_patch_embedding", "motion_controller"}
    if has:
        raise InputError(f"--init_control: {label} already has {min(has)}: omit the option, or give a plain model")
    if "img_emb.emb_pos" in shapes:
        raise InputError(f"--init_control: {label} is a first-and-last-frame model: give a T2V or I2V model")


def _widened(shapes: Shapes, variant: Variant, label: str) -> NewLayers:
    """Return the patch embedding with a column for each channel of the task, zero for channels that the base lacks."""
    dim, in_dim, *patch = shapes[PATCH]
    channels = variant.space.channels
    image = {"mask": FRAME_STEP, "image": channels}
    sources = {channels: {"noise": channels}, channels + FRAME_STEP + channels: {"noise": channels, **image}}
    source, target = sources.get(in_dim), _layout(variant)
    if source is None or ("image" in source and "image" not in target):
        raise InputError(
            f"--init_control: {label} has {in_dim} input channels, which cannot be extended to the {variant.in_dim} of"
            f" --task {variant.name}: give a T2V model, or an I2V model for a task with a start image"
        )

    def widen(weight: Tensor) -> Tensor:
        columns = dict(zip(source, weight.split(list(source.values()), dim=1), strict=True))
        zeros = {part: weight.new_zeros(dim, count, *patch) for part, count in target.items()}
        return torch.cat([columns.get(part, zeros[part]) for part in target], dim=1)

    return NewLayers(derived={PATCH: Derived(PATCH, (dim, sum(target.values()), *patch), widen)})


def _layout(variant: Variant) -> dict[str, int]:
    """Return the number of channels of each input of a task's models, in order (VideoX-Fun's and official layouts)."""
    channels = variant.space.channels
    parts = {"noise": channels}
    if variant.control is not None and variant.control.video:
        parts["control"] = channels
    if variant.images is not None and not variant.images.fused:
        parts |= {"image": channels} if variant.images.alone else {"mask": FRAME_STEP, "image": channels}
    return parts


def _reference(shapes: Shapes) -> NewLayers:
    dim, _, _, *patch = shapes[PATCH]
    channels = shapes["head.head.weight"][0] // math.prod(patch)
    return NewLayers({"ref_conv.weight": Made((dim, channels, *patch)), "ref_conv.bias": Made((dim,))})


def _camera(shapes: Shapes) -> NewLayers:
    dim = shapes[PATCH][0]
    residual, wide = "control_adapter.residual_blocks.0", (dim, dim, 3, 3)
    return NewLayers(
        {
            "control_adapter.conv.weight": Made((dim, CAMERA_CHANNELS * CAMERA_SHRINK**2, 2, 2)),
            "control_adapter.conv.bias": Made((dim,)),
            f"{residual}.conv1.weight": Made(wide, fan_in=math.prod(wide[1:])),
            f"{residual}.conv1.bias": Made((dim,)),
            f"{residual}.conv2.weight": Made(wide),
            f"{residual}.conv2.bias": Made((dim,)),
        }
    )


def _clip(shapes: Shapes) -> NewLayers:
    """Return the image embedding, and for every block image keys copied from the text keys and zero image values."""
    dim, width = shapes[PATCH][0], CLIP_WIDTH
    made = {
        "img_emb.proj.0.weight": Made((width,), 1.0),
        "img_emb.proj.0.bias": Made((width,)),
        "img_emb.proj.1.weight": Made((width, width), fan_in=width),
        "img_emb.proj.1.bias": Made((width,)),
        "img_emb.proj.3.weight": Made((dim, width), fan_in=width),
        "img_emb.proj.3.bias": Made((dim,)),
        "img_emb.proj.4.weight": Made((dim,), 1.0),
        "img_emb.proj.4.bias": Made((dim,)),
    }
    derived = {}
    for index in range(_num_blocks(shapes)):
        attention = f"blocks.{index}.cross_attn"
        made |= {f"{attention}.v_img.weight": Made((dim, dim)), f"{attention}.v_img.bias": Made((dim,))}
        for new, base in (
            ("k_img.weight", "k.weight"),
            ("k_img.bias", "k.bias"),
            ("norm_k_img.weight", "norm_k.weight"),
        ):
            derived[f"{attention}.{new}"] = Derived(f"{attention}.{base}", shapes[f"{attention}.{base}"])
    return NewLayers(made, derived)


def _vace(shapes: Shapes) -> NewLayers:
    dim, channels, *patch = shapes[PATCH]
    count = _num_blocks(shapes)
    layers = hinted_layers(count, -(-count // (5 if count >= DEEP else 2)))

    def context(weight: Tensor) -> Tensor:
        return torch.cat([weight, weight, weight.new_zeros(dim, VACE_MASK_CHANNELS, *patch)], dim=1)

    derived = {
        "vace_patch_embedding.weight": Derived(PATCH, (dim, 2 * channels + VACE_MASK_CHANNELS, *patch), context),
        "vace_patch_embedding.bias": Derived("patch_embedding.bias", (dim,)),
    }
    numbers = {layer: number for number, layer in enumerate(layers)}
    for name, shape in shapes.items():
        part = read_block_name(name)
        if part is not None and part.stack == BASE and part.index in numbers:
            derived[f"vace_blocks.{numbers[part.index]}.{part.rest}"] = Derived(name, tuple(shape))
    modules = ["vace_blocks.0.before_proj", *(f"vace_blocks.{number}.after_proj" for number in numbers.values())]
    weights = {f"{module}.weight": Made((dim, dim)) for module in modules}
    return NewLayers(weights | {f"{module}.bias": Made((dim,)) for module in modules}, derived)


def _motion(shapes: Shapes) -> NewLayers:
    dim, width = shapes["time_embedding.0.weight"]
    sides = {0: (dim, width), 2: (dim, dim), 4: (6 * dim, dim)}
    made: dict[str, Made] = {}
    for index, (out, fan_in) in sides.items():
        weight = Made((out, fan_in), fan_in=0 if index == 4 else fan_in)
        name = f"motion_controller.linear.{index}"
        made |= {f"{name}.weight": weight, f"{name}.bias": Made((out,))}
    return NewLayers(made)


def _num_blocks(shapes: Shapes) -> int:
    return len({part.index for part in map(read_block_name, shapes) if part is not None and part.stack == BASE})
