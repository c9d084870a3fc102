"""The hashes by which model managers know a LoRA file."""

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

_LEGACY = slice(0x100000, 0x110000)  # the part of a file that the first such hash looked at


def add_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with `sshs_model_hash` and `sshs_legacy_hash` of these tensors (kohya's definition).

    Both are taken of the file as it would be with its `ss_*` metadata alone, so that they survive a change of title:
    the SHA-256 of all that follows the header, and the first 8 hexadecimal digits of that of 64 KiB at 1 MiB.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    body = memoryview(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, training))
    header_size = 8 + int.from_bytes(body[:8], "little")
    return dict(metadata) | {
        "sshs_model_hash": hashlib.sha256(body[header_size:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(body[_LEGACY]).hexdigest()[:8],
    }
