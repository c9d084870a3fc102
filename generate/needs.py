"""Estimate the memory of a run of the generator from file headers, and check that it is available."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from generate.jobs import Job
from generate.models import Loras, dit_dtype, model_settings
from generate.settings import GenerateSettings
from wan_train.distributed.settings import ParallelSettings
from wan_train.log import get_logger
from wan_train.models.dit.experts import experts_of
from wan_train.models.encoders.text import text_encoder_bytes
from wan_train.plan import Bytes, Way, check_fits, free_memory, gib, largest_first
from wan_train.precision import published_dtype
from wan_train.sampling.needs import decoding_bytes, dit_needs
from wan_train.sampling.request import SampleRequest
from wan_train.storage import read_header

log = get_logger(__name__)

TEXT, SAMPLING, DECODING = "encoding texts", "sampling", "decoding"


@dataclass(frozen=True)
class StageNeeds:
    """Peak memory of each stage of a run, of which only one is on the device at a time."""

    stages: Mapping[str, Bytes]

    @property
    def total(self) -> Bytes:
        """Peak memory of the whole run."""
        return Bytes(*(max(getattr(part, side) for part in self.stages.values()) for side in ("device", "host")))

    def describe(self) -> str:
        """Describe the needs in one line, in GiB, with CPU RAM listed separately."""
        told = ", ".join(f"{gib(part.device)} GiB for {name}" for name, part in self.stages.items())
        beside = f"; in CPU RAM {gib(self.total.host)} GiB of weights" if self.total.host else ""
        return f"needs {told}: at most {gib(self.total.device)} GiB at a time{beside}"


def check_needs(
    jobs: Sequence[Job], settings: GenerateSettings, loras: Loras, device: torch.device, *, wants_frames: bool
) -> None:
    """Log the memory that the jobs need on a GPU, and raise InputError if it does not fit.

    Nothing is estimated on other devices, and for several processes, which divide the models.
    """
    if device.type != "cuda" or settings.parallel != ParallelSettings():
        return
    free = free_memory(device)
    needs = stage_needs([job.request for job in jobs], settings, loras, device, free=free, wants_frames=wants_frames)
    log.info("generation %s", needs.describe())
    check_fits(needs, free, ways_out(settings, needs), device_name=str(device))


def stage_needs(
    requests: Sequence[SampleRequest],
    settings: GenerateSettings,
    loras: Loras,
    device: torch.device,
    *,
    free: Bytes,
    wants_frames: bool,
) -> StageNeeds:
    """Estimate the memory of each stage.

    A video that is too large to be decoded whole in the `free` memory is decoded in tiles, and needs as much as those.
    """
    text = text_encoder_bytes(settings.text.t5, dtype=published_dtype(device), fp8=settings.text.fp8_t5)
    stages = {TEXT: Bytes(text)}
    for expert in experts_of(requests[0].variant):
        stages[f"{SAMPLING} {expert.replace('_', ' ')}" if expert else SAMPLING] = _sampling(
            requests, settings, loras, device, expert
        )
    if wants_frames:
        shape = max((request.latent_shape for request in requests), key=lambda shape: (shape[2] * shape[3], shape[1]))
        tiled = settings.vae.vae_tiling
        decoding = decoding_bytes(settings.vae, shape, tiled=tiled)
        if decoding > free.device and not tiled:
            decoding = decoding_bytes(settings.vae, shape, tiled=True)
        stages[DECODING] = Bytes(decoding)
    return StageNeeds(stages)


def _sampling(
    requests: Sequence[SampleRequest],
    settings: GenerateSettings,
    loras: Loras,
    device: torch.device,
    expert: str | None,
) -> Bytes:
    """Estimate the memory of the steps of one model. Attached LoRAs are held in float32 beside it."""
    model, paths = model_settings(settings, expert), [lora.path for lora in loras.get(expert, ())]
    attached = settings.lora.lora_mode == "attach"
    needs = dit_needs(model, requests, expert, dtype=dit_dtype(model.dit.dit, device), loras=() if attached else paths)
    elements = sum(math.prod(shape) for path in paths if attached for shape in read_header(path).shapes.values())
    return needs + Bytes(4 * elements)


def ways_out(settings: GenerateSettings, needs: StageNeeds) -> list[str]:
    """Return the options that reduce the largest stage and are not given yet."""
    largest = max(needs.stages, key=lambda name: needs.stages[name].device)
    part = {name: Bytes(int(largest.startswith(name))) for name in (TEXT, SAMPLING, DECODING)}
    weights = settings.weights
    ways = [
        Way("--fp8_t5", part[TEXT], settings.text.fp8_t5),
        Way("--fp8 --fp8_scaled", part[SAMPLING], weights.fp8_base or weights.fp8_fast or weights.int8_base),
        Way("--blocks_to_swap", part[SAMPLING], settings.stream.blocks_to_swap > 0),
        Way("--ffn_chunks", part[SAMPLING], settings.activations.ffn_chunks > 1),
        Way("--vae_tiling", part[DECODING], settings.vae.vae_tiling),
        Way("--vae_cache_cpu", part[DECODING], settings.vae.vae_cache_cpu),
    ]
    of_largest = [way for way in ways if way.part.device]
    return [*largest_first(of_largest), "a smaller --video_size or --video_length"]
