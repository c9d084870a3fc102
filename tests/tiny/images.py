"""Tiny random models for tasks with images, beside those of `tests.tiny.make`: I2V, FLF2V and their image encoder."""

from pathlib import Path

import torch

from tests.tiny.make import SCENES, Shapes, dit_shapes, draw_frames, save

I2V = "wan_i2v_tiny.safetensors"
FLF2V = "wan_flf2v_tiny.safetensors"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
FIRST, LAST = "first.png", "last.png"

WIDTH, PATCHES = 160, 4  # two heads of 80; images of 28 x 28
TOKENS = PATCHES + 1


def make_image_models(folder: Path) -> None:
    """Write the two DiTs and the image encoder, and two images to use as first and last frame."""
    save(folder / I2V, image_dit_shapes(), torch.bfloat16)
    save(folder / FLF2V, image_dit_shapes(images=2), torch.bfloat16)
    save(folder / CLIP, clip_shapes(), torch.float32)
    frames = list(draw_frames(next(iter(SCENES)), size=(120, 80)))
    frames[0].save(folder / FIRST)
    frames[-1].save(folder / LAST)


def image_dit_shapes(*, images: int = 1, num_layers: int = 2, dim: int = 256) -> Shapes:
    """Return names and shapes of a Wan2.1 I2V DiT, or with two images of an FLF2V one."""
    shapes = dit_shapes(dim=dim, num_layers=num_layers, in_dim=36)
    for block in (f"blocks.{i}.cross_attn" for i in range(num_layers)):
        for part in ("k_img", "v_img"):
            shapes |= {f"{block}.{part}.weight": (dim, dim), f"{block}.{part}.bias": (dim,)}
        shapes[f"{block}.norm_k_img.weight"] = (dim,)
    for part, out, width in (("proj.1", WIDTH, WIDTH), ("proj.3", dim, WIDTH)):
        shapes |= {f"img_emb.{part}.weight": (out, width), f"img_emb.{part}.bias": (out,)}
    for part, width in (("proj.0", WIDTH), ("proj.4", dim)):
        shapes |= {f"img_emb.{part}.{leaf}": (width,) for leaf in ("weight", "bias")}
    return shapes | ({"img_emb.emb_pos": (1, images * TOKENS, WIDTH)} if images > 1 else {})


def clip_shapes(*, num_layers: int = 3, patch: int = 14, inner: int = 96) -> Shapes:
    """Return names and shapes of the official CLIP file, without its text tower."""
    shapes: Shapes = {
        "cls_embedding": (1, 1, WIDTH),
        "pos_embedding": (1, TOKENS, WIDTH),
        "patch_embedding.weight": (WIDTH, 3, patch, patch),
        "head": (WIDTH, 64),
    }
    for norm in ("pre_norm", "post_norm", *(f"transformer.{i}.norm{n}" for i in range(num_layers) for n in (1, 2))):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    for block in (f"transformer.{i}" for i in range(num_layers)):
        for part, out, width in (
            ("attn.to_qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.0", inner, WIDTH),
            ("mlp.2", WIDTH, inner),
        ):
            shapes |= {f"{block}.{part}.weight": (out, width), f"{block}.{part}.bias": (out,)}
    return {f"visual.{name}": shape for name, shape in shapes.items()} | {"log_scale": ()}
