"""The generator as a Python function."""

from typing import Any

import numpy as np

from generate.jobs import make_jobs
from generate.models import Models
from generate.needs import check_needs
from generate.output import check_length
from generate.preflight import check_generation, fitted_jobs
from generate.runs import InMemory, run_jobs
from generate.settings import BatchSettings, CalibrationSettings, GenerateSettings, OutputSettings
from wan_train.cli import options
from wan_train.config_file import from_values
from wan_train.distributed.settings import ParallelSettings
from wan_train.errors import InputError
from wan_train.precision import default_device

# Output options that also apply to frames in memory.
_KEPT = ("device", "text_cache", "trim_tail_frames", "strict_prompts")
_ON_DISK = {
    f.name for group in (BatchSettings, CalibrationSettings, OutputSettings) for f, _, _ in options(group)
} - set(_KEPT)


def generate(prompt: str, **settings: Any) -> np.ndarray:
    """Return frames (F, H, W, 3) uint8 of a prompt, bit-identical to `wan_generate_video.py --prompt`.

    `settings` are the options of that command by name: `task="t2v-1.3B", dit=..., vae=..., t5=..., video_size=(832,
    480), seed=1, lora_weight=["a.safetensors"]`, except those for output files. Raises InputError, a ValueError, for
    settings that the command would refuse.
    """
    if writing := sorted(_ON_DISK & settings.keys()):
        raise InputError(f"generate(): {writing[0]} is for output files, and generate() returns frames: leave it out")
    chosen = from_values(GenerateSettings, {"prompt": prompt, **settings}, "generate()")
    if chosen.parallel != ParallelSettings():
        raise InputError("generate() runs in one process: for several, start wan_generate_video.py with torchrun")
    device = default_device(chosen.output.device)
    jobs = make_jobs(chosen)
    loras = check_generation(chosen, device, wants_frames=True)
    jobs = fitted_jobs(jobs, chosen)
    check_length(chosen.output, jobs[0].request.frames)
    check_needs(jobs, chosen, loras, device, wants_frames=True)
    delivery = InMemory(chosen.output)
    run_jobs(jobs, Models(chosen, loras, device), delivery)
    return delivery.frames[0]
