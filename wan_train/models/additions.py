"""Tensors added to a DiT checkpoint at load time: new control layers, and a motion controller from its own file."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from wan_train.errors import InputError
from wan_train.models.init_control import NewLayers, initialised, new_layers
from wan_train.models.loading import official_shapes
from wan_train.models.settings import DitSettings, InitSettings
from wan_train.models.variants import VARIANTS
from wan_train.models.weights import dit_rename, require_kind
from wan_train.quantization.stored import storage_dtype
from wan_train.storage import Header, read_header, read_tensors

Pairs = Iterable[tuple[str, Tensor]]

CONTROLLER = "motion_controller."
NO_INIT = InitSettings()
_CONTROLLER_NAME = re.compile(r"(?:[\w.]*motion_controller\.)?(linear\.[024]\.(?:weight|bias))")


def extended_header(dit: DitSettings, init: InitSettings = NO_INIT, *, flag: str = "--dit") -> Header:
    """Return the header of the checkpoint that `extended` yields, with official names if anything is added.

    `flag` is the option that names the file. Raises InputError for layers that cannot be added.
    """
    header = read_header(dit.dit)
    if init.init_control is None and not dit.motion_controller:
        return header
    if dit.motion_controller:
        _check_controller_task(dit, init)
    rename = dit_rename(header.shapes)
    shapes = {rename(name): shape for name, shape in header.shapes.items()}
    dtypes = {rename(name): dtype for name, dtype in header.dtypes.items()}
    new = _new_layers(header, dit, init, flag).shapes
    header = replace(header, shapes=shapes | new, dtypes=dtypes | dict.fromkeys(new, storage_dtype(header)))
    return _with_controller(header, dit)


def extended(tensors: Pairs, dit: DitSettings, init: InitSettings = NO_INIT) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint, official names, and those added to it."""
    if init.init_control is not None:
        tensors = initialised(tensors, _new_layers(read_header(dit.dit), dit, init, "--dit"))
    yield from tensors
    if dit.motion_controller:
        for name, tensor in read_tensors(dit.motion_controller):
            yield _controller_name(name, dit.motion_controller), tensor


def idle_weights(dit: DitSettings, init: InitSettings = NO_INIT) -> list[str]:
    """Return the official names of new weights that have no effect until they are trained."""
    return _new_layers(read_header(dit.dit), dit, init, "--dit").idle


def _new_layers(header: Header, dit: DitSettings, init: InitSettings, flag: str) -> NewLayers:
    if init.init_control is None:
        return NewLayers()
    label = f"{flag} {dit.dit}"
    require_kind(header.shapes, "DiT", label)
    if storage_dtype(header).itemsize == 1:
        raise InputError(
            f"--init_control: {label} is an 8-bit checkpoint, which cannot be trained: give a bf16 or fp32 file"
        )
    return new_layers(official_shapes(header.shapes), VARIANTS[dit.task], init.init_control, label)


def _check_controller_task(dit: DitSettings, init: InitSettings) -> None:
    """Raise InputError if the task's model takes no motion controller, or `init` creates a second one."""
    variant = VARIANTS[dit.task]
    if variant.control or variant.images or variant.experts:
        raise InputError(
            f"--motion_controller: --task {dit.task} does not support a motion bucket: use a Wan2.1 t2v task, or"
            " omit it"
        )
    if init.init_control == "motion":
        raise InputError(
            f"--init_control motion creates a motion controller, but one is given with --motion_controller"
            f" {dit.motion_controller}: omit one of them"
        )


def _with_controller(header: Header, dit: DitSettings) -> Header:
    """Return the header with a controller file's tensors. Raises InputError if the file is invalid or does not fit."""
    path = dit.motion_controller
    if not path:
        return header
    if any(name.startswith(CONTROLLER) for name in header.shapes):
        raise InputError(f"--motion_controller {path}: the DiT already has a motion controller: omit the option")
    own = read_header(path)
    shapes = {_controller_name(name, path): shape for name, shape in own.shapes.items()}
    dtypes = {_controller_name(name, path): dtype for name, dtype in own.dtypes.items()}
    first, wide = shapes.get(f"{CONTROLLER}linear.0.weight"), header.shapes.get("time_embedding.0.weight")
    if len(shapes) != 6 or first is None:
        raise InputError(f"--motion_controller {path} is not a complete motion controller: give another checkpoint")
    if first != wide:
        raise InputError(
            f"--motion_controller {path} is for a model of width {first[0]}, but the DiT has width {(wide or (0,))[0]}:"
            " use the controller trained for this model"
        )
    return replace(header, shapes=header.shapes | shapes, dtypes=header.dtypes | dtypes)


def _controller_name(name: str, path: str) -> str:
    found = _CONTROLLER_NAME.fullmatch(name)
    if found is None:
        raise InputError(f"--motion_controller {path} is not a motion controller (it has {name}): give another file")
    return CONTROLLER + found[1]
