"""The hashes by which model managers identify a LoRA file."""

import hashlib
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

_LEGACY = slice(0x100000, 0x110000)  # the part of a file covered by the legacy hash


def add_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with `sshs_model_hash` and `sshs_legacy_hash` of these tensors (kohya's definition).

    Both are computed for the file with only its `ss_*` metadata, so that they do not depend on the title: the SHA-256
    of everything after the header, and the first 8 hexadecimal digits of the SHA-256 of 64 KiB at offset 1 MiB.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    body = memoryview(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, training))
    header_size = 8 + int.from_bytes(body[:8], "little")
    return dict(metadata) | {
        "sshs_model_hash": hashlib.sha256(body[header_size:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(body[_LEGACY]).hexdigest()[:8],
    }
