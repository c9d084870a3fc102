"""lora_post_hoc_ema.py as a user calls it."""

import os

import numpy as np
import pytest
import torch

from networks.average import gamma, shares
from networks.formats import kohya_state
from networks.settings import AVERAGE, AverageSettings
from wan_train.cli import run
from wan_train.storage import read_header, read_tensors, save_tensors


@pytest.fixture
def files(make_model, make_deltas, tmp_path) -> list[str]:
    """Three files of one run, the oldest last."""
    paths = []
    for seed in range(3):
        path = tmp_path / f"{seed}.safetensors"
        state = kohya_state(make_deltas(make_model(), seed=seed))
        save_tensors(path, {name: tensor.bfloat16() for name, tensor in state.items()}, {"ss_epoch": str(seed)})
        os.utime(path, (1000 - seed, 1000 - seed))
        paths.append(str(path))
    return paths


def average(files, output, *more) -> dict[str, torch.Tensor]:
    assert run(AVERAGE, [*files, "--output_file", str(output), *map(str, more)]) == 0
    return dict(read_tensors(output))


@pytest.mark.parametrize(
    ("more", "weights"),
    [
        (["--beta", 0.5], (0.5, 0.25, 0.25)),  # the oldest is the last of the files
        (["--beta", 0.5, "--no_sort"], (0.25, 0.25, 0.5)),
        (["--beta", 0.5, "--beta2", 0.9], (0.1, 0.45, 0.45)),
    ],
)
def test_the_mean_of_the_weights(files, tmp_path, more, weights) -> None:
    got = average(files, tmp_path / "out.safetensors", *more)
    each = [dict(read_tensors(path)) for path in files]
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        if name.endswith(".alpha"):
            assert torch.equal(tensor, each[0][name])
        else:
            wanted = sum(weight * state[name].float() for weight, state in zip(weights, each, strict=True))
            torch.testing.assert_close(tensor.float(), wanted, rtol=8e-3, atol=1e-5)


def test_metadata_is_the_last_files_with_new_hashes(files, tmp_path) -> None:
    average(files, tmp_path / "out.safetensors")
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["ss_epoch"] == "0"
    assert len(metadata["sshs_model_hash"]) == 64


def test_the_profile_has_the_width_asked_for() -> None:
    num = 2000
    settings = AverageSettings(path=(), output_file="", sigma_rel=0.15)
    weights = np.zeros(num)
    for index, share in enumerate(shares(settings, num)):
        weights *= share
        weights[index] = 1 - share
    times = (np.arange(num) + 1) / num
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(0.15, rel=1e-3)
    assert gamma(0.05) == pytest.approx(16.97, abs=0.01)  # Karras et al. 2024, section 3.1
    assert gamma(0.10) == pytest.approx(6.94, abs=0.01)


def test_bad_input_is_one_line(files, tmp_path, capsys) -> None:
    other, alpha = tmp_path / "other.safetensors", tmp_path / "alpha.safetensors"
    state = dict(read_tensors(files[0]))
    save_tensors(other, {name: tensor.float() for name, tensor in state.items()})
    save_tensors(alpha, {name: tensor + 1 if name.endswith(".alpha") else tensor for name, tensor in state.items()})
    out = str(tmp_path / "out.safetensors")
    for words, wanted in (
        ([files[0], "--output_file", out], "two or more"),
        (["--output_file", out], "path"),
        ([*files, str(other), "--output_file", out], "same tensors"),
        ([*files, str(alpha), "--output_file", out], "another"),
        ([*files, "no.safetensors", "--output_file", out], "no such file"),
        ([*files, "--output_file", files[1]], "one of the files"),
        ([*files, "--output_file", out, "--sigma_rel", "0.2", "--beta2", "0.5"], "--beta2"),
    ):
        assert run(AVERAGE, words) == 2
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
