"""Tensor names of the Wan VAEs: official ones and those of diffusers' AutoencoderKLWan.

Shapes are the same in both. In Wan2.1 the down layers are one flat list in both namings, the up layers only in the
official one; in Wan2.2 both namings have a list per stage.
"""

from collections.abc import Mapping, Sequence

from wan_train.models.weights import Rename, Shapes

STAGE_BLOCKS = 3  # residual blocks per stage of the published decoder

# Name prefixes that only a Wan2.2 VAE has.
_STAGED = ("encoder.down_blocks.0.resnets.", "encoder.down_blocks.0.downsampler.", "decoder.up_blocks.0.upsampler.")

_TOP = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def vae_rename(shapes: Shapes) -> Rename:
    """Return the function from the names of this VAE checkpoint to the official ones."""
    stage = "decoder.up_blocks.0.resnets."
    blocks = {name.removeprefix(stage).split(".")[0] for name in shapes if name.startswith(stage)}
    if not blocks and "quant_conv.weight" not in shapes:
        return lambda name: name
    staged = any(name.startswith(_STAGED) for name in shapes)
    return lambda name: official_name(name, stage_blocks=len(blocks) or STAGE_BLOCKS, staged=staged)


def official_name(name: str, *, stage_blocks: int = STAGE_BLOCKS, staged: bool = False) -> str:
    """Return the official name of a VAE tensor with a diffusers name; other names are unchanged.

    A decoder stage has `stage_blocks` residual blocks, then the upsampler; a Wan2.2 encoder stage has one block less,
    then the downsampler. `staged`: the official decoder has stages too (Wan2.2), not one flat list.
    """
    match name.split("."):
        case [top, *tail] if top in _TOP:
            return _join(_TOP[top], tail)
        case ["encoder" | "decoder" as side, end, *tail] if end in _ENDS:
            return _join(side, [_ENDS[end], *tail])
        case ["encoder" | "decoder" as side, "mid_block", kind, index, *tail] if f"{kind}.{index}" in _MIDDLE:
            return _join(side, ["middle", _MIDDLE[f"{kind}.{index}"], *_renamed(tail, _BLOCK)])
        case ["encoder", "down_blocks", stage, "resnets", block, *tail]:
            return _join("encoder", ["downsamples", stage, "downsamples", block, *_renamed(tail, _BLOCK)])
        case ["encoder", "down_blocks", stage, "downsampler", *tail]:
            return _join("encoder", ["downsamples", stage, "downsamples", str(stage_blocks - 1), *tail])
        case ["encoder", "down_blocks", index, *tail]:
            return _join("encoder", ["downsamples", index, *_renamed(tail, _BLOCK)])
        case ["decoder", "up_blocks", stage, "upsampler", *tail]:
            return _join("decoder", ["upsamples", stage, "upsamples", str(stage_blocks), *tail])
        case ["decoder", "up_blocks", stage, "resnets", block, *tail] if staged:
            return _join("decoder", ["upsamples", stage, "upsamples", block, *_renamed(tail, _BLOCK)])
        case ["decoder", "up_blocks", stage, "resnets", block, *tail] if stage.isdecimal() and block.isdecimal():
            number = int(stage) * (stage_blocks + 1) + int(block)
            return _join("decoder", ["upsamples", str(number), *_renamed(tail, _BLOCK)])
        case ["decoder", "up_blocks", stage, "upsamplers", "0", *tail] if stage.isdecimal():
            return _join("decoder", ["upsamples", str(int(stage) * (stage_blocks + 1) + stage_blocks), *tail])
    return name


def diffusers_name(name: str, *, stage_blocks: int = STAGE_BLOCKS) -> str:
    """Return the diffusers name of an official one; the inverse of `official_name`."""
    match name.split("."):
        case [top, *tail] if top in _TOP.values():
            return _join(_inverse(_TOP)[top], tail)
        case ["encoder" | "decoder" as side, "middle", index, *tail] if index in _MIDDLE.values():
            return _join(side, ["mid_block", _inverse(_MIDDLE)[index], *_renamed(tail, _inverse(_BLOCK))])
        case ["encoder", "downsamples", stage, "downsamples", index, *tail]:
            part = ["downsampler"] if index == str(stage_blocks - 1) else ["resnets", index]
            return _join("encoder", ["down_blocks", stage, *part, *_renamed(tail, _inverse(_BLOCK))])
        case ["decoder", "upsamples", stage, "upsamples", index, *tail]:
            part = ["upsampler"] if index == str(stage_blocks) else ["resnets", index]
            return _join("decoder", ["up_blocks", stage, *part, *_renamed(tail, _inverse(_BLOCK))])
        case ["encoder", "downsamples", index, *tail]:
            return _join("encoder", ["down_blocks", index, *_renamed(tail, _inverse(_BLOCK))])
        case ["decoder", "upsamples", index, *tail] if index.isdecimal():
            number, block = divmod(int(index), stage_blocks + 1)
            part = ["upsamplers", "0"] if block == stage_blocks else ["resnets", str(block)]
            return _join("decoder", ["up_blocks", str(number), *part, *_renamed(tail, _inverse(_BLOCK))])
        case ["encoder" | "decoder" as side, *tail]:
            return _join(side, _renamed(tail, _inverse(_ENDS)))
    return name


def _join(head: str, tail: Sequence[str]) -> str:
    return ".".join([head, *tail])


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _renamed(parts: Sequence[str], table: Mapping[str, str]) -> list[str]:
    """Replace the first one or two parts if they are in the table."""
    for count in (2, 1):
        head = ".".join(parts[:count])
        if head in table:
            return [table[head], *parts[count:]]
    return list(parts)
