"""Tiny random control models, beside those of `tests.tiny.make` and `tests.tiny.images`."""

from pathlib import Path

import torch

from tests.tiny.images import image_dit_shapes
from tests.tiny.make import Shapes, dit_shapes, save

# By kind: the channels that it reads, whether it reads CLIP's tokens, and its additional layers.
KINDS: dict[str, tuple[int, bool, str]] = {
    "fun-control": (48, True, ""),
    "fun-control-v1.1": (48, True, "reference"),
    "fun-camera": (32, True, "camera"),
    "vace": (16, False, "vace"),
    "fun-control-A14B": (52, False, "reference"),
    "fun-camera-A14B": (36, False, "camera"),
    "fun-inp-A14B": (36, False, ""),
    "speed": (16, False, "motion"),
}
# The kind of each task's models.
TASKS = {
    "fun-control-1.3B": "fun-control-v1.1",
    "i2v-14B-FC": "fun-control",
    "fun-camera-1.3B": "fun-camera",
    "vace-1.3B": "vace",
    "fun-control-A14B": "fun-control-A14B",
    "fun-camera-A14B": "fun-camera-A14B",
    "fun-inp-A14B": "fun-inp-A14B",
    "vace-fun-A14B": "vace",
    "t2v-1.3B": "speed",
}
CONTROLLER = "speedcontrol.safetensors"


def control_shapes(kind: str, *, dim: int = 256, num_layers: int = 2) -> Shapes:
    """Return names and shapes of the DiT of a kind in `KINDS`; for "speed", with the controller in the same file."""
    in_dim, clip, layers = KINDS[kind]
    shapes = (image_dit_shapes if clip else dit_shapes)(dim=dim, num_layers=num_layers)
    shapes["patch_embedding.weight"] = (dim, in_dim, 1, 2, 2)
    match layers:
        case "reference":
            shapes |= {"ref_conv.weight": (dim, 16, 2, 2), "ref_conv.bias": (dim,)}
        case "camera":
            shapes |= {"control_adapter.conv.weight": (dim, 24 * 64, 2, 2), "control_adapter.conv.bias": (dim,)}
            for part in ("conv1", "conv2"):
                name = f"control_adapter.residual_blocks.0.{part}"
                shapes |= {f"{name}.weight": (dim, dim, 3, 3), f"{name}.bias": (dim,)}
        case "vace":
            shapes |= _vace_shapes(shapes, dim)
        case "motion":
            shapes |= {f"motion_controller.{name}": shape for name, shape in controller_shapes(dim).items()}
    return shapes


def controller_shapes(dim: int = 256) -> Shapes:
    """Return names and shapes of a motion controller's own file."""
    shapes: Shapes = {}
    for index, out, width in ((0, dim, 256), (2, dim, dim), (4, 6 * dim, dim)):
        shapes |= {f"linear.{index}.weight": (out, width), f"linear.{index}.bias": (out,)}
    return shapes


def make_control_models(folder: Path) -> None:
    """Write the DiT of each kind as FOLDER/KIND.safetensors, and a motion controller to a separate file."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        save(folder / f"{kind}.safetensors", control_shapes(kind), torch.bfloat16)
    save(folder / CONTROLLER, controller_shapes(), torch.bfloat16)


def _vace_shapes(base: Shapes, dim: int) -> Shapes:
    """Return the shapes of one VACE block, whose hint is added after the first block."""
    shapes = {f"vace_{name}": shape for name, shape in base.items() if name.startswith("blocks.0.")}
    for part in ("before_proj", "after_proj"):
        shapes |= {f"vace_blocks.0.{part}.weight": (dim, dim), f"vace_blocks.0.{part}.bias": (dim,)}
    return shapes | {"vace_patch_embedding.weight": (dim, 96, 1, 2, 2), "vace_patch_embedding.bias": (dim,)}
