"""Previews of several processes: each makes its share, and they are those that one process makes."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests import processes
from tests.e2e.test_five_commands import frames_of
from tests.e2e.test_full import Desk, desk
from tests.tiny.make import SIZE, T5, VAE

__all__ = ["desk"]  # the fixture
LINE = f"{{}} --w {SIZE[0]} --h {SIZE[1]} --f 5 --s 2 --d {{}}\n"
LORA = ("--network_module", "networks.lora_wan", "--network_dim", 4, "--learning_rate", 2e-2)
AVERAGED = ("--ema_decay", 0.5, "--sample_with_ema")
SECONDS = 9  # that each preview is slowed down by

# Training as `python wan_train_network.py`, with slow previews.
SLOW = f"""
import runpy, time
from wan_train.training.reporting import preview

def slow(*given, make=preview.sample_latents, **options):
    time.sleep({SECONDS})
    return make(*given, **options)

preview.sample_latents = slow
runpy.run_path("wan_train_network.py", run_name="__main__")
"""


def words(desk: Desk, name: str, prompts: list[str], *more: object) -> list[object]:
    path = desk.folder / f"{name}.txt"
    path.write_text("".join(prompts))
    encoders = ("--vae", desk.folder / VAE, "--t5", desk.folder / T5)
    return desk.training(name, *encoders, "--sample_prompts", path, *more)


def previews(desk: Desk, name: str) -> dict[str, np.ndarray]:
    """The frames of a run's previews by their names, without the name of the run and the time."""
    found = sorted((desk.folder / "out" / "sample").glob(f"{name}_*.mp4"))
    return {re.sub(r"_\d{14}", "", path.stem.removeprefix(name)): frames_of(path) for path in found}


def equal(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in some)


def test_slow_previews_are_shared_out_and_nobody_waits_too_long(desk: Desk, tmp_path: Path) -> None:
    """Made by one process, both previews would take longer than the other waits."""
    prompts = [LINE.format("a red ball", 5), LINE.format("a green ball", 6)]
    more = (*LORA, "--max_train_steps", 1, "--sample_at_first")
    desk.run_tool("wan_train_network.py", *words(desk, "alone", prompts, *more))
    (tmp_path / "slow.py").write_text(SLOW)
    slow = words(desk, "shared", prompts, *more, "--ddp_timeout", 1.6 * SECONDS / 60)
    said = processes.run(str(tmp_path / "slow.py"), *slow, ranks=2).stderr
    assert previews(desk, "shared").keys() == {"_e000000_00_5", "_e000000_01_6"}
    assert equal(previews(desk, "shared"), previews(desk, "alone"))
    assert set(re.findall(r"INFO: preview .*_e000000_(0[01])_", said)) == {"00", "01"}
    assert "INFO: done: " in said


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("averaged", (*LORA, *AVERAGED)),
        ("streamed", ("--blocks_to_swap", 1, "--fused_backward_pass", "--gradient_checkpointing", *AVERAGED)),
        ("free", (*LORA, "--optimizer_type", "AdamWScheduleFree")),
    ],
)
def test_all_processes_preview_the_same_model(desk: Desk, name: str, options: tuple[object, ...]) -> None:
    """One prompt twice, once by each process, before and after training; which continues as without previews."""
    prompts = [LINE.format("a red ball", 5)] * 2
    more = (*options, "--max_train_steps", 3)
    often = ("--sample_at_first", "--sample_every_n_steps", 2)
    processes.run("wan_train_network.py", *words(desk, name, prompts, *more, *often), ranks=2)
    made = previews(desk, name)
    first, after = ([made[f"_{moment}_{index}_5"] for index in ("00", "01")] for moment in ("e000000", "000002"))
    assert np.array_equal(first[0], first[1]) and np.array_equal(after[0], after[1])
    assert not np.array_equal(first[0], after[0])
    processes.run("wan_train_network.py", *desk.training(f"{name}_alone", *more), ranks=2)
    assert desk.losses(name) == desk.losses(f"{name}_alone")
