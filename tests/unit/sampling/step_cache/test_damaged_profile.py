"""Profiles that were edited or mistaken: one line that says what is wrong with them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from wan_train.errors import InputError
from wan_train.sampling.step_cache.profile import Entry, Profile, ReuseError, read_profile, write_profile


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"errors": [[3, 1, 0, -0.01]]}, "-0.01 is not a finite number of at least 0"),
        ({"errors": [[3, 1, 0, float("nan")]]}, "nan is not a finite number of at least 0"),
        ({"ratios": {"positive": {"1": float("inf")}}}, "inf is not a finite number of at least 0"),
        ({"scale": -1.0}, "-1.0 is not a finite number of at least 0"),
        ({"num_passes": [2, -2]}, r"num_passes \[2, -2\] are not at least 1"),
        ({"num_passes": []}, r"num_passes \[\] are not at least 1"),
        ({"models": None}, "'models' is missing"),
    ],
)
def test_values_that_cannot_have_been_measured(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    entry = Entry({"task": "t2v-14B"}, {"dit": "1"}, [2, 2], [ReuseError(1, 1, 0, 0.01)], {"positive": {1: 1.01}})
    write_profile(path, Profile((entry,)))
    content = json.loads(path.read_text())
    for name, value in change.items():
        if value is None:
            del content["entries"][0][name]
        else:
            content["entries"][0][name] = value
    assert read_profile(path).entries
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"profile.json is not a profile \({told}"):
        read_profile(path)


def test_a_device_or_a_folder_is_not_read_as_a_profile(tmp_path: Path) -> None:
    for path in (os.devnull, tmp_path):
        with pytest.raises(InputError, match="is not a regular file"):
            read_profile(path)
