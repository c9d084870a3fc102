"""The golden cases on the device: float32 against the stored outputs, bfloat16 against the CPU."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.first_look.exact import exact_float32
from benchmarks.first_look.rows import Measured, Row, Values, beyond
from networks.adapter import create
from networks.settings import NetworkSettings
from tests.parity.dit_cases import NAMES, load, lora_file, run
from tests.parity.golden import TOLERANCE, Case, load_case, relative_error
from wan_train.models.dit.dit import Dit
from wan_train.models.vae.vae import WanVAE, load_vae

CPU = torch.device("cpu")
HALF_LIMIT = 0.02  # relative error of a DiT in bfloat16; computing in it on a CPU gives 0.003
VAE_HALF_LIMIT = 0.05
GRADIENT_LIMIT = 1e-3  # of float32 gradients, whose kernels add in another order
LORA = "wan21_t2v_lora"
VAES = ("wan21_vae", "wan22_vae")


def parity_rows(device: torch.device) -> list[Row]:
    """Return one row for each golden case."""
    rows = [Row(f"parity/{name}", 2.0, partial(check_dit, name, device)) for name in (*NAMES, LORA)]
    return rows + [Row(f"parity/{name}", 4.0, partial(check_vae, name, device)) for name in VAES]


def check_dit(name: str, device: torch.device, earlier: Mapping[str, Values]) -> Measured:
    """Compare the output of a DiT and, where they are stored, its loss and gradients."""
    case = load_case(name)
    with exact_float32():
        model = make(case, device)
        errors = {"float32": relative_error(output(model, case), case.outputs["out"])}
        errors |= gradient_errors(model, case) if "loss" in case.outputs else {}
    half = output(make(case, device, torch.bfloat16), case)
    errors["bfloat16"] = relative_error(half, output(make(case, CPU, torch.bfloat16), case))
    limits = {"float32": TOLERANCE, "bfloat16": HALF_LIMIT, "loss": TOLERANCE, "gradients": GRADIENT_LIMIT}
    return Measured({f"{part}_error": error for part, error in errors.items()}, beyond(errors, limits))


def make(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Dit:
    """Return the model of a case, with its LoRA if it has one."""
    model = load(case, device=device, dtype=dtype)
    if case.spec.get("lora"):
        rank, alpha = case.spec["lora"]
        create(model, NetworkSettings(network_dim=rank, network_alpha=alpha)).load(lora_file(case))
    return model.to(device)


def output(model: Dit, case: Case) -> Tensor:
    """Return the output of a case, on the CPU."""
    with torch.no_grad():
        return run(model, case).float().cpu()


def gradient_errors(model: Dit, case: Case) -> dict[str, float]:
    """Return the relative errors of the loss and of the stored gradients, the largest of these."""
    out = run(model.requires_grad_(True), case)
    loss = (out - case.normal("target", out.shape).to(out.device)).square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    stored = {key.removeprefix("grad."): value for key, value in case.outputs.items() if key.startswith("grad.")}
    errors = [
        relative_error(grad.cpu(), stored[name]) for name, grad in found.items() if name in stored and grad is not None
    ]
    return {"loss": relative_error(loss.detach().cpu().view(1), case.outputs["loss"].view(1)), "gradients": max(errors)}


def check_vae(name: str, device: torch.device, earlier: Mapping[str, Values]) -> Measured:
    """Compare latents and decoded frames, for each stored number of frames."""
    case = load_case(name)
    with exact_float32():
        ours = load_vae(case.state_dict(), device=device, dtype=torch.float32)
        exact = max(vae_errors(ours, case, device))
    half = max(vae_errors(load_vae(case.state_dict(), device=device, dtype=torch.bfloat16), case, device))
    errors = {"float32": exact, "bfloat16": half}
    wrong = beyond(errors, {"float32": TOLERANCE, "bfloat16": VAE_HALF_LIMIT})
    return Measured({f"{part}_error": error for part, error in errors.items()}, wrong)


def vae_errors(vae: WanVAE, case: Case, device: torch.device) -> Iterator[float]:
    """Yield the relative error of each encoding and decoding."""
    for frames in case.spec["frames"]:
        pixels = case.normal(f"video.{frames}", (1, 3, frames, case.spec["height"], case.spec["width"])).tanh()
        stored = case.outputs[f"latent.{frames}"]
        with torch.no_grad():
            latents = vae.encode(pixels.to(device))
            video = vae.decode(case.normal(f"z.{frames}", stored.shape).to(device))
        yield relative_error(latents.float().cpu(), stored)
        yield relative_error(video.float().cpu(), case.outputs[f"video_out.{frames}"])
