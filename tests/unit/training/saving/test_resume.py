"""Whether a state is of the configuration that is given now."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataset.batching.order import SampleKey
from dataset.caching.contents import Content
from dataset.config import DatasetConfig
from tests.unit.training.saving.states import anonymous, save, settings_of
from wan_train.errors import InputError
from wan_train.training.saving.resume import Trained, chosen_seed, configuration, require_same
from wan_train.training.saving.state import open_state


def test_which_differences_count(tmp_path: Path) -> None:
    whole = Trained(
        [DatasetConfig(tmp_path, 1, True, tmp_path, tmp_path)], [SampleKey("clip", 0)], ["a dog"], 100, "no"
    )

    def of(*more: str, processes: int = 1, **changes: Any) -> dict[str, str]:
        return configuration(settings_of(tmp_path, *more), replace(whole, **changes), num_processes=processes)

    def dataset(**changes: Any) -> dict[str, str]:
        return of(configs=[replace(whole.configs[0], **changes)])

    plain = of()
    same = (
        of("--gradient_checkpointing", "--blocks_to_swap", "3"),
        of("--max_train_steps", "9", steps=9),
        of("--save_every_n_steps", "5", "--sdpa"),
        of("--dit", "elsewhere/d"),
        of("--mixed_precision", "no"),
        dataset(cache_directory=tmp_path / "moved"),
    )
    assert all(each == plain for each in same)
    assert of(processes=2) == of("--gradient_accumulation_steps", "2")
    others = (
        *(of("--learning_rate", "1"), of("--fp8_base"), of("--network_dim", "3"), of(processes=2)),
        *(of(keys=[SampleKey("b", 0)]), of(mixed_precision="bf16"), of(prior_captions=["a cat"])),
        of("--prior_loss_weight", "2", "--prior_captions", "kept.txt"),
        *(dataset(batch_size=2), dataset(weight=2.0), dataset(loss_weight=0.5), dataset(flip_augment=True)),
        dataset(start_image=True),
    )
    assert all(other != plain for other in others)
    for option in (("--lr_scheduler", "cosine"), ("--lr_warmup_steps", "5%")):
        assert of(*option, steps=9) != of(*option)
    assert of("--lr_warmup_steps", "5") == of("--lr_warmup_steps", "5%")


def test_differences_are_listed_or_warned_of(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    require_same(state, {"--network_dim": "4"}, {}, anyway=False)
    with pytest.raises(InputError, match=r"--network_dim was 4, is 8.*--resume_anyway"):
        require_same(state, {"--network_dim": "8"}, {}, anyway=False)
    require_same(state, {"--network_dim": "8"}, {}, anyway=True)


def test_an_option_that_a_state_does_not_name_was_at_its_default(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    same = {"--network_dim": "4", "--huber_c": "0.1", "--network_dropout": "None", "flip_augment of dataset 3": "False"}
    require_same(state, same, {}, anyway=False)
    with pytest.raises(InputError, match=r"configuration: --huber_c was 0.1, is 0.2\. Use the options"):
        require_same(state, same | {"--huber_c": "0.2"}, {}, anyway=False)
    with pytest.raises(InputError, match="flip_augment of dataset 3 was False, is True"):
        require_same(state, same | {"flip_augment of dataset 3": "True"}, {}, anyway=False)
    with pytest.raises(InputError, match="--network_dim was 4, is None"):
        require_same(state, {}, {}, anyway=False)


CLIPS = {f"cache/clip{i:02d}_00000-017_0064x0096_wan": Content(f"l{i}", f"c{i}", "t5") for i in range(12)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"clip03": Content("l3", "other", "t5")},
            r"the dataset has 1 file with different captions \(clip03\)\. Use the options",
        ),
        ({"clip03": Content("other", "c3", "t5")}, r"1 file with a different video or image \(clip03\)"),
        ({f"clip{i:02d}": Content(f"l{i}", "new", "t5") for i in range(12)}, r"12 files with .*clip09 and 2 more\)"),
        ({"clip00": Content("l0", "c0", "other")}, r"1 file with a different text encoder \(clip00\)"),
        ({"clip05": None}, r"1 file that is missing \(clip05\)"),
        ({"clip77": Content("", "c", "")}, r"1 file that is new \(clip77\)"),
    ],
)
def test_samples_are_compared_by_what_they_were_made_of(
    tmp_path: Path, change: dict[str, Content | None], message: str
) -> None:
    state = open_state(save(tmp_path / "name-state", samples=CLIPS, options={"samples of the dataset": "a"}))
    changed: dict[str, Content | None] = {**CLIPS}
    changed |= {f"cache/{name}_00000-017_0064x0096_wan": content for name, content in change.items()}
    now = {item: content for item, content in changed.items() if content is not None}
    require_same(state, {"samples of the dataset": "a"}, CLIPS, anyway=False)
    with pytest.raises(InputError, match=message) as refused:
        require_same(state, {"samples of the dataset": "b"}, now, anyway=False)
    assert "samples of the dataset was" not in str(refused.value)
    require_same(state, {"samples of the dataset": "b"}, now, anyway=True)


def test_what_a_cache_does_not_say_is_not_compared(tmp_path: Path) -> None:
    foreign = {item: Content("", content.captions, "") for item, content in CLIPS.items()}
    options = {"samples of the dataset": "a"}
    for name, before, now in (("a", foreign, CLIPS), ("b", CLIPS, foreign)):
        require_same(open_state(save(tmp_path / name, samples=before, options=options)), options, now, anyway=False)
    old = open_state(anonymous(save(tmp_path / "name-state", options=options)))
    require_same(old, options, CLIPS, anyway=False)
    with pytest.raises(InputError, match="samples of the dataset was a, is b"):
        require_same(old, {"samples of the dataset": "b"}, CLIPS, anyway=False)


def test_the_seed_is_the_states(tmp_path: Path) -> None:
    state = open_state(save(tmp_path / "name-state"))
    assert chosen_seed(None, state) == chosen_seed(7, state) == 7
    assert (chosen_seed(3, None), chosen_seed(None, None)) == (3, None)
    with pytest.raises(InputError, match="--seed 8 differs from the seed 7"):
        chosen_seed(8, state)


def test_a_single_dit_at_high_noise_levels_was_the_expert_for_high_noise(tmp_path: Path) -> None:
    levels = {"--timestep_boundary": "0.9", "--min_timestep": "875", "--max_timestep": "1000"}
    before = {"--dit": "high.safetensors", "--dit_high_noise": "", **levels}
    state = open_state(anonymous(save(tmp_path / "name-state", options=before)))
    require_same(state, {"--dit": "", "--dit_high_noise": "high.safetensors", **levels}, {}, anyway=False)
    with pytest.raises(InputError, match=r"--dit was , is high"):
        require_same(state, before, {}, anyway=False)
