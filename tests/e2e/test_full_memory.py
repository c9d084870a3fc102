"""What saves memory in full fine-tuning changes nothing of what is learnt: each option, and all of them."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.e2e.test_full import Desk, desk
from tests.tiny.make import T5, VAE, dit_shapes
from wan_train import load_dit
from wan_train.cli import run
from wan_train.training.objective.loss import Losses, measure
from wan_train.training.reporting.preview import Previewer
from wan_train.training.settings import TOOL as TRAIN

__all__ = ["desk"]  # the fixture

PLAIN = ("--gradient_checkpointing", "--max_grad_norm", 0, "--max_train_steps", 6, "--save_precision", "float")
FUSED, OFFLOADED, SWAPPED = "--fused_backward_pass", "--optimizer_cpu_offload", ("--blocks_to_swap", 1)
SAVING = {
    "fused": (FUSED,),
    "offloaded": (OFFLOADED,),
    "swapped": SWAPPED,
    "swapped-fused": (*SWAPPED, FUSED),
    "all": (*SWAPPED, FUSED, OFFLOADED, "--gradient_checkpointing_cpu_offload"),
}
OPTIMIZERS = {
    "float32": ("--optimizer_type", "AdamW"),
    "bf16": ("--optimizer_type", "AdamW", "--full_bf16"),
    "bf16-8bit": ("--optimizer_type", "AdamW8bitSR", "--full_bf16"),
    "bf16-adafactor": ("--optimizer_type", "Adafactor", "--full_bf16"),
}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def plain(desk: Desk) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: desk.train(f"plain-{kind}", *PLAIN, *options) for kind, options in OPTIMIZERS.items()}


# Each way by itself for one kind of run, all of them for every kind; the others are slow.
PAIRS = [
    pytest.param(kind, saving, marks=() if kind == "bf16-8bit" or saving == "all" else pytest.mark.slow)
    for kind, saving in product(OPTIMIZERS, SAVING)
]


@pytest.mark.parametrize(("kind", "saving"), PAIRS)
def test_each_is_the_ordinary_run_bit_for_bit(
    desk: Desk, plain: dict[str, dict[str, torch.Tensor]], kind: str, saving: str
) -> None:
    name = f"{kind}-{saving}"
    assert same(desk.train(name, *PLAIN, *OPTIMIZERS[kind], *SAVING[saving]), plain[kind])
    assert desk.losses(name) == desk.losses(f"plain-{kind}")


def test_with_all_of_them_it_goes_on_to_the_bit(desk: Desk, plain: dict[str, dict[str, torch.Tensor]]) -> None:
    options = (*PLAIN, *OPTIMIZERS["bf16-8bit"], *SAVING["all"], "--ema_decay", 0.5)
    desk.train("halves", *options, "--save_every_n_steps", 3, "--save_state")
    state = desk.folder / "out" / "halves-step00000003-state"
    averaged = load_file(desk.folder / "out" / "halves-ema.safetensors")
    assert same(desk.train("halves", *options, "--resume", state), plain["bf16-8bit"])
    assert same(load_file(desk.folder / "out" / "halves-ema.safetensors"), averaged)


def test_states_kept_elsewhere_serve_any_run(desk: Desk, plain: dict[str, dict[str, torch.Tensor]]) -> None:
    options = (*PLAIN, *OPTIMIZERS["float32"])
    desk.train("moving", *options, *SWAPPED, OFFLOADED, "--save_every_n_steps", 3, "--save_state")
    state = desk.folder / "out" / "moving-step00000003-state"
    assert same(desk.train("moving", *options, "--resume", state), plain["float32"])


@pytest.mark.slow
def test_two_processes_step_in_the_backward_pass_as_after_it(desk: Desk) -> None:
    found = {}
    for name, options in {"after": (), "within": (FUSED, *SWAPPED)}.items():
        arguments = desk.training(name, *PLAIN, *OPTIMIZERS["bf16"], *options)
        processes.run("wan_train_network.py", *arguments, ranks=2)
        found[name] = load_file(desk.folder / "out" / f"{name}.safetensors")
    assert same(found["within"], found["after"])
    assert desk.losses("within") == desk.losses("after")


def test_a_lora_too_is_stepped_in_the_backward_pass(desk: Desk) -> None:
    lora = (*PLAIN, "--network_module", "networks.lora_wan", "--network_dim", 4, "--optimizer_type", "AdamW")
    wanted = desk.train("lora", *lora, *SWAPPED)
    assert same(desk.train("lora-fused", *lora, *SWAPPED, FUSED, OFFLOADED), wanted)


def test_an_average_in_main_memory_is_the_same_and_previews_show_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that stream among the rest: a preview sees the saved average, rounded to what the weights are."""
    options = (*PLAIN, *OPTIMIZERS["bf16"], "--ema_decay", 0.5, *SAVING["all"])
    wanted = desk.train("near", *options)
    shown: list[torch.Tensor] = []

    def look(previewer: object, model: torch.nn.Module, moment: str) -> dict[int, Path]:
        shown.append(velocity(model))
        return {}

    monkeypatch.setattr(Previewer, "make", look)
    prompts = desk.folder / "one_prompt.txt"
    prompts.write_text("a blue square\n")
    preview = ("--sample_prompts", prompts, "--sample_every_n_steps", 6, "--sample_with_ema")
    found = desk.train("far", *options, "--ema_cpu", *preview, "--vae", desk.folder / VAE, "--t5", desk.folder / T5)
    assert same(found, wanted)
    near, far = (load_file(desk.folder / "out" / f"{name}-ema.safetensors") for name in ("near", "far"))
    assert same(far, near)
    averaged = load_dit(desk.folder / "out" / "far-ema.safetensors")
    for name, parameter in averaged.named_parameters():
        if name.endswith(".weight") and parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(shown[0], velocity(averaged))
    assert not torch.equal(shown[0], velocity(load_dit(desk.folder / "out" / "far.safetensors")))


@pytest.mark.parametrize(("first", "then"), [(("--ema_cpu",), ()), ((), ("--ema_cpu",))], ids=["from-host", "to-host"])
def test_an_average_goes_on_wherever_it_was(desk: Desk, first: tuple[str, ...], then: tuple[str, ...]) -> None:
    options = (*PLAIN, *OPTIMIZERS["bf16"], "--ema_decay", 0.5)
    desk.train("unbroken", *options)
    desk.train("broken", *options, *first, "--save_every_n_steps", 3, "--save_state")
    desk.train("broken", *options, *then, "--resume", desk.folder / "out" / "broken-step00000003-state")
    found, wanted = (load_file(desk.folder / "out" / f"{name}-ema.safetensors") for name in ("broken", "unbroken"))
    assert same(found, wanted)


def velocity(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 8, 12), torch.randn(1, 512, dit_shapes()["text_embedding.0.weight"][1])
    with torch.no_grad():
        seen: torch.Tensor = model.eval()(latents, torch.tensor([500.0]), text)
    return seen


def test_an_average_has_to_be_asked_for(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TRAIN, [str(word) for word in desk.training("no", "--ema_cpu")]) == 2
    assert "--ema_cpu requires --ema_decay" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_step_whose_loss_is_no_number_changes_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def sometimes(*arguments: Any, **named: Any) -> Losses:
        found = measure(*arguments, **named)
        measured.append(1)
        return Losses(found.mean * (float("nan") if len(measured) == 3 else 1), found.samples)

    monkeypatch.setattr("wan_train.training.step.measure", sometimes)
    options = (*PLAIN, *OPTIMIZERS["float32"], "--max_train_steps", 3)
    left_out = desk.train("left-out", *options, FUSED, "--skip_nonfinite", 1)
    measured.clear()
    assert same(left_out, desk.train("two-steps", *options, FUSED, "--max_train_steps", 2))
    measured.clear()
    command = desk.training("stopped", *options, FUSED)
    assert run(TRAIN, [str(word) for word in command]) == 1
