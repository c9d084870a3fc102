"""Control layers for a plain model: what `--init_control` adds to a T2V or I2V checkpoint while it is read.

The first step computes what the base computes: new columns of the patch embedding, the camera's first and last
convolutions, the values of images in cross-attention (`v_img`), VACE's `before_proj` and `after_proj` and the motion
controller's last Linear are zero, so that zeros are added to each sum. It is so bit for bit, but for kernels that round
otherwise where their matrices are wider, or rows of the text follow those of images. There are two exceptions. A
reference's tokens (`ref_conv`) stand in the sequence even when they are zeros, where the base has none. And the mask
columns of an I2V base are left out where the task's layout has images without a mask (VideoX-Fun's Wan2.1 control
models).

What a zero layer reads is not zero, or neither would ever get a gradient: VACE's patch embedding is the base's for
inactive and reactive latents, its blocks are copies of the base's that they hint to, the keys of images those of the
text, and the rest is drawn by its name (uniform, of variance 1/(3 fan_in), as torch draws Linears).
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

REFERENCE, MOTION = "reference", "motion"  # kinds beside "auto"
CLIP_WIDTH = 1280  # of the published image encoder
CAMERA_CHANNELS = 24  # six Pluecker coordinates for each of four pixel frames
VACE_MASK_CHANNELS = 64  # of the VACE context, behind inactive and reactive latents
DEEP = 40  # number of blocks from which VACE hints to every fifth, below to every second, as in published models
PATCH = "patch_embedding.weight"

Pairs = Iterable[tuple[str, Tensor]]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """A new tensor that no weight of the base decides: all `value`, or with `fan_in` drawn by its name."""

    shape: tuple[int, ...]
    value: float = 0.0
    fan_in: int = 0

    def tensor(self, name: str) -> Tensor:
        """The tensor in float32."""
        if not self.fan_in:
            return torch.full(self.shape, self.value)
        limit = 1 / math.sqrt(self.fan_in)
        return torch.empty(self.shape).uniform_(-limit, limit, generator=generator_of(f"init_control/{name}"))


@dataclass(frozen=True)
class Derived:
    """A new tensor that is made of one of the base's."""

    base: str
    shape: tuple[int, ...]
    change: Change = lambda tensor: tensor


@dataclass(frozen=True)
class NewLayers:
    """What is added to a base, by official name. A `derived` tensor may take the place of the base's own."""

    made: Mapping[str, Made] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all new and changed tensors."""
        return {name: new.shape for table in (self.made, self.derived) for name, new in table.items()}

    @property
    def idle(self) -> list[str]:
        """The weights that add nothing until they are trained."""
        zeros = [name for name, new in self.made.items() if name.endswith(".weight") and not (new.value or new.fan_in)]
        return [*(name for name in self.derived if name == PATCH), *zeros]

    def __or__(self, other: "NewLayers") -> "NewLayers":
        return NewLayers({**self.made, **other.made}, {**self.derived, **other.derived})


def new_layers(shapes: Shapes, variant: Variant, model_kind: str, label: str) -> NewLayers:
    """What a base with these `shapes`, official names, lacks to serve a task.

    `model_kind` "auto" adds what every model of the task has, "reference" a reference image too, where the task may
    have one, "motion" a motion controller alone. InputError that names the base, `label`, where it cannot become such a
    model or nothing has to be added.
    """
    _require_plain(shapes, label)
    if model_kind == MOTION:
        return _motion(shapes)
    control = variant.control or ControlInputs()
    if model_kind == REFERENCE and not control.reference:
        raise InputError(f"--init_control reference: --task {variant.name} reads no reference image: give auto")
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
        raise InputError(f"{label} reads an image through CLIP, but --task {variant.name} has none: give a T2V model")
    if not parts.shapes:
        raise InputError(f"--init_control {model_kind}: {label} has all that --task {variant.name} reads: leave it out")
    return parts


def initialised(tensors: Pairs, new: NewLayers) -> Iterator[tuple[str, Tensor]]:
    """A pipe that adds the new layers to a base's tensors under official names, in its patch embedding's dtype."""
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
        raise InputError(f"--init_control: {label} has a {min(has)} already: leave it out, or give a plain model")
    if "img_emb.emb_pos" in shapes:
        raise InputError(f"--init_control: {label} reads a first and a last image: give a T2V or I2V model")


def _widened(shapes: Shapes, variant: Variant, label: str) -> NewLayers:
    """The patch embedding with a column for each channel of the task, zeros where the base has none."""
    dim, in_dim, *patch = shapes[PATCH]
    channels = variant.space.channels
    image = {"mask": FRAME_STEP, "image": channels}
    sources = {channels: {"noise": channels}, channels + FRAME_STEP + channels: {"noise": channels, **image}}
    source, target = sources.get(in_dim), _layout(variant)
    if source is None or ("image" in source and "image" not in target):
        raise InputError(
            f"--init_control: {label} reads {in_dim} channels, of which --task {variant.name} ({variant.in_dim}) cannot"
            " be made: give a T2V model, or an I2V model for a task with a start image"
        )

    def widen(weight: Tensor) -> Tensor:
        columns = dict(zip(source, weight.split(list(source.values()), dim=1), strict=True))
        zeros = {part: weight.new_zeros(dim, count, *patch) for part, count in target.items()}
        return torch.cat([columns.get(part, zeros[part]) for part in target], dim=1)

    return NewLayers(derived={PATCH: Derived(PATCH, (dim, sum(target.values()), *patch), widen)})


def _layout(variant: Variant) -> dict[str, int]:
    """The channels that a task's models read, in order (VideoX-Fun's and the official layouts)."""
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
    """The image embedding, and for every block keys as of the text and values of zero."""
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
