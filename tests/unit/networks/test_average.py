"""lora_post_hoc_ema.py as a user calls it."""

import os

import numpy as np
import pytest
import torch

from networks.formats.files import kohya_state
from networks.settings import AVERAGE, AverageSettings
from networks.tools.average import gamma, shares
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
        ([*files, str(alpha), "--output_file", out], "different lora_unet"),
        ([*files, "no.safetensors", "--output_file", out], "no such file"),
        ([*files, "--output_file", files[1]], "one of the files"),
        ([*files, "--output_file", out, "--sigma_rel", "0.2", "--beta2", "0.5"], "--beta2"),
    ):
        assert run(AVERAGE, words) == 2
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def save_as(make_model, make_deltas, tmp_path):
    """`save_as(name, step)`: a file of the run `name`, or of another one, its numbers equal to its step."""

    def save(stem: str, step: int | None, session: str = "1", **said: str) -> str:
        state = kohya_state(make_deltas(make_model()))
        tensors = {name: t if name.endswith(".alpha") else torch.full_like(t, step or 0) for name, t in state.items()}
        metadata = {} if step is None else {"ss_steps": str(step), "ss_session_id": session, "ss_output_name": "name"}
        path = tmp_path / "out" / f"{stem}.safetensors"
        save_tensors(path, tensors, metadata | said)
        os.utime(path, (1000 - (step or 0), 1000 - (step or 0)))  # as copies may have them
        return str(path)

    return save


def mean_of(files, tmp_path, *more) -> float:
    """The mean of what the files hold, the last counting half, the one before a quarter, and so on."""
    got = average(files, tmp_path / "avg.safetensors", "--beta", 0.5, *more)
    return float(next(tensor for name, tensor in got.items() if name.endswith("up.weight")).flatten()[0])


def test_the_files_of_a_pattern_as_the_page_has_it(save_as, tmp_path, capsys) -> None:
    for stem, step in (("name-000002", 20), ("name-000001", 10), ("name-best", 20), ("name-000001-ema", 10)):
        save_as(stem, step)
    for stem, step in (("name-best-ema", 20), ("name-ema", 30), ("name", 30), ("name-step00000015", 15)):
        save_as(stem, step)
    files = sorted(map(str, (tmp_path / "out").glob("name-*.safetensors")))
    assert mean_of(files, tmp_path) == pytest.approx(10 / 8 + 15 / 8 + 20 / 4 + 30 / 2)
    told = capsys.readouterr().err
    left_out = next(line for line in told.splitlines() if "ignoring" in line)
    assert all(f"name-{kind}.safetensors" in left_out for kind in ("best", "000001-ema", "best-ema", "ema"))
    assert f"{tmp_path / 'out' / 'name.safetensors'} is averaged too" in told


def test_the_end_is_taken_in_with_all_the_others_alone(save_as, tmp_path) -> None:
    first, second, third = (save_as(f"name-00000{epoch}", 10 * epoch) for epoch in (1, 2, 3))
    save_as("name", 40)
    assert mean_of([first, second], tmp_path) == pytest.approx(15)  # chosen by hand
    assert mean_of([third, second, first], tmp_path, "--no_sort") == pytest.approx(10 / 2 + 20 / 4 + 30 / 4)
    save_as("name", 40, session="2")
    assert mean_of([first, second, third], tmp_path) == pytest.approx(10 / 4 + 20 / 4 + 30 / 2)


def test_averages_may_be_averaged(save_as, tmp_path, capsys) -> None:
    files = [save_as(f"name{moment}-ema", step) for moment, step in (("-000002", 20), ("-best", 20), ("-000001", 10))]
    save_as("name-ema", 30)
    save_as("name", 30)
    assert mean_of(files, tmp_path) == pytest.approx(10 / 4 + 20 / 4 + 30 / 2)
    assert "name-best-ema" in capsys.readouterr().err


def test_a_runs_own_name_may_look_like_a_kind(save_as, tmp_path) -> None:
    named = {"ss_output_name": "name-best"}
    files = [save_as(f"name-best-00000{epoch}", 10 * epoch, **named) for epoch in (1, 2)]
    save_as("name-best", 30, **named)
    assert mean_of(files, tmp_path) == pytest.approx(10 / 4 + 20 / 4 + 30 / 2)


def test_a_step_counts_once_and_silent_files_go_by_time(save_as, tmp_path, capsys) -> None:
    files = [save_as("name-000001", 10), save_as("name-step00000010", 10), save_as("name-step00000020", 20)]
    assert mean_of(files, tmp_path) == pytest.approx(15)
    assert "it has the same step as" in capsys.readouterr().err
    silent = save_as("name-000009", None)
    assert mean_of([files[0], silent], tmp_path) == pytest.approx(5)
    told = capsys.readouterr().err
    assert "by modification time" in told and "name-000009" in told and "may be from different runs" in told


def test_what_is_not_to_be_averaged_together(save_as, tmp_path, capsys) -> None:
    out = ["--output_file", str(tmp_path / "avg.safetensors")]
    high = save_as("name_high_noise-000001", 10, wan_train_expert="high_noise")
    low = save_as("name_low_noise-000001", 10, session="2", wan_train_expert="low_noise")
    assert run(AVERAGE, [high, low, *out]) == 2
    assert "different experts" in capsys.readouterr().err
    best = save_as("name-best", 10)
    assert run(AVERAGE, [save_as("name-000001", 10), best, *out]) == 2
    assert "is the only file left" in capsys.readouterr().err
