"""Our DiT against the official one's stored outputs, against diffusers, and against the published files' names."""

import pytest
import torch
from torch import Tensor

from networks.adapter import create
from networks.deltas.lora import LoraDelta
from networks.formats.files import read_lora
from networks.merge import merged
from networks.settings import NetworkSettings
from tests.parity.dit_cases import NAMES, load, lora_file, run
from tests.parity.golden import TOLERANCE, load_case, load_manifest, normal, relative_error
from tests.parity.theirs import tiny_transformer
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit
from wan_train.models.loading import check_dit, load_dit
from wan_train.models.variants import VARIANTS
from wan_train.models.weights import diffusers_name


@pytest.mark.parametrize("name", NAMES)
def test_output(name: str) -> None:
    case = load_case(name)
    assert relative_error(run(load(case), case), case.outputs["out"]) < TOLERANCE


@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v"])
def test_loss_and_gradients(name: str) -> None:
    case = load_case(name)
    model = load(case).requires_grad_(True)
    out = run(model, case)
    loss = (out - case.normal("target", out.shape)).square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(loss.detach().view(1), case.outputs["loss"].view(1)) < TOLERANCE
    norms = torch.stack([grads[name].norm() for name in case.spec["grad_norm_keys"]])
    assert ((norms - case.outputs["grad_norms"]).abs() < TOLERANCE * case.outputs["grad_norms"]).all()
    for key, stored in case.outputs.items():
        if key.startswith("grad."):
            assert relative_error(grads[key.removeprefix("grad.")], stored) < TOLERANCE


def linears(model: Dit) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_lora_merged() -> None:
    case = load_case("wan21_t2v_lora")
    deltas: dict[str, LoraDelta] = read_lora(lora_file(case), linears(load(case)))
    model = load(case, dict(merged(case.state_dict().items(), [(deltas, 1.0)])))
    assert relative_error(run(model, case), case.outputs["out"]) < TOLERANCE


def test_lora_attached() -> None:
    case = load_case("wan21_t2v_lora")
    model = load(case)
    rank, alpha = case.spec["lora"]
    create(model, NetworkSettings(network_dim=rank, network_alpha=alpha)).load(lora_file(case))
    assert relative_error(run(model, case), case.outputs["out"]) < TOLERANCE


@pytest.mark.parametrize("with_image", [False, True])
def test_diffusers_model_and_names(*, with_image: bool) -> None:
    image = {"image_dim": 28, "added_kv_proj_dim": 48, "pos_embed_seq_len": 12} if with_image else {}
    theirs, weights = tiny_transformer(in_channels=36 if with_image else 16, out_channels=16, **image)
    ours = load_dit(weights, config={"num_attention_heads": 2})
    latents, text = normal("latents", (2, 16, 3, 4, 6)), normal("text", (2, 512, 20))
    timestep = torch.tensor([37.0, 901.0])
    extra: dict[str, Tensor] = {}
    whole, features = latents, None
    if with_image:
        extra["image_latents"] = normal("y", (2, 20, 3, 4, 6))
        features = normal("features", (2, 12, 28))
        whole = torch.cat([latents, extra["image_latents"]], dim=1)
        extra["clip_features"] = features
    # A pair of images is twice the batch for theirs.
    halves = None if features is None else features.reshape(4, 6, 28)
    expected = theirs(whole, timestep, text, encoder_hidden_states_image=halves, return_dict=False)[0]
    assert relative_error(ours(latents, timestep, text, **extra), expected) < TOLERANCE
    assert {diffusers_name(name) for name in ours.state_dict()} == set(weights)


MANIFESTS = [
    ("wan2.1-t2v-1.3B", "t2v-1.3B"),
    ("wan2.1-t2v-14B", "t2v-14B"),
    ("wan2.1-i2v-14B", "i2v-14B"),
    ("wan2.1-flf2v-14B", "flf2v-14B"),
    ("wan2.1-fun-inp-1.3B", "i2v-14B"),
    ("wan2.1-fun-inp-14B", "i2v-14B"),
    ("wan2.2-t2v-A14B", "t2v-A14B"),
    ("wan2.2-i2v-A14B", "i2v-A14B"),
    ("wan2.2-ti2v-5B", "ti2v-5B"),
    ("wan2.1-fun-control-1.3B", "fun-control-1.3B"),
    ("wan2.1-fun-control-14B", "fun-control-14B"),
    ("wan2.1-fun-control-14B", "i2v-14B-FC"),
    ("wan2.1-fun-v1.1-control-1.3B", "t2v-1.3B-FC"),
    ("wan2.1-fun-v1.1-control-14B", "fun-control-14B"),
    ("wan2.1-fun-v1.1-control-camera-1.3B", "fun-camera-1.3B"),
    ("wan2.1-fun-v1.1-control-camera-14B", "fun-camera-14B"),
    ("wan2.1-vace-1.3B", "vace-1.3B"),
    ("wan2.1-vace-14B", "vace-14B"),
    ("wan2.1-vace-14B", "vace-fun-A14B"),
    ("wan2.2-fun-A14B-control", "fun-control-A14B"),
    ("wan2.2-i2v-A14B", "fun-inp-A14B"),
]


@pytest.mark.parametrize(("name", "task"), MANIFESTS)
def test_every_published_name_and_shape_is_accepted(name: str, task: str) -> None:
    manifest = load_manifest(name)
    with torch.device("meta"):
        state = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in manifest.items()}
    model = load_dit(state, device="meta")
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == manifest
    assert model.config.num_heads == model.config.dim // 128
    warning = check_dit(state, VARIANTS[task])
    assert (warning is None) == (model.config.dim == VARIANTS[task].dim)
    state.pop("blocks.3.norm3.weight")
    with pytest.raises(InputError, match=r"missing blocks\.3\.norm3\.weight"):
        check_dit(state, VARIANTS[task])
