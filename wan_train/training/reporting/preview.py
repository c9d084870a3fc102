"""Previews: generate samples with the model in training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from wan_train.conditions.conditions import Conditions, ImageConditions
from wan_train.errors import InputError
from wan_train.file_names import check_name
from wan_train.log import get_logger
from wan_train.media_out import write_image, write_video
from wan_train.models.encoders.text import check_text_encoder
from wan_train.models.vae.vae import WanVAE, check_vae
from wan_train.models.variants import Variant
from wan_train.placement.report import release_memory
from wan_train.sampling.decode import decode_frames
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.encode import check_encodable, check_given_clip
from wan_train.sampling.grammar import PREVIEW, read_prompts
from wan_train.sampling.request import SampleRequest, preview_defaults
from wan_train.sampling.settings import MAX_SEED
from wan_train.sampling.step_cache.profile import check_cache
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


def check_previews(settings: TrainSettings, variant: Variant) -> list[SampleRequest]:
    """Return the requests of the previews. Raise InputError, before a model is loaded, if something they need is
    missing."""
    preview = settings.preview
    if preview.sample_with_ema and settings.loop.ema_decay is None:
        raise InputError("--sample_with_ema requires --ema_decay, such as 0.999")
    if preview.sample_prompts is None:
        if preview.sample_every_n_epochs or preview.sample_every_n_steps or preview.sample_at_first:
            raise InputError("previews need --sample_prompts FILE")
        return []
    grammar = replace(PREVIEW, strict=preview.strict_prompts)
    requests = read_prompts(preview.sample_prompts, preview_defaults(variant), grammar)
    for flag, value in (("--vae", settings.vae.vae), ("--t5", settings.text.t5)):
        if not value:
            raise InputError(f"previews need {flag}: give it, or leave out --sample_prompts")
    check_vae(settings.vae.vae, latent_channels=variant.space.channels)
    check_given_clip(settings.image, variant, settings.dit, settings.init)
    for request in requests:
        check_encodable(request, settings.image, [settings.dit], settings.init)
        check_cache(request, is_compiled=settings.compile.compile)
    check_text_encoder(settings.text.t5, settings.text.tokenizer or "auto")
    for index, request in enumerate(requests):
        seed = f"the run's seed + {index}" if request.seed is None else f"seed {request.seed}"
        last = replace(request, seed=MAX_SEED if request.seed is None else request.seed)
        check_name(
            preview_path(settings.save, "e000000", index, last, ".mp4"), "give a shorter --output_name or --output_dir"
        )
        log.info('preview %d ("%s", %s): %s', index, request.short_prompt, seed, request.settings_summary)
    return requests


def preview_path(save: SaveSettings, moment: str, index: int, request: SampleRequest, suffix: str) -> Path:
    """Return OUTPUT_DIR/sample/NAME_MOMENT_INDEX_TIME_SEED and a suffix."""
    stamp = datetime.now().strftime("%Y%m%d%H%M%S")
    name = f"{save.output_name}_{moment}_{index:02d}_{stamp}_{request.seed}"
    return Path(save.output_dir) / "sample" / f"{name}{suffix}"


@dataclass(frozen=True)
class Previewer:
    """Everything that this process needs for its previews except the model: `requests` and their `images` by prompt
    index, `conditions` by text, and the VAE parked on the CPU."""

    requests: Mapping[int, SampleRequest]
    conditions: Mapping[str, Conditions]
    images: Mapping[int, ImageConditions | None]
    vae: WanVAE
    device: torch.device
    save: SaveSettings
    fps: int
    seed: int

    def make(self, model: nn.Module, moment: str) -> dict[int, Path]:
        """Generate each prompt and write OUTPUT_DIR/sample/NAME_MOMENT_INDEX_TIME_SEED.mp4 (.png for one frame).

        A preview that fails, for example out of memory, is logged as a warning and skipped. Return the paths of the
        others by prompt index.
        """
        training = model.training
        model.eval()
        try:
            made = {index: self._try_one(model, moment, index, request) for index, request in self.requests.items()}
        finally:
            model.train(training)
        return {index: path for index, path in made.items() if path is not None}

    def _try_one(self, model: nn.Module, moment: str, index: int, request: SampleRequest) -> Path | None:
        try:
            return self._make_one(model, moment, index, request)
        except Exception as problem:  # a failed preview must not stop a run
            reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        # The exception is freed here, and with it the tensors that its frames held.
        self.vae.to("cpu")
        release_memory()
        log.warning("preview %d at %s failed, training continues: %s", index, moment, reason)
        return None

    def _make_one(self, model: nn.Module, moment: str, index: int, request: SampleRequest) -> Path:
        seeded = request if request.seed is not None else replace(request, seed=self.seed + index)
        texts = (self.conditions[text] for text in (request.prompt, request.negative_prompt))
        positive, negative = (text.with_images(self.images[index]) for text in texts)
        latents = sample_latents(model, seeded, positive, negative, device=self.device)
        is_video = latents.shape[1] > 1
        path = preview_path(self.save, moment, index, seeded, ".mp4" if is_video else ".png")
        self.vae.to(self.device)
        frames = decode_frames(self.vae, latents, self.device)
        if is_video:
            write_video(path, frames, fps=self.fps)
        else:
            write_image(path, next(frames))
        self.vae.to("cpu")
        log.info("preview %s", path)
        return path
