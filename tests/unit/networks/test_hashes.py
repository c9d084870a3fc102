"""The two hashes, against files that are written and read here byte by byte."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from networks.formats.hashes import add_hashes


@pytest.mark.parametrize("width", [4, 600_000])  # ends before the part that the legacy hash looks at, and behind it
def test_hashes_are_those_of_the_file_with_its_training_metadata_alone(tmp_path, width: int) -> None:
    tensors = {"b": torch.arange(width, dtype=torch.float32), "a": torch.ones(2, 3).bfloat16().t()}
    metadata = {"ss_network_dim": "4", "ss_steps": "12", "modelspec.title": "a title"}
    path = tmp_path / "file.safetensors"
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, path, {k: metadata[k] for k in ("ss_network_dim", "ss_steps")}
    )
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rows = add_hashes(tensors, metadata)
    assert rows["sshs_model_hash"] == hashlib.sha256(content[header:]).hexdigest()
    assert rows["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert {key: rows[key] for key in metadata} == metadata
    assert (
        add_hashes(tensors, metadata | {"modelspec.title": "another"})["sshs_legacy_hash"] == rows["sshs_legacy_hash"]
    )
