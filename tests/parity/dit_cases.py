"""The DiT of a golden case and the inputs of its pass, on any device."""

from typing import Any

import torch
from torch import Tensor

from tests.parity.golden import Case, state_dict
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import load_dit

NAMES = (
    *("wan21_t2v", "wan21_t2i", "wan21_i2v", "wan21_flf2v", "fun_inp", "wan22_i2v_a14b", "wan22_ti2v_5b"),
    *("fun_control", "fun_v11_control_ref", "fun_v11_control_camera", "wan21_vace", "speedcontrol_v1"),
    *("wan22_fun_a14b_control", "wan22_fun_a14b_control_camera"),
)
CPU = torch.device("cpu")


def load(
    case: Case,
    weights: dict[str, Tensor] | None = None,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype | None = None,
) -> Dit:
    """The model of a case, with its own weights or others; `dtype` None keeps their data type."""
    controller = state_dict(case.spec.get("motion_controller_shapes", {}), case.spec["salt"])
    config = {"num_heads": case.spec["config"]["num_heads"]}
    return load_dit((weights or case.state_dict()) | controller, config=config, device=device, dtype=dtype)


def run(model: Dit, case: Case) -> Tensor:
    """The model's output for the inputs of a case."""
    spec, device = case.spec, model.patch_embedding.weight.device
    channels = spec["config"]["in_dim"] - spec.get("y_channels", 0)
    latents = case.normal("x", (spec["batch"], channels, *spec["latent"]))
    context = [case.normal(f"context.{i}", (n, 48)).to(device) for i, n in enumerate(spec["context_lens"])]
    timestep = torch.tensor(spec["timesteps"])
    if spec.get("per_token_timestep"):  # those of the first frame are 0
        timestep = timestep[:, None].repeat(1, spec["latent"][0])
        timestep[:, 0] = 0
    inputs = image_inputs(case) | control_inputs(case)
    placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return model(latents.to(device), timestep.to(device), context, **placed)


def control_inputs(case: Case) -> dict[str, Any]:
    """The inputs of a control model, on the CPU."""
    spec, (frames, height, width) = case.spec, case.spec["latent"]
    inputs: dict[str, Any] = {}
    if spec.get("reference_latents"):
        inputs["reference_latents"] = case.normal("reference_latents", (1, 16, 1, height, width))
    if spec.get("control_camera"):
        inputs["camera"] = case.normal("control_camera", (1, 24, frames, 8 * height, 8 * width))
    if spec.get("vace_scale") is not None:
        inputs |= {"vace_context": case.normal("vace_context", (1, 96, *spec["latent"]))}
        inputs |= {"vace_scale": spec["vace_scale"]}
    if "motion_bucket_id" in spec:
        inputs["motion_bucket_id"] = torch.tensor([spec["motion_bucket_id"]])
    return inputs


def image_inputs(case: Case) -> dict[str, Tensor]:
    """The inputs of a model with images, on the CPU."""
    spec = case.spec
    if not spec.get("y_channels"):
        return {}
    batch, tokens = spec["batch"], spec["clip_tokens"]
    images = {"image_latents": case.normal("y", (batch, spec["y_channels"], *spec["latent"]))}
    if not tokens:
        return images
    features = case.normal("clip_fea", (batch * tokens // 257, 257, 1280)).view(batch, tokens, 1280)
    return images | {"clip_features": features}


def lora_file(case: Case) -> dict[str, Tensor]:
    """The tensors of a case's LoRA, as kohya names them."""
    rank, alpha = case.spec["lora"]
    tensors = {}
    for name, shape in case.spec["shapes"].items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down, up = f"{key}.lora_down.weight", f"{key}.lora_up.weight"
            tensors[down] = case.normal(down, (rank, shape[1])) / shape[1] ** 0.5
            tensors[up] = case.normal(up, (shape[0], rank)) / rank**0.5
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors
