"""What a run will need, told beforehand, is what it allocates."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey
from networks.full import Full
from tests.tiny.make import DIT, dit_shapes, draw_weight
from wan_train.assemble import assemble_dit, attach_adapter, equip
from wan_train.cli import parse
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.loading import outline_dit
from wan_train.placement.lanes import HostLane
from wan_train.placement.ledger import HOST, WORK, Ledger, OutlineLane
from wan_train.placement.states import HostStates
from wan_train.plan import META, Bytes, Needs, attend_like_a_kernel, check_fits, outlined, size
from wan_train.training.experts.models import model_settings
from wan_train.training.needs import loss_of, needs_of, ways_out
from wan_train.training.optimizing.ema import Ema
from wan_train.training.optimizing.optimizers import make_optimizer
from wan_train.training.optimizing.rounding import rounded
from wan_train.training.optimizing.state_bytes import states_of, tensors_in
from wan_train.training.optimizing.stepping import states_at_hand
from wan_train.training.settings import TOOL, OptimizerSettings, TrainSettings

CPU = torch.device("cpu")


def settings_of(tiny: Path, *more: object) -> TrainSettings:
    given = [
        *("--task", "t2v-1.3B", "--dit", tiny / DIT, "--dataset_config", tiny / "data.toml", "--output_dir", tiny),
        *("--output_name", "name", "--network_module", "networks.full", "--mixed_precision", "no", *more),
    ]
    settings = parse(TOOL.settings, [str(word) for word in given])
    assert isinstance(settings, TrainSettings)
    return settings


def batch(text: int = dit_shapes()["text_embedding.0.weight"][1]) -> Batch:
    torch.manual_seed(0)
    return Batch((SampleKey("a", 0),), torch.randn(1, 16, 3, 8, 12), [torch.randn(7, text)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needs")
    save_file({name: draw_weight(name, shape).bfloat16() for name, shape in dit_shapes().items()}, folder / DIT)
    return folder


class Real:
    """The tiny model on the CPU after a step, all that it allocated counted."""

    def __init__(self, settings: TrainSettings) -> None:
        made = model_settings(settings)
        self.model = assemble_dit(made, device=CPU, dtype=None, computing=torch.float32)
        for module in self.model.modules():
            if hasattr(module, "attend"):
                module.attend = attend_like_a_kernel  # type: ignore[assignment]
        self.adapter = attach_adapter(self.model, settings.network, settings.stream, seed=0, device=CPU)
        assert isinstance(self.adapter, Full)
        self.stream = equip(self.model, made, HostLane(CPU))
        self.ledger = Ledger()
        self.ledger.leave_out(iter((*self.model.parameters(), *self.model.buffers())))
        with self.ledger:
            loss_of(self.model.train(), settings, batch(), CPU).backward()
        trained = [parameter for _, parameter in self.adapter.named_parameters()]
        self.gradients = sum(size(parameter.grad) for parameter in trained if parameter.grad is not None)
        step_contexts = (rounded(0),) if settings.network.full_bf16 else None
        optimizer = make_optimizer(self.adapter.parameter_groups(1e-3), settings.optimizer, step_contexts=step_contexts)
        optimizer.step()
        states = {t.untyped_storage()._cdata: size(t) for t in tensors_in(list(optimizer.state.values()))}
        self.states = sum(states.values())
        average = Ema(dict(self.adapter.named_parameters()), 0.9).state_dict()["averages"]
        assert isinstance(average, dict)
        self.ema = sum(map(size, average.values()))
        self.weights = sum(map(size, (*self.model.parameters(), *self.model.buffers())))


KINDS = {
    "float32-adamw": ("--optimizer_type", "AdamW"),
    "bf16-adamw": ("--optimizer_type", "AdamW", "--full_bf16"),
    "bf16-8bit": ("--optimizer_type", "AdamW8bitSR", "--full_bf16"),
    "bf16-adafactor": ("--optimizer_type", "Adafactor", "--full_bf16"),
    "bf16-came": ("--optimizer_type", "CAME", "--full_bf16", "--learning_rate", 1e-4),
    "bnb": (
        "--optimizer_type",
        "AdamW8bit",
    ),
    "part-sgd": ("--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9", "--trainable", "head.*", "blocks.1.*"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_states_and_average_are_told_to_the_byte(tiny: Path, kind: str) -> None:
    settings = settings_of(tiny, *KINDS[kind], "--ema_decay", 0.9, "--gradient_checkpointing")
    told, real = needs_of(settings, batch()), Real(settings)
    assert told.weights == Bytes(real.weights)
    assert told.gradients == Bytes(real.gradients)
    assert told.states == Bytes(real.states)
    assert told.ema == Bytes(real.ema)
    assert real.states > 0


@pytest.mark.parametrize("recompute", ["none", "full", "keep_attention"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_activations_are_told_to_the_byte(tiny: Path, recompute: str, chunks: int) -> None:
    settings = settings_of(tiny, "--recompute", recompute, "--ffn_chunks", chunks)
    outline = outlined(model_settings(settings), settings.network, dtype=None, computing=torch.float32)
    trained = [parameter for _, parameter in outline.adapter.named_parameters()]
    outline.passes(lambda model: loss_of(model, settings, batch(), META), [trained])
    # The real run's gradients were counted with the rest, as they were made. On a CPU torch's mse_loss keeps the memory
    # of all errors behind their mean.
    errors = size(batch().latents) - 4
    assert outline.ledger.peak + errors == Real(settings).ledger.most[WORK]
    told = needs_of(settings, batch())
    assert told.activations == outline.activations and told.activations.device < outline.ledger.peak


@pytest.mark.parametrize("blocks", [0, 1])
def test_slots_of_swapped_blocks_are_counted_once(tiny: Path, blocks: int) -> None:
    settings = settings_of(tiny, "--gradient_checkpointing", "--blocks_to_swap", blocks)
    told, real = needs_of(settings, batch()), Real(settings)
    outline = outlined(model_settings(settings), settings.network, dtype=None, computing=torch.float32)
    outline.passes(lambda model: loss_of(model, settings, batch(), META), ())
    errors = size(batch().latents) - 4  # as above
    # The real run's slots are counted as they are filled, with its activations and gradients.
    counted = real.weights - real.stream.host_bytes + real.ledger.peak
    assert told.weights.device + outline.ledger.peak + errors == counted
    assert (real.stream.host_bytes > 0) == (blocks > 0)


def test_each_way_of_saving_memory_is_told(tiny: Path) -> None:
    def told(*more: object) -> Needs:
        return needs_of(settings_of(tiny, "--gradient_checkpointing", *more), batch())

    plain = told()
    fused, offloaded = told("--fused_backward_pass"), told("--optimizer_cpu_offload")
    swapped, kept = told("--blocks_to_swap", 1), told("--gradient_checkpointing_cpu_offload")
    assert fused.gradients.device < plain.gradients.device and fused.total.device < plain.total.device
    assert offloaded.states == Bytes(0, plain.states.device) and plain.states.host == 0
    assert offloaded.peak > plain.peak and offloaded.total.device < plain.total.device  # three weights' at a time
    assert swapped.weights.host > 0 and swapped.weights.device + swapped.weights.host > plain.weights.device
    assert kept.activations.host > 0
    assert plain.total.host == 0


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Prodigy", "AdamWScheduleFree", "Lion", "RMSprop"])
def test_states_of_many_optimizers_are_known(name: str) -> None:
    rate = 1.0 if name == "Prodigy" else 1e-3
    settings = OptimizerSettings(optimizer_type=name, learning_rate=rate)
    weights = [nn.Parameter(torch.ones(64, 65)), nn.Parameter(torch.ones(7))]
    told = states_of(weights, settings).kept
    real = make_optimizer([{"params": weights, "lr": rate}], settings)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    real.step()
    states = {t.untyped_storage()._cdata: size(t) for t in tensors_in(list(real.state.values()))}
    assert told == pytest.approx(sum(states.values()), rel=0.01)


@pytest.mark.parametrize("sizes", [(40, 3, 1000, 7), (1000, 900, 800), (50,)], ids=str)
def test_what_states_in_main_memory_take_is_told(sizes: tuple[int, ...]) -> None:
    """There as much as they are, and on the device those of three weights in a row, however many steps are taken."""
    settings = OptimizerSettings(optimizer_type="SGD", learning_rate=1e-3, optimizer_args=("momentum=0.9",))
    ledger = Ledger()
    step_contexts = (states_at_hand(HostStates(OutlineLane(ledger))),)
    weights = [nn.Parameter(torch.empty(size, device=META)) for size in sizes]
    optimizer = make_optimizer([{"params": weights, "lr": 1e-3}], settings, step_contexts=step_contexts)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    ledger.leave_out(iter([weight.grad for weight in weights if weight.grad is not None] + weights))
    with ledger:
        for _ in range(6):
            optimizer.step()
    told = states_of(weights, settings)
    assert ledger.most[HOST] == told.kept == 4 * sum(sizes)
    assert told.at_hand <= ledger.most[WORK] <= told.at_hand + told.step


def test_what_cannot_fit_is_refused_with_the_ways_out(tiny: Path) -> None:
    settings = settings_of(tiny, "--full_bf16")
    needs = Needs(Bytes(3 << 30), Bytes(1 << 30), Bytes(2 << 30, 5 << 30), Bytes(), Bytes(1 << 30), 2 << 30)
    assert needs.total == Bytes(7 << 30, 5 << 30)
    ways = ways_out(settings, needs)
    check_fits(needs, Bytes(7 << 30, 5 << 30), ways, device_name="cuda:0")
    check_fits(needs, Bytes(0, 12 << 30), ways, device_name="cpu")
    for free, told in {
        Bytes(6 << 30, 50 << 30): "not enough memory on cuda:0: needs 7.00 GiB, 6.00 GiB free",
        Bytes(8 << 30, 4 << 30): "not enough memory on the host: needs 5.00 GiB, 4.00 GiB free",
        Bytes(0, 11 << 30): "not enough memory on the host: needs 12.00 GiB, 11.00 GiB free",
    }.items():
        with pytest.raises(InputError, match=told) as refused:
            check_fits(needs, free, ways, device_name="cuda:0")
        said = str(refused.value)
        assert "--fused_backward_pass" in said and "--full_bf16" not in said and "\n" not in said


def published(path: str, dtype: torch.dtype | None, header: object, plan: object) -> Dit:
    with torch.device("meta"):
        model = Dit(DitConfig(5120, 13824, 40, 40, text_dim=4096)).bfloat16()
    return outline_dit(model.state_dict(), dtype=dtype)


ROWS = {  # GB of weights, gradients and states: P 2b
    "bf16-8bit-fused": (57, ("--optimizer_type", "AdamW8bitSR", "--full_bf16", "--fused_backward_pass")),
    "bf16-adafactor-fused": (29, ("--optimizer_type", "Adafactor", "--full_bf16", "--fused_backward_pass")),
    "float32": (229, ("--optimizer_type", "AdamW")),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_the_14b_takes_what_it_should(tiny: Path, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_train.plan.outline_dit", published)
    wanted, options = ROWS[row]
    told = needs_of(settings_of(tiny, *options, "--gradient_checkpointing"), batch(text=4096))
    assert (told.weights + told.gradients + told.states).device / 1e9 == pytest.approx(wanted, rel=0.05)
