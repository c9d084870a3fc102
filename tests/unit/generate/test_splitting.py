"""What does not go with weights and frames that several processes split is refused by name."""

import pytest

from generate.splitting import check_split_frames, check_split_models
from tests.unit.generate.conftest import Given
from wan_train.errors import InputError


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--dit_fsdp",), "--dit_fsdp requires several processes"),
        (("--t5_fsdp", "--data_parallel", 4), "--t5_fsdp requires several processes"),
        (("--dit_fsdp", "--cfg_size", 2), "--dit_fsdp with --cfg_size 2 alone: .* give --ulysses_size 2"),
        (("--dit_fsdp", "--ulysses_size", 2, "--blocks_to_swap", 1), "--dit_fsdp .* --blocks_to_swap 1 .* one of them"),
        (
            ("--dit_fsdp", "--ring_size", 2, "--compile", "--compile_mode", "max-autotune"),
            "--compile_mode max-autotune .* --dit_fsdp .* use --compile_mode default",
        ),
    ],
)
def test_split_models_are_refused_with_what_they_do_not_go_with(
    words: tuple[object, ...], named: str, given: Given
) -> None:
    with pytest.raises(InputError, match=named):
        check_split_models(given(*words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--vae_parallel",), "--vae_parallel requires several processes"),
        (("--vae_parallel", "--cfg_size", 2, "--vae_tiling"), "--vae_parallel and --vae_tiling .* one of them"),
    ],
)
def test_split_frames_are_refused_with_what_they_do_not_go_with(
    words: tuple[object, ...], named: str, given: Given
) -> None:
    with pytest.raises(InputError, match=named):
        check_split_frames(given(*words))


def test_what_goes_together_is_taken(given: Given) -> None:
    split = ("--dit_fsdp", "--t5_fsdp", "--vae_parallel", "--ulysses_size", 2, "--cfg_size", 2)
    check_split_models(given(*split, "--compile", "--fp8"))
    check_split_frames(given(*split))
    check_split_models(given("--t5_fsdp", "--cfg_size", 2))
