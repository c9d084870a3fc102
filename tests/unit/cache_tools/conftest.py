"""A small VAE to cache with."""

from pathlib import Path

import pytest
import torch

from wan_train.models.vae.vae import Geometry, WanVAE
from wan_train.storage import save_tensors


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a VAE of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_tensors(path, WanVAE(Geometry(8, (8, 8, 8, 8), 1)).state_dict())
    return path
