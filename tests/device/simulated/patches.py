"""Everything of torch that is replaced while a device is simulated."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.device.simulated.attention import Attention
from tests.device.simulated.device import SimulatedCuda
from tests.device.simulated.files import file_patches
from tests.device.simulated.generators import Generator
from tests.device.simulated.runtime import Patch, runtime_patches
from tests.device.simulated.tensors import data_patch, tensor_patches


@contextmanager
def patched(cuda: SimulatedCuda) -> Iterator[None]:
    """Replace what the simulated device answers instead of torch, and undo it at the end."""
    with ExitStack() as stack:
        for owner, name, value in (
            *runtime_patches(cuda),
            *tensor_patches(cuda),
            *file_patches(cuda),
            *_foreach_patches(),
            (torch, "Generator", Generator),
            (torch.nn.functional, "scaled_dot_product_attention", Attention(cuda.find, cuda.attention)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(*data_patch(cuda), create=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
        yield


def _foreach_patches() -> Iterator[Patch]:
    """Yield lists that let optimizers use their foreach kernels, as they do for plain tensors on a GPU."""
    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        module = importlib.import_module(name)
        if hasattr(module, "_foreach_supported_types"):
            yield module, "_foreach_supported_types", [*module._foreach_supported_types, FakeTensor]
