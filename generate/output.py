"""What the generator leaves on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from torch import Tensor

from generate.settings import OutputSettings
from wan_train.media_out import write_image, write_images, write_video
from wan_train.sampling.request import SampleRequest
from wan_train.storage import check_writable, save_tensors


@dataclass(frozen=True)
class Product:
    """What there is to write: the request, latents (C, F, H, W), frames (F, H, W, 3) or None, frames per second."""

    request: SampleRequest
    latents: Tensor
    frames: np.ndarray | None
    fps: int
    stem: Path  # the path without a suffix: that of the .mp4, or FOLDER/TIME_SEED
    named: bool  # the user named the file


def write_outputs(
    settings: OutputSettings, request: SampleRequest, latents: Tensor, frames: np.ndarray | None, *, fps: int
) -> list[Path]:
    """Write what `--output_type` names and return the paths."""
    product = Product(request, latents, frames, fps, _stem(settings, request), _is_file(settings))
    return [write(product) for write in _WRITERS[settings.output_type]]


def check_output(settings: OutputSettings) -> None:
    """Fail now if the result could not be written."""
    path = Path(settings.save_path)
    check_writable(path.parent if _is_file(settings) else path)


def _is_file(settings: OutputSettings) -> bool:
    return Path(settings.save_path).suffix.lower() == ".mp4"


def _stem(settings: OutputSettings, request: SampleRequest) -> Path:
    if _is_file(settings):
        return Path(settings.save_path).with_suffix("")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path(settings.save_path) / f"{stamp}_{request.seed}"


def _write_video(product: Product) -> Path:
    assert product.frames is not None
    if len(product.frames) == 1 and not product.named:
        picture = product.stem.with_name(product.stem.name + ".png")
        write_image(picture, product.frames[0])
        return picture
    video = product.stem.with_name(product.stem.name + ".mp4")
    write_video(video, product.frames, fps=product.fps)
    return video


def _write_images(product: Product) -> Path:
    assert product.frames is not None
    write_images(product.stem, product.frames)
    return product.stem


def _write_latent(product: Product) -> Path:
    request = product.request
    path = product.stem.with_name(f"{product.stem.name}_latent.safetensors")
    metadata = {
        "seeds": str(request.seed),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": str(request.height),
        "width": str(request.width),
        "video_length": str(request.frames),
        "infer_steps": str(request.steps),
        "guidance_scale": str(request.guidance),
    }
    save_tensors(path, {"latent": product.latents}, metadata)
    return path


_WRITERS: dict[str, tuple[Callable[[Product], Path], ...]] = {
    "video": (_write_video,),
    "images": (_write_images,),
    "latent": (_write_latent,),
    # The latent first: it is what cannot be made again in seconds should the video fail.
    "both": (_write_latent, _write_video),
}
