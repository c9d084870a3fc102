"""Check settings and caches of control models before a model is loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dataset.batching.batches import CachedDataset
from dataset.caching.extras import CONTROL, wanted_conditions, wanted_extras
from dataset.items import Item
from networks.adapter import trains_weights
from networks.both import weights_of_lora
from networks.full import chosen_names
from wan_train.conditions.kinds import CAMERA, CONTROL_LATENTS, MOTION, REFERENCE
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.additions import CONTROLLER, extended_header, idle_weights
from wan_train.models.loading import linears_of, official_shapes
from wan_train.models.stacks import read_block_name
from wan_train.models.variants import VARIANTS, ControlInputs, Variant
from wan_train.models.weights import Shapes
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


def check_control_settings(settings: TrainSettings, variant: Variant) -> None:
    """Raise InputError for dropout of a condition that the task does not read."""
    control, images = variant.control or ControlInputs(), settings.images
    if images.control_dropout_rate and not (control.video or control.vace):
        raise InputError(f"--control_dropout_rate: --task {variant.name} has no control video input: leave it out")
    if images.reference_dropout_rate and not (control.reference or control.vace):
        raise InputError(f"--reference_dropout_rate: --task {variant.name} has no reference image input: leave it out")


def check_new_layers(settings: TrainSettings, shapes: Shapes) -> None:
    """Raise InputError if layers added by `--init_control` are not trained; `shapes` are those of the whole model."""
    kind, network = settings.init.init_control, settings.network
    if kind is None:
        return
    idle = idle_weights(settings.dit, settings.init)
    trained = chosen_names(network, shapes) if trains_weights(network) else set()
    if network.train_also is not None:
        trained |= weights_of_lora(network, linears_of(shapes), trained)
    left = [name for name in idle if name not in trained]
    if not left:
        return
    patterns = " ".join(dict.fromkeys(_pattern(name) for name in idle))
    also = "" if trains_weights(network) else f" and --train_also {network.network_module}"
    raise InputError(
        f"--init_control {kind} adds {left[0]} and {len(left) - 1} more weights that have no effect until"
        " they are trained, and they are not: use --network_module networks.full, alone or with --trainable"
        f" {patterns}{also}"
    )


def _pattern(name: str) -> str:
    """Return a pattern that matches a weight and its bias in all blocks of a stack."""
    part = read_block_name(name)
    whole = name if part is None else f"{part.stack}.*.{part.rest}"
    return whole.removesuffix("weight") + "*"


def check_controls(dataset: CachedDataset, settings: TrainSettings) -> None:
    """Raise InputError if no clip has the control that the task requires, or a clip has a condition that the model has
    no weights for; log a warning for controls that the task does not read."""
    variant, control = VARIANTS[settings.dit.task], VARIANTS[settings.dit.task].control
    items = [clip.item for plan in dataset.plans for clip in plan.clips]
    if control is None or not (control.video or control.vace):
        _warn_of_unread(items, settings.dit.task)
    _refuse_unread(items, settings)
    if control is None:
        return
    rerun = f"cache again: python wan_cache_latents.py --dataset_config {settings.data.dataset_config} --task"
    rerun += f" {settings.dit.task} --vae {settings.vae.vae or variant.space.vae_file}"
    if control.camera and (lacking := sum(not _has(CAMERA)(item) for item in items)):
        raise InputError(
            f"--task {settings.dit.task} needs a camera path, and {lacking} of {len(items)} clips have none: give"
            f" camera_directory or camera_direction in the dataset file and {rerun}"
        )
    if control.video and not any(map(_has(CONTROL_LATENTS), items)):
        raise InputError(
            f"--task {settings.dit.task} needs a control video, and no clip has one: give control_directory in the"
            f" dataset file and {rerun}"
        )
    trusted = settings.caches.trust_cache  # their items have no source files
    if control.vace and not trusted and not any(item.controls or item.references or item.vace_mask for item in items):
        raise InputError(
            f"--task {settings.dit.task} needs a video, a mask or reference images, and no clip has any: give"
            f" control_directory, mask_directory or reference_directory in the dataset file and {rerun}"
        )


def check_controller(dataset: CachedDataset, settings: TrainSettings) -> None:
    """Raise InputError if a motion controller is trained on clips without a motion_bucket_id: a batch of such clips
    gives it no gradient, which fails if nothing else is trained or several processes take part."""
    if not trains_weights(settings.network) or not settings.dit.dit:
        return
    trained = chosen_names(settings.network, model_shapes(settings, settings.dit.dit))
    items = [clip.item for plan in dataset.plans for clip in plan.clips]
    lacking = sum(not _has(MOTION)(item) for item in items)
    if lacking and any(name.startswith(CONTROLLER) for name in trained):
        raise InputError(
            f"the motion controller is trained, and {lacking} of {len(items)} clips have no motion_bucket_id: set it"
            " for each in the dataset file or its listing and cache again, or use --trainable patterns without"
            f" {CONTROLLER}*"
        )


def _has(name: str) -> Callable[[Item], bool]:
    return lambda item: any(kind.name == name for kind in wanted_conditions(item))


def _warn_of_unread(items: list[Item], task: str) -> None:
    unread = sum(CONTROL in wanted_extras(item) for item in items)
    if unread:
        log.warning(
            "%d of %d clips have a control in their caches (latents_control), which --task %s does not read: it is"
            " ignored",
            unread,
            len(items),
            task,
        )


def _refuse_unread(items: list[Item], settings: TrainSettings) -> None:
    """Raise InputError for conditions that a DiT has no weights for."""
    ways = {
        REFERENCE: ("a reference image", "ref_conv.", "a V1.1 model, or --init_control reference for a T2V or I2V one"),
        MOTION: ("a motion_bucket_id", CONTROLLER, "--motion_controller"),
    }
    for name, (label, layer, way) in ways.items():
        if not (count := sum(map(_has(name), items))):
            continue
        for path in filter(None, (settings.dit.dit, settings.experts.dit_high_noise)):
            if not any(tensor.startswith(layer) for tensor in model_shapes(settings, path)):
                raise InputError(
                    f"{count} of {len(items)} clips have {label}, for which {Path(path).name} has no weights: give"
                    f" {way}, or leave it out of the dataset and cache again"
                )


def model_shapes(settings: TrainSettings, path: str) -> Shapes:
    """Return the shapes of the model that a DiT file is built into, by official name."""
    return official_shapes(extended_header(replace(settings.dit, dit=path), settings.init).shapes)
