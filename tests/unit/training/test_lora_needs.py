"""The memory of LoRA training, estimated from headers, is what the run allocates, however the base is stored."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey
from networks.formats.files import changed_modules
from tests.tiny.make import DIT, dit_shapes, draw_weight
from wan_train.assemble import WeightedLora, assemble_dit, attach_adapter, equip
from wan_train.cli import parse
from wan_train.models.loading import linear_shapes
from wan_train.placement.lanes import HostLane
from wan_train.placement.ledger import GRADIENTS, WORK, Ledger
from wan_train.plan import META, Bytes, Needs, attend_like_a_kernel, size
from wan_train.training.experts.models import model_settings
from wan_train.training.needs import loss_of, needs_of, needs_of_pair, outlined_for, ways_out
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.state_bytes import tensors_in
from wan_train.training.settings import TOOL, TrainSettings

CPU = torch.device("cpu")
SCALED, MERGED = "scaled.safetensors", "merged.safetensors"
TEXT = dit_shapes()["text_embedding.0.weight"][1]


def settings_of(folder: Path, *more: object, dit: str = DIT, task: str = "t2v-1.3B") -> TrainSettings:
    given = [
        *("--task", task, "--dit", folder / dit, "--dataset_config", folder / "data.toml", "--output_dir", folder),
        *("--output_name", "name", "--network_dim", 8, "--mixed_precision", "no", *more),
    ]
    settings = parse(TOOL.settings, [str(word) for word in given])
    assert isinstance(settings, TrainSettings)
    return settings


def batch() -> Batch:
    torch.manual_seed(0)
    return Batch((SampleKey("a", 0),), torch.randn(1, 16, 3, 8, 12), [torch.randn(7, TEXT)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bf16 model, the same in fp8 with scales, and a LoRA that changes one of its matrices."""
    folder = tmp_path_factory.mktemp("lora_needs")
    weights = {name: draw_weight(name, shape).bfloat16() for name, shape in dit_shapes().items()}
    save_file(weights, folder / DIT)
    scaled = {}
    for name, weight in weights.items():
        if name.startswith("blocks.") and weight.ndim == 2 and "norm" not in name:
            scaled[name] = weight.to(torch.float8_e4m3fn)
            scaled[f"{name.removesuffix('.weight')}.scale_weight"] = torch.ones(1)
        else:
            scaled[name] = weight
    save_file(scaled, folder / SCALED)
    module = "lora_unet_blocks_0_self_attn_q"
    pair = {f"{module}.lora_down.weight": torch.ones(4, 256), f"{module}.lora_up.weight": torch.ones(256, 4)}
    save_file(pair, folder / MERGED)
    return folder


class Real:
    """The tiny model with its adapter on the CPU after a step, all that it allocated counted."""

    def __init__(self, settings: TrainSettings) -> None:
        made = model_settings(settings)
        loras = [WeightedLora(*pair) for pair in settings.network.base_loras]
        self.model = assemble_dit(made, device=CPU, computing=torch.float32, loras=loras)
        for module in self.model.modules():
            if hasattr(module, "attend"):
                module.attend = attend_like_a_kernel  # type: ignore[assignment]
        adapter = attach_adapter(self.model, settings.network, settings.stream, seed=0, device=CPU)
        self.stream = equip(self.model, made, HostLane(CPU))
        self.ledger = Ledger()
        self.ledger.leave_out(iter((*self.model.parameters(), *self.model.buffers(), *self.stream.slots)))
        trained = [parameter for _, parameter in adapter.named_parameters()]
        with self.ledger:
            loss_of(self.model.train(), settings, batch(), CPU).backward()
        self.adapter = sum(map(size, trained))
        every = sum(map(size, (*self.model.parameters(), *self.model.buffers())))
        self.weights = Bytes(every - self.stream.host_bytes + self.stream.device_bytes - self.adapter)
        self.host = self.stream.host_bytes
        optimizer = make_optimizer(adapter.parameter_groups(1e-3), settings.optimizer)
        optimizer.step()
        states = {t.untyped_storage()._cdata: size(t) for t in tensors_in(list(optimizer.state.values()))}
        self.states = sum(states.values())


BASES: dict[str, tuple[object, ...]] = {
    "bf16": (),
    "fp8": ("--fp8_base",),
    "fp8-scaled": ("--fp8_base", "--fp8_scaled"),
    "int8": ("--int8_base",),
    "streamed": ("--fp8_base", "--fp8_scaled", "--blocks_to_swap", 1),
}


@pytest.mark.parametrize("base", BASES)
def test_weights_adapter_and_states_are_told_to_the_byte(tiny: Path, base: str) -> None:
    settings = settings_of(tiny, *BASES[base], "--gradient_checkpointing")
    told, real = needs_of(settings, batch()), Real(settings)
    assert told.weights == real.weights + Bytes(0, real.host)
    assert told.adapter == told.gradients == Bytes(real.adapter)
    assert told.states == Bytes(real.states)


@pytest.mark.parametrize("base", BASES)
def test_activations_are_told(tiny: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only a CPU reads fp8 numbers from a table, by indices of four bytes: more than all that a device holds here.
    monkeypatch.setattr("wan_train.precision._looked_up", lambda weight: weight)
    settings = settings_of(tiny, *BASES[base], "--gradient_checkpointing")
    outline, real = outlined_for(settings), Real(settings)
    outline.passes(lambda model: loss_of(model, settings, batch(), META), ())
    # On a CPU torch's mse_loss keeps the memory of all errors behind their mean.
    errors = size(batch().latents) - 4
    told = outline.ledger.most[WORK] + outline.ledger.most[GRADIENTS] + errors
    assert told == pytest.approx(real.ledger.most[WORK], rel=0.005)


def test_the_scales_of_a_file_count_and_a_merged_lora_adds_its_own(tiny: Path) -> None:
    plain = settings_of(tiny, "--fp8_base", "--gradient_checkpointing", dit=SCALED)
    merged = replace(plain, network=replace(plain.network, base_weights=(str(tiny / MERGED),)))
    assert changed_modules(tiny / MERGED, linear_shapes(tiny / DIT)) == {"blocks.0.self_attn.q"}
    for settings in (plain, merged):
        assert needs_of(settings, batch()).weights == Real(settings).weights
    # 256 x 256 codes with a scale for every 64 inputs, not one for all.
    assert needs_of(merged, batch()).weights.device - needs_of(plain, batch()).weights.device == 4 * (256 * 4 - 1)


def test_earlier_gradients_are_alive_in_the_next_pass(tiny: Path) -> None:
    once = needs_of(settings_of(tiny, "--gradient_checkpointing"), batch())
    twice = needs_of(settings_of(tiny, "--gradient_checkpointing", "--gradient_accumulation_steps", 2), batch())
    assert twice.peak == twice.activations.device + twice.gradients.device
    assert once.peak < twice.peak


GIB = 1 << 30
ONE = Needs(Bytes(28 * GIB), Bytes(GIB), Bytes(2 * GIB), Bytes(GIB), Bytes(20 * GIB), peak=21 * GIB, adapter=Bytes(GIB))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), Bytes((2 * (28 + 1 + 2 + 1) + 21) * GIB)),
        (("--shared_lora",), Bytes((2 * 28 + 1 + 2 + 1 + 21) * GIB)),
        (("--offload_inactive_dit",), Bytes((28 + 2 * (1 + 2 + 1) + 21) * GIB, 56 * GIB)),
        (("--offload_inactive_dit", "--shared_lora"), Bytes((28 + 1 + 2 + 1 + 21) * GIB, 56 * GIB)),
    ],
    ids=lambda words: "-".join(words) if isinstance(words, tuple) else "",
)
def test_two_experts_are_trained_in_turns(tiny: Path, words: tuple[str, ...], wanted: Bytes) -> None:
    settings = settings_of(tiny, "--dit_high_noise", tiny / DIT, *words, task="t2v-A14B")
    assert needs_of_pair(ONE, ONE, settings).total == wanted


def test_the_ways_out_start_with_the_largest_part_and_leave_out_what_is_used(tiny: Path) -> None:
    def ways(*words: object) -> list[str]:
        settings = settings_of(tiny, *words)
        return ways_out(settings, ONE)

    assert ways()[:2] == ["--fp8_base --fp8_scaled", "--blocks_to_swap"]
    assert ways("--int8_base", "--gradient_checkpointing", "--blocks_to_swap", 1)[:2] == [
        "--gradient_checkpointing_cpu_offload",
        "--ffn_chunks",
    ]
    assert "--full_bf16" not in ways() and "--ema_cpu" not in ways() and "--offload_inactive_dit" not in ways()
    pair = settings_of(tiny, "--dit_high_noise", tiny / DIT, task="t2v-A14B")
    assert "--offload_inactive_dit" in ways_out(pair, ONE)
