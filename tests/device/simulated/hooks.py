"""Let a CPU build of torch take fake tensors on CUDA through autograd, as a CUDA build without a GPU does.

A CPU build lacks two things. The first is a device guard for CUDA: `torch._C._ensureCUDADeviceGuardSet` installs
torch's FakeGuardImpl (eight devices), but only over a guard that counts no devices, as a CUDA build registers it; so a
guard whose methods all return 0 is registered first. The second is the hooks' answer that CUDA is built, by which the
autograd engine finds the accelerator whose streams and threads it uses.

Both reach into torch's shared libraries by symbol and by position in a table of virtual methods, which may differ in
each version of torch.
"""

import ctypes
from pathlib import Path

import torch

KNOWN = ("2.13",)  # the versions whose tables were compared with the positions below
_IS_BUILT, _HAS_CONTEXT = 2, 4  # positions in the table of CUDAHooksInterface, whose first two entries are destructors
_CUDA = 1  # index of the device type
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_HOOKS = "_ZN2at6detail12getCUDAHooksEv"
_KEPT: list[object] = []


class CannotSimulate(RuntimeError):
    """This torch cannot be hooked, so that no simulated device is available."""


def install() -> None:
    """Install the guard and the hooks for the rest of the process; a build for CUDA has its own and needs none.

    Call it before the first backward pass of the process: the engine then starts a thread for each device. Raises
    CannotSimulate, with the reason, if this torch is not one that can be hooked.
    """
    if _KEPT or torch.cuda._is_compiled():
        return
    if not torch.__version__.startswith(tuple(f"{version}." for version in KNOWN)):
        raise CannotSimulate(_told(f"it is known for {', '.join(KNOWN)} only"))
    try:
        libraries = Path(torch.__file__).parent / "lib"
        c10, aten = (ctypes.CDLL(str(libraries / name)) for name in ("libc10.so", "libtorch_cpu.so"))
        _set_guard(c10)
        _set_hooks(aten)
    except (OSError, AttributeError, ValueError) as problem:  # no such library or symbol
        raise CannotSimulate(_told(str(problem))) from problem
    if torch._C._accelerator_getAccelerator().type != "cuda":
        raise CannotSimulate(_told("autograd does not see the accelerator"))


def _told(reason: str) -> str:
    return (
        f"the simulated CUDA device does not know torch {torch.__version__}: {reason}. Compare"
        " aten/src/ATen/detail/CUDAHooksInterface.h of this version with tests/device/simulated/hooks.py, and add it to"
        " KNOWN there"
    )


def _set_guard(c10: ctypes.CDLL) -> None:
    registry = (ctypes.c_void_p * 2).in_dll(c10, _REGISTRY)
    if registry[_CUDA]:
        raise CannotSimulate(_told("a guard for CUDA is registered already"))
    zero = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda _: 0)
    table = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = (ctypes.c_void_p * 4)(ctypes.addressof(table))
    registry[_CUDA] = ctypes.addressof(guard)
    _KEPT.extend([zero, table, guard])
    torch._C._ensureCUDADeviceGuardSet()
    if registry[_CUDA] == ctypes.addressof(guard):
        raise CannotSimulate(_told("it does not install its own guard"))


def _set_hooks(aten: ctypes.CDLL) -> None:
    get_hooks = getattr(aten, _HOOKS)
    get_hooks.restype = ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p * 64))
    hooks = get_hooks()
    is_built = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    has_context = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda _, index: index == 0)
    methods = (ctypes.c_void_p * 64)(*hooks.contents.contents)
    methods[_IS_BUILT] = ctypes.cast(is_built, ctypes.c_void_p).value
    methods[_HAS_CONTEXT] = ctypes.cast(has_context, ctypes.c_void_p).value
    hooks[0] = ctypes.pointer(methods)
    _KEPT.extend([is_built, has_context, methods])
