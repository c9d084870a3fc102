"""Which entry of a profile is one for a run: of two that differ in any option neither stands for the other."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sampling.step_cache.tiny import STEPS, request
from wan_train.errors import InputError
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.step_cache.profile import Entry, Profile, entry_for, run_settings, write_profile


def entry_of(wanted: SampleRequest) -> Entry:
    return Entry(run_settings(wanted), {}, [2] * STEPS, [], {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5}, "--cfg_skip_mode (late 0.5"),
        ({"slg_layers": (1,)}, "--slg_layers (1 original 3 0 0.3"),
        ({"riflex": True}, "--riflex_freq_index (6"),
        ({"control_start": 0.25}, "--control_start and control_end (0.25 to 1"),
        ({"control_end": 0.5}, "--control_start and control_end (0 to 0.5"),
        ({"vace_scale": 0.5}, "--vace_scale (0.5"),
    ],
)
def test_a_plain_run_is_not_one_with_more_options(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path, plain, other = tmp_path / "profile.json", entry_of(request()), entry_of(request(**change))
    write_profile(path, Profile((plain, other)))
    assert entry_for(str(path), request()).settings == plain.settings
    assert entry_for(str(path), request(**change)).settings == other.settings
    write_profile(path, Profile((other,)))
    with pytest.raises(InputError, match=re.escape(f"another {told} in the profile, not set in this run)")):
        entry_for(str(path), request())
