"""diffusers' transformer at the size of the golden cases, with weights that only their names decide."""

from typing import Any

from torch import Tensor, nn

from tests.parity.golden import normal


def tiny_transformer(**more: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A WanTransformer3DModel of two layers, `more` its further arguments, and the weights that it was given."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=20,
        freq_dim=64,
        ffn_dim=80,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        **more,
    )
    weights = {name: 0.3 * normal(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    return model, weights
