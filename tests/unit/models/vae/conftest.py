"""A VAE for the tests of this folder: each of the two, unless a file says which."""

from collections.abc import Iterator

import pytest

from tests.unit.models.vae.vaes import WAN21, WAN22, SmallVae
from wan_train.models.vae.vae import WanVAE, load_vae


@pytest.fixture(scope="module", params=[WAN21, WAN22], ids=lambda small: small.name)
def small(request: pytest.FixtureRequest) -> SmallVae:
    return request.param


@pytest.fixture(scope="module")
def loaded(small: SmallVae) -> WanVAE:
    return load_vae(small.weights)


@pytest.fixture
def vae(loaded: WanVAE) -> Iterator[WanVAE]:
    yield loaded
    loaded.tiling, loaded.cache_on_cpu = None, False
