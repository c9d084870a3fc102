"""Fingerprints that identify a checkpoint without reading all of it."""

import hashlib
from pathlib import Path

from wan_train.shards import expand
from wan_train.storage import read_header

_SAMPLES, _SAMPLE_BYTES = 32, 4096


def fingerprint(path: str) -> str:
    """Return 16 hexadecimal digits that identify a checkpoint.

    They are a hash of the tensors' names, shapes and dtypes and of 32 evenly spaced samples of 4 KiB of each file,
    which distinguish one fine-tune from another. The location of the files does not matter.
    """
    header = read_header(path)
    rows = [f"{name} {tuple(shape)} {header.dtypes[name]}" for name, shape in sorted(header.shapes.items())]
    digest = hashlib.sha256("\n".join(rows).encode())
    for part in sorted(_sampled(file) for file in expand(path)):
        digest.update(part)
    return digest.hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; reads the whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for index in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.digest()
