"""The generator's models, each loaded when it is needed and on the device only while it is used."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from generate.settings import GenerateSettings
from generate.text_cache import TextCache
from networks.attached import attach_loras
from wan_train.assemble import ModelSettings, WeightedLora, assemble_dit, finish_dit
from wan_train.conditions.conditions import Conditions, ImageConditions
from wan_train.distributed.exchange import made_by_first
from wan_train.distributed.groups import Groups
from wan_train.log import get_logger
from wan_train.models.dit.experts import HIGH
from wan_train.models.encoders.text import TextEncoder
from wan_train.models.loading import linear_shapes
from wan_train.models.vae.strips import Strips
from wan_train.models.vae.vae import WanVAE
from wan_train.placement.lanes import lane_from_host
from wan_train.placement.parking import Parking
from wan_train.placement.report import release_memory
from wan_train.placement.sharding import make_sharding
from wan_train.precision import accumulate_in_float32, published_dtype
from wan_train.quantization.stored import storage_dtype
from wan_train.sampling.decode import decode_frames, open_vae
from wan_train.sampling.denoise import Sampling
from wan_train.sampling.encode import encode_clip, encode_images, encode_with, open_image_encoder, open_text_encoder
from wan_train.sampling.passes import ALONE, Sharing
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.sharing import Shared
from wan_train.sampling.step_cache.measure import Measurement
from wan_train.storage import read_header

log = get_logger(__name__)


Loras = Mapping[str | None, Sequence[WeightedLora]]  # by expert, None for a task's only model


@dataclass
class LoadedModel:
    """A handle to a model, whose reference is dropped when the model is unloaded."""

    model: Any


@dataclass(frozen=True)
class VideoInputs:
    """The inputs of a video other than text: latents (C, F, H, W) of a source video, and images."""

    source: Tensor | None = None
    images: ImageConditions | None = None


@dataclass
class Models:
    """Text encoder, image encoder, DiT and VAE; only one at a time is on the device.

    With `keep` they are kept in CPU RAM between uses, otherwise freed; a DiT has a pinned copy there from its first
    use on, so that it is only ever copied to the device. Processes of `groups` that generate a video
    together use the same models at the same time.
    """

    settings: GenerateSettings
    loras: Loras
    device: torch.device
    keep: bool = False
    groups: Groups = field(default_factory=Groups)
    _idle: dict[str, nn.Module] = field(default_factory=dict)
    _parkings: dict[str, Parking] = field(default_factory=dict)
    _encoded: dict[str, Conditions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accumulate_in_float32()
        self.sharing: Sharing = Shared(self.groups) if self.groups.num_in_video > 1 else ALONE

    def encode(self, texts: Sequence[str]) -> dict[str, Conditions]:
        """Return the conditions of texts, by text; each is encoded once, unless it is in the text cache.

        The first of the processes that generate a video together encodes for all; with `--t5_fsdp` all of them encode.
        """
        if self.settings.parallel.t5_fsdp:
            return self._encode(texts)
        return made_by_first(self.groups.whole, lambda: self._encode(texts))

    def _encode(self, texts: Sequence[str]) -> dict[str, Conditions]:
        wanted = list(dict.fromkeys(texts))
        cache = TextCache(self.settings.output.text_cache, self.settings.text, self.device)
        known = {text: self._encoded[text] for text in wanted if text in self._encoded}
        find = partial(cache.find, [text for text in wanted if text not in known])
        # Other groups may be writing to the cache: processes that encode together must agree on the missing texts.
        known |= made_by_first(self.groups.whole, find) if self.settings.parallel.t5_fsdp else find()
        missing = [text for text in wanted if text not in known]
        if missing:
            log.info("encoding %d prompts with %s", len(missing), self.settings.text.t5)
            with self._loaded("text encoder", self._open_text_encoder) as loaded:
                new = encode_with(loaded.model, missing)
            if self.groups.is_first:
                cache.keep(new)
            known |= new
        if self.keep:
            self._encoded |= known
        return known

    def start(
        self,
        request: SampleRequest,
        texts: Mapping[str, Conditions],
        inputs: VideoInputs,
        *,
        measurement: Measurement | None = None,
    ) -> Sampling:
        """Return a new sampling run; with `measurement` it measures the errors of a step cache."""
        both = (texts[text].with_images(inputs.images) for text in (request.prompt, request.negative_prompt))
        return Sampling(
            request,
            *both,
            source=inputs.source,
            measurement=measurement,
            sharing=self.sharing,
            device=self.device,
        )

    @contextmanager
    def dit(self, expert: str | None = None) -> Iterator[LoadedModel]:
        """Load the DiT, or one of two experts, for the duration of the context."""
        name = f"DiT {expert}" if expert else "DiT"
        with self._loaded(name, lambda: self._open_dit(expert)) as loaded:
            yield loaded

    @contextmanager
    def image_encoder(self) -> Iterator[LoadedModel]:
        """Load the image encoder for the duration of the context."""
        with self._loaded("image encoder", lambda: open_image_encoder(self.settings.image, self.device)) as loaded:
            yield loaded

    @contextmanager
    def vae(self) -> Iterator[LoadedModel]:
        """Load the VAE for the duration of the context."""
        with self._loaded("VAE", self._open_vae) as loaded:
            yield loaded

    def decode(self, vae: LoadedModel, latents: Tensor) -> Iterator[np.ndarray]:
        """Yield frames (H, W, 3) uint8 of latents (C, F', H', W'), decoded lazily.

        With `--vae_parallel` all processes of a group must iterate, and only the first receives frames.
        """
        return decode_frames(vae.model, latents, self.device)

    def encode_video(self, vae: LoadedModel, pixels: Tensor) -> Tensor:
        """Encode pixels (1, 3, F, H, W) to latents (C, F', H', W') in CPU RAM."""
        return vae.model.encode(pixels.to(self.device))[0].cpu()

    def encode_clip(self, encoder: LoadedModel, request: SampleRequest) -> Tensor:
        """Return the CLIP tokens (I, width) of the request's images, in CPU RAM."""
        return encode_clip(request, encoder.model)

    def encode_images(
        self, vae: LoadedModel | None, request: SampleRequest, tokens: Tensor | None
    ) -> ImageConditions | None:
        """Return the conditions of the request's images and controls, in CPU RAM."""
        return encode_images(request, None if vae is None else vae.model, tokens, self.device)

    @contextmanager
    def _loaded(self, name: str, load: Callable[[], Any]) -> Iterator[LoadedModel]:
        model = self._idle.pop(name, None)
        if model is None:
            self._parkings.pop(name, None)  # of a model that did not fit on the device
            model = load()
        elif name in self._parkings:
            self._parkings[name].bring()
        elif self._moves(name):
            model.to(self.device)
        loaded = LoadedModel(model)
        del model
        try:
            yield loaded
        finally:
            if self.keep:
                self._idle[name] = self._put_away(name, loaded.model)
            loaded.model = None
            release_memory()

    def _put_away(self, name: str, model: nn.Module) -> nn.Module:
        """Move a model to CPU RAM, if it moves, and return it."""
        if not self._moves(name):
            return model
        lane = lane_from_host(self.device) if name.startswith("DiT") else None
        if lane is None:
            return model.to("cpu")
        if name not in self._parkings:
            self._parkings[name] = Parking(model, lane)
        self._parkings[name].park()
        return model

    def _moves(self, name: str) -> bool:
        """Whether a model is moved to CPU RAM between uses: not if parts of it always are there."""
        streamed = name.startswith("DiT") and self.settings.stream.blocks_to_swap
        return not (streamed or (name == "text encoder" and self.settings.text.fp8_t5))

    def _open_vae(self) -> WanVAE:
        log.info("loading %s", self.settings.vae.vae)
        vae = open_vae(self.settings.vae, self.device)
        if self.settings.parallel.vae_parallel:
            vae.strips = Strips(self.groups.whole)
        return vae

    def _open_text_encoder(self) -> TextEncoder:
        group = self.groups.whole.group if self.settings.parallel.t5_fsdp else None
        return open_text_encoder(self.settings.text, self.device, sharding=make_sharding(group, self.device))

    def _open_dit(self, expert: str | None) -> nn.Module:
        settings, loras = model_settings(self.settings, expert), self.loras.get(expert, ())
        path = settings.dit.dit
        log.info("loading %s%s", path, "".join(f" + {lora.multiplier:g} x {lora.path}" for lora in loras))
        dtype = dit_dtype(path, self.device)
        attached = self.settings.lora.lora_mode == "attach"
        # Shard within each half of guidance: the halves run different passes, and one may skip blocks.
        group = self.groups.tokens.group if self.settings.parallel.dit_fsdp else None
        sharding = make_sharding(group, self.device)
        merged = [] if attached else loras
        model = assemble_dit(settings, device=self.device, dtype=dtype, loras=merged, sharding=sharding)
        if attached:
            names = linear_shapes(path)
            attach_loras(model, [(lora.read(names), lora.multiplier) for lora in loras], device=self.device)
        finish_dit(model, settings, self.device)
        return model


def dit_dtype(path: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of a DiT on a device; None keeps the file's. An accelerator computes float32 files in bfloat16,
    as the official sampler does."""
    return published_dtype(device) if storage_dtype(read_header(path)) is torch.float32 else None


def model_settings(settings: GenerateSettings, expert: str | None = None) -> ModelSettings:
    """Return the settings of the DiT, or of one of two experts."""
    path = settings.experts.dit_high_noise if expert == HIGH else settings.dit.dit
    dit = replace(settings.dit, dit=path)
    return ModelSettings(dit, settings.weights, settings.stream, settings.activations, settings.compile)
