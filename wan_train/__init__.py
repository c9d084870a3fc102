"""wan-train: training and generation for the Wan2.1 and Wan2.2 video models.

The public Python API. Names are imported on first use, so that `import wan_train` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wan_train.version import __version__ as __version__

if TYPE_CHECKING:
    from generate.call import generate as generate
    from wan_train.conditions.camera import plucker_embedding as plucker_embedding
    from wan_train.flow.solvers import make_solver as make_solver
    from wan_train.models.encoders.image import load_image_encoder as load_image_encoder
    from wan_train.models.encoders.text import load_text_encoder as load_text_encoder
    from wan_train.models.loading import load_dit as load_dit
    from wan_train.models.vae.vae import load_vae as load_vae

_EXPORTS = {
    "generate": "generate.call",
    "load_dit": "wan_train.models.loading",
    "load_image_encoder": "wan_train.models.encoders.image",
    "load_vae": "wan_train.models.vae.vae",
    "load_text_encoder": "wan_train.models.encoders.text",
    "make_solver": "wan_train.flow.solvers",
    "plucker_embedding": "wan_train.conditions.camera",
}

__all__ = [
    "generate",
    "load_dit",
    "load_image_encoder",
    "load_text_encoder",
    "load_vae",
    "make_solver",
    "plucker_embedding",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'wan_train' has no attribute {name!r}")
