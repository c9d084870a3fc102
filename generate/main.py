"""The generator: check everything, encode, denoise, decode, write."""

import random
from itertools import zip_longest
from typing import TypeVar

import torch

from generate.output import check_output, write_outputs
from generate.settings import GenerateSettings, LoraSettings
from networks.attached import attach_loras
from networks.formats import check_lora
from networks.selection import filter_modules
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit, check_model, finish_dit
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.loading import linear_shapes
from wan_train.models.stored import storage_dtype
from wan_train.models.text_encoder import check_text_encoder
from wan_train.models.vae import check_vae
from wan_train.models.variants import VARIANTS, Variant
from wan_train.precision import default_device, published_dtype
from wan_train.sampling.decode import decode_frames, open_vae
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.encode import encode_prompts
from wan_train.sampling.request import SampleRequest, fitted
from wan_train.sampling.settings import SamplingSettings
from wan_train.storage import read_header

log = get_logger(__name__)

T = TypeVar("T")


def main(settings: GenerateSettings) -> None:
    """Generate what the settings ask for. Raises InputError, before a model is loaded, for what cannot work."""
    variant = VARIANTS[settings.dit.task]
    request = make_request(settings.sampling, variant)
    loras = weighted_loras(settings.lora)
    device = default_device(settings.output.device)
    preflight(settings, variant, loras, device)
    log.info(
        "%d wide, %d high, %d frames, %d steps, shift %g, guidance %g, seed %d, on %s",
        *(request.width, request.height, request.frames, request.steps),
        *(request.shift, request.guidance, request.seed, device),
    )
    latents = generate_latents(settings, request, loras, device)
    frames = None
    if settings.output.output_type != "latent":
        log.info("decoding with %s", settings.vae.vae)
        frames = decode_frames(open_vae(settings.vae, device), latents, device)
    for path in write_outputs(settings.output, request, latents, frames, fps=settings.output.fps or variant.fps):
        log.info("wrote %s", path)


def generate_latents(
    settings: GenerateSettings, request: SampleRequest, loras: list[WeightedLora], device: torch.device
) -> torch.Tensor:
    """Latents (C, F, H, W) of the request; each model lives only as long as its step."""
    conditions = encode_prompts([request], settings.text, device)
    log.info("loading %s%s", settings.dit.dit, "".join(f" + {lora.multiplier:g} x {lora.path}" for lora in loras))
    # An accelerator computes float32 files in bfloat16, as the official sampler does.
    wide = storage_dtype(read_header(settings.dit.dit)) is torch.float32
    dtype = published_dtype(device) if wide else None
    attached = settings.lora.lora_mode == "attach"
    model = assemble_dit(model_settings(settings), device=device, dtype=dtype, loras=[] if attached else loras)
    if attached:
        names = linear_shapes(settings.dit.dit)
        attach_loras(model, [(lora.read(names), lora.multiplier) for lora in loras], device=device)
    finish_dit(model, model_settings(settings), device)
    positive, negative = conditions[request.prompt], conditions[request.negative_prompt]
    return sample_latents(model, request, positive, negative, device=device)


def model_settings(settings: GenerateSettings) -> ModelSettings:
    """What the settings say about the DiT."""
    return ModelSettings(settings.dit, settings.weights, settings.stream, settings.activations, settings.compile)


def make_request(sampling: SamplingSettings, variant: Variant) -> SampleRequest:
    """The request that the command line states, the task's defaults filled in and a seed drawn if none is given."""
    if not sampling.prompt.strip():
        raise InputError("--prompt is empty: say what the video shows")
    if (sampling.cfg_skip_mode == "none") != (sampling.cfg_apply_ratio is None):
        raise InputError("--cfg_skip_mode and --cfg_apply_ratio go together: give both or neither")
    width, height = sampling.video_size or variant.size
    return fitted(
        SampleRequest(
            prompt=sampling.prompt,
            negative_prompt=_chosen(sampling.negative_prompt, variant.negative_prompt),
            width=width,
            height=height,
            frames=_chosen(sampling.video_length, variant.frames),
            steps=_chosen(sampling.infer_steps, variant.steps),
            guidance=_chosen(sampling.guidance_scale, variant.guidance),
            shift=_chosen(sampling.flow_shift, variant.shift),
            seed=_chosen(sampling.seed, random.SystemRandom().randrange(2**32)),
            solver=sampling.sample_solver,
            cfg_skip_mode=sampling.cfg_skip_mode,
            cfg_apply_ratio=sampling.cfg_apply_ratio,
        )
    )


def _chosen(given: T | None, default: T) -> T:
    return default if given is None else given


def weighted_loras(settings: LoraSettings) -> list[WeightedLora]:
    """The LoRA files with their multipliers, 1.0 where fewer multipliers than files are given."""
    if len(settings.lora_multiplier) > len(settings.lora_weight):
        raise InputError(
            f"{len(settings.lora_multiplier)} --lora_multiplier for {len(settings.lora_weight)} --lora_weight: "
            "give at most one for each file"
        )
    pairs = zip_longest(settings.lora_weight, settings.lora_multiplier, fillvalue=1.0)
    patterns = settings.include_patterns, settings.exclude_patterns
    return [WeightedLora(str(path), float(multiplier), *patterns) for path, multiplier in pairs]


def preflight(settings: GenerateSettings, variant: Variant, loras: list[WeightedLora], device: torch.device) -> None:
    """Refuse what cannot work by headers and tiny trials alone, before a model is loaded."""
    check_output(settings.output)
    if warning := check_model(model_settings(settings), variant, device):
        log.warning(warning)
    if not settings.text.t5:
        raise InputError("--t5 is missing: give the UMT5-XXL encoder file")
    check_text_encoder(settings.text.t5, settings.text.tokenizer or "auto")
    if settings.output.output_type != "latent":
        if not settings.vae.vae:
            raise InputError("--vae is missing: give Wan2.1_VAE.pth, or --output_type latent")
        check_vae(settings.vae.vae)
    shapes = linear_shapes(settings.dit.dit)
    if (settings.lora.include_patterns or settings.lora.exclude_patterns) and not loras:
        raise InputError("--include_patterns and --exclude_patterns choose modules of --lora_weight: give one")
    for lora in loras:
        filter_modules(check_lora(lora.path, shapes), lora.include, lora.exclude)
