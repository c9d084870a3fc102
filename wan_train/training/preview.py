"""Previews: the generator's own sampling on the model in training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from wan_train.conditions import Conditions
from wan_train.log import get_logger
from wan_train.media_out import write_image, write_video
from wan_train.models.vae import WanVAE
from wan_train.sampling.decode import decode_frames
from wan_train.sampling.denoise import sample_latents
from wan_train.sampling.request import SampleRequest
from wan_train.training.settings import SaveSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class Previewer:
    """Everything that a preview needs but the model; `conditions` by prompt, the VAE parked on the CPU."""

    requests: Sequence[SampleRequest]
    conditions: Mapping[str, Conditions]
    vae: WanVAE
    device: torch.device
    save: SaveSettings
    fps: int
    seed: int

    def make(self, model: nn.Module, moment: str) -> list[Path]:
        """Sample every prompt and write OUTPUT_DIR/sample/NAME_MOMENT_INDEX_TIME_SEED.mp4 (.png for one frame)."""
        training = model.training
        model.eval()
        try:
            return [self._make_one(model, moment, index, request) for index, request in enumerate(self.requests)]
        finally:
            model.train(training)

    def _make_one(self, model: nn.Module, moment: str, index: int, request: SampleRequest) -> Path:
        seeded = request if request.seed is not None else replace(request, seed=self.seed + index)
        positive, negative = self.conditions[request.prompt], self.conditions[request.negative_prompt]
        latents = sample_latents(model, seeded, positive, negative, device=self.device)
        self.vae.to(self.device)
        frames = decode_frames(self.vae, latents, self.device)
        self.vae.to("cpu")
        stamp = datetime.now().strftime("%Y%m%d%H%M%S")
        name = f"{self.save.output_name}_{moment}_{index:02d}_{stamp}_{seeded.seed}"
        path = Path(self.save.output_dir) / "sample" / (name + (".mp4" if len(frames) > 1 else ".png"))
        if len(frames) > 1:
            write_video(path, frames, fps=self.fps)
        else:
            write_image(path, frames[0])
        log.info("preview %s", path)
        return path
