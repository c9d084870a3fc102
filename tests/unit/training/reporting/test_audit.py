"""What an audit finds is what a run draws and a generator visits."""

import pytest

from wan_train.cli import parse
from wan_train.errors import InputError
from wan_train.training.experts.plan import plan_experts, with_named_experts
from wan_train.training.reporting.audit import audit, measure, refuse_unused
from wan_train.training.settings import TrainSettings

NEEDED = ("--dataset_config", "d.toml", "--output_dir", "o", "--output_name", "n", "--task", "t2v-A14B")


def settings(*words: str) -> TrainSettings:
    return parse(TrainSettings, [*NEEDED, *words])


def test_two_experts_share_the_draws_and_keep_to_their_sides() -> None:
    told = settings("--dit", "l", "--dit_high_noise", "h", "--timestep_sampling", "shift", "--flow_shift", "3")
    high, low = measure(plan_experts(told), told.timesteps, 4000, seed=0, boundary=0.875)
    assert (high.expert, low.expert) == ("high_noise", "low_noise")
    assert high.part == low.part == 0.5
    assert 0.875 <= high.low < 0.88 and 0.99 < high.high <= 1
    assert 0 < low.low < 0.2 and 0.87 < low.high <= 0.875
    assert high.outside == low.outside == 0


def test_an_own_range_may_go_astray() -> None:
    told = settings("--dit_high_noise", "h", "--min_timestep", "800", "--max_timestep", "900")
    (share,) = measure(plan_experts(told), told.timesteps, 4000, seed=0, boundary=0.875)
    assert share.outside == pytest.approx(0.75, abs=0.05)
    refuse_unused(plan_experts(told), told.timesteps)
    beyond = settings("--dit", "l", "--min_timestep", "900", "--max_timestep", "1000")
    with pytest.raises(InputError, match="low-noise expert would be trained from 900 to 1000"):
        refuse_unused(plan_experts(beyond), beyond.timesteps)


def test_what_generation_visits() -> None:
    text = audit(settings("--dit", "l"), num_draws=1000)
    # The published implication: of 40 steps with shift 12 the first 26 are the high-noise expert's.
    assert "unipc, 40 steps, shift 12: high noise 26 steps" in text and "low noise 14 steps" in text
    text = audit(settings("--dit", "l", "--task", "i2v-A14B"), num_draws=1000)
    assert "unipc, 40 steps, shift 5: high noise 15 steps" in text
    assert "trained, low noise: 100.0% of the draws" in text


@pytest.mark.parametrize(
    ("words", "high"),
    [
        (("--min_timestep", "875"), True),
        (("--task", "i2v-A14B", "--min_timestep", "875"), True),  # its boundary is 900
        (("--task", "i2v-A14B", "--min_timestep", "900", "--max_timestep", "1000"), True),
        (("--min_timestep", "600", "--timestep_boundary", "0.7"), True),
        ((), False),
        (("--max_timestep", "875"), False),
        (("--min_timestep", "500"), False),
        (("--task", "t2v-14B", "--min_timestep", "875"), False),
    ],
)
def test_one_file_is_the_expert_that_its_noise_levels_say(words: tuple[str, ...], high: bool) -> None:
    given = settings("--dit", "file", *words)
    named = with_named_experts(given)
    assert (named.dit.dit, named.experts.dit_high_noise) == (("", "file") if high else ("file", ""))
    assert named == given or high
    refuse_unused(plan_experts(named), named.timesteps)


def test_two_files_are_what_they_were_given_as() -> None:
    both = settings("--dit", "low", "--dit_high_noise", "high", "--min_timestep", "875")
    assert with_named_experts(both) == both
