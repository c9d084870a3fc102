"""Dataset keys for conditions other than text: their meaning for the task, and which ones do not fit it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wan_train.errors import InputError
from wan_train.models.variants import ControlInputs


@dataclass(frozen=True)
class ConditionKey:
    """What a key or a listing column provides: `name` in words, the models that read it, and their tasks."""

    name: str
    is_read: Callable[[ControlInputs], bool]
    tasks: str


CONTROL = ConditionKey("control video", lambda control: control.video or control.vace, "fun-control and vace")
REFERENCES = ConditionKey("reference image", lambda control: control.reference or control.vace, "fun-control and vace")
VACE_MASK = ConditionKey("VACE mask", lambda control: control.vace, "vace")
CAMERA = ConditionKey("camera path", lambda control: control.camera, "fun-camera")
_KEYS = {
    "control_directory": CONTROL,
    "reference_directory": REFERENCES,
    "camera_directory": CAMERA,
    "camera_direction": CAMERA,
    "camera_speed": CAMERA,
}


def refuse_idle(key: str, given: ConditionKey, control: ControlInputs | None, location: str) -> None:
    """Raise InputError for a key or column with a condition that the task does not read (None: task unknown)."""
    if control is not None and not given.is_read(control):
        raise InputError(
            f"{location}: {key}: the task does not use a {given.name}: remove it, or choose a task that does"
            f" ({given.tasks} tasks)"
        )


def settle_conditions(values: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return a dataset's values with the condition keys as `DatasetConfig` stores them.

    With a VACE task, `mask_directory` holds VACE masks, otherwise loss masks; `loss_mask_directory` always holds loss
    masks. Raises InputError for keys that the task does not read, and for `start_image` where the task leaves no
    choice.
    """
    settled = {key: value for key, value in values.items() if key != "loss_mask_directory"}
    control, loss_masks = values["control"], values.get("loss_mask_directory")
    if control is not None and control.vace:
        settled["vace_mask_directory"] = settled.pop("mask_directory", None)
    elif control is not None and loss_masks and "mask_directory" in values:
        raise InputError(f"{location}: mask_directory and loss_mask_directory both hold loss masks: give one of them")
    if loss_masks:
        settled["mask_directory"] = loss_masks
    for key, given in _KEYS.items():
        if key in values:
            refuse_idle(key, given, control, location)
    if "start_image" in values and (control or values["images"]) is not None:
        _refuse_start_image(values, location)
    return settled


def _refuse_start_image(values: Mapping[str, Any], location: str) -> None:
    images = values["images"]
    if images is None:
        raise InputError(f"{location}: start_image: the task does not use a start image: remove it")
    if not images.optional:
        raise InputError(f"{location}: start_image: the task always uses a start image: remove it")
