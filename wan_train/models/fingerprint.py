"""By what a checkpoint can be told from another without reading all of its gigabytes."""

import hashlib
from pathlib import Path

from wan_train.shards import expand
from wan_train.storage import read_header

_SAMPLES, _SAMPLE_BYTES = 32, 4096


def fingerprint(path: str) -> str:
    """16 hexadecimal digits of a checkpoint: of its tensors' names, shapes and dtypes, and of 32 pieces of 4 KiB spread
    evenly over each of its files, by which one fine-tune is told from the next. The place of the files does not count.
    """
    header = read_header(path)
    rows = [f"{name} {tuple(shape)} {header.dtypes[name]}" for name, shape in sorted(header.shapes.items())]
    digest = hashlib.sha256("\n".join(rows).encode())
    for part in sorted(_sampled(file) for file in expand(path)):
        digest.update(part)
    return digest.hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal digits: for files that are read in a moment."""
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
