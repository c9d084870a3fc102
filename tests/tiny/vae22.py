"""The Wan2.2 VAE at a small size: the names of the published file, and the shapes that go with a width.

save(folder / VAE22, vae22_shapes(), torch.float32)
"""

import itertools

from tests.tiny.make import Shapes, _conv, _conv2d, _vae_part

VAE22 = "Wan2.2_VAE.safetensors"


def vae22_shapes(dim: int = 8, *, decoder_dim: int = 12, latents: int = 48) -> Shapes:
    """Return names and shapes of the Wan2.2 VAE; `dim` and `decoder_dim` are the channels next to the pixels (160 and
    256)."""
    folded = 3 * 2 * 2  # channels of a square of 2x2 pixels
    down = [dim, dim, 2 * dim, 4 * dim, 4 * dim]
    up = [4 * decoder_dim, 4 * decoder_dim, 4 * decoder_dim, 2 * decoder_dim, decoder_dim]
    shapes = _conv("encoder.conv1", dim, folded, 3) | _conv("decoder.conv1", up[0], latents, 3)
    steps = ("resample2d", "resample3d", "resample3d", "")
    for i, ((width, out), step) in enumerate(zip(itertools.pairwise(down), steps, strict=True)):
        shapes |= _stage(f"encoder.downsamples.{i}.downsamples", width, out, blocks=2, step=step)
    steps = ("resample3d", "resample3d", "resample2d", "")
    for i, ((width, out), step) in enumerate(zip(itertools.pairwise(up), steps, strict=True)):
        shapes |= _stage(f"decoder.upsamples.{i}.upsamples", width, out, blocks=3, step=step)
    for side, top, last, out in (("encoder", down[-1], down[-1], 2 * latents), ("decoder", up[0], up[-1], folded)):
        middle = f"{side}.middle"
        shapes |= _vae_part(f"{middle}.0", "block", top, top) | _vae_part(f"{middle}.2", "block", top, top)
        shapes |= {f"{middle}.1.norm.gamma": (top, 1, 1)}
        shapes |= _conv2d(f"{middle}.1.to_qkv", 3 * top, top, 1) | _conv2d(f"{middle}.1.proj", top, top, 1)
        shapes |= {f"{side}.head.0.gamma": (last, 1, 1, 1)} | _conv(f"{side}.head.2", out, last, 3)
    return shapes | _conv("conv1", 2 * latents, 2 * latents, 1) | _conv("conv2", latents, latents, 1)


def _stage(prefix: str, width: int, out: int, *, blocks: int, step: str) -> Shapes:
    """Return the shapes of residual blocks, the first of which changes the channels, and of a resampling unless `step`
    is empty."""
    shapes: Shapes = {}
    for i in range(blocks):
        shapes |= _vae_part(f"{prefix}.{i}", "block", out if i else width, out)
    return shapes | (_vae_part(f"{prefix}.{blocks}", step, out, out) if step else {})
