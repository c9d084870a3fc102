"""The memory of generation, estimated from headers, is what sampling and decoding on the CPU allocate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from generate.jobs import make_jobs
from generate.needs import DECODING, SAMPLING, TEXT, StageNeeds, stage_needs, ways_out
from generate.settings import GenerateSettings
from tests.tiny.make import VAE
from wan_train.models.encoders.text import load_text_encoder, text_encoder_bytes
from wan_train.models.settings import VaeSettings
from wan_train.models.vae.tiling import Tiling
from wan_train.models.vae.vae import load_vae
from wan_train.placement.ledger import Ledger
from wan_train.plan import Bytes, size
from wan_train.sampling.needs import decoding_bytes

Given = Callable[..., GenerateSettings]
GPU = torch.device("cuda:0")
SIZED = ("--prompt", "a blue square moves down", "--video_size", 96, 64, "--video_length", 17, "--infer_steps", 10)


def needs(settings: GenerateSettings, free: int = 1 << 40, **more: Any) -> StageNeeds:
    requests = [job.request for job in make_jobs(settings)]
    return stage_needs(requests, settings, {}, GPU, free=Bytes(free), wants_frames=True, **more)


def test_what_each_option_costs_and_saves(given: Given) -> None:
    """By hand, for the tiny model of width 256 with two blocks, 5 x 4 x 6 = 120 tokens."""
    plain = needs(given(*SIZED)).stages[SAMPLING].device

    def sampling(*words: object) -> int:
        return needs(given(*SIZED, *words)).stages[SAMPLING].device

    tokens = 4 * 120 * 256  # float32
    assert sampling("--guidance_scale", 1) <= plain < sampling("--cfg_merge")
    # The residuals of both passes, and during the second step those of the first.
    cached = sampling("--step_cache", "teacache")
    assert 2 * tokens <= cached - plain <= 4 * tokens
    matrices = 2 * (8 * 256 * 256 + 2 * 256 * 512)
    assert plain - sampling("--fp8") == pytest.approx(matrices, rel=0.3)
    assert sampling("--ffn_chunks", 4) <= plain


def test_streamed_weights_are_in_cpu_ram(given: Given) -> None:
    told = needs(given(*SIZED, "--blocks_to_swap", 1))
    assert told.total.host == 2 * (8 * 256 * 256 + 2 * 256 * 512)
    assert "in CPU RAM 0.00 GiB of weights" in told.describe()


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_decoding_takes_what_is_told(models: Path, tiled: bool) -> None:
    settings = VaeSettings(vae=str(models / VAE), vae_dtype="float32", vae_tile_size=8, vae_tile_overlap=2)
    vae = load_vae(settings.vae)
    vae.tiling = Tiling(8, 2) if tiled else None
    shape = (16, 4, 16, 12)
    ledger = Ledger()
    ledger.leave_out(iter(vae.parameters()))
    with torch.no_grad(), ledger:
        for _ in vae.decode_chunks(torch.zeros(1, *shape)):
            pass
    told = decoding_bytes(settings, shape, tiled=tiled)
    assert told == pytest.approx(ledger.peak + sum(map(size, vae.parameters())), rel=0.1)


def test_a_video_too_large_to_decode_whole_needs_its_tiles(given: Given) -> None:
    small = ("--video_size", 128, 128, "--video_length", 5, "--vae_tile_size", 8, "--vae_tile_overlap", 2)
    settings = given(*SIZED[:2], *small)
    whole, tiled = needs(settings).stages[DECODING], needs(settings, free=1).stages[DECODING]
    assert tiled.device < whole.device


@pytest.mark.parametrize("fp8", [False, True])
def test_the_text_encoder_takes_what_is_told(given: Given, fp8: bool) -> None:
    path = given(*SIZED).text.t5
    model = load_text_encoder(path, tokenizer=None, dtype=torch.bfloat16, fp8=fp8).model
    parts = {id(part): part for part in (*model.parameters(), *model.buffers())}
    if fp8:
        del parts[id(model.shared.weight)]  # in CPU RAM
    told = text_encoder_bytes(path, dtype=torch.bfloat16, fp8=fp8)
    assert told == pytest.approx(sum(map(size, parts.values())), rel=0.01)  # norms are float32 on a CPU


def test_the_ways_out_are_those_of_the_largest_stage(given: Given) -> None:
    def ways(name: str, *words: object) -> list[str]:
        stages = dict.fromkeys((TEXT, SAMPLING, DECODING), Bytes(1)) | {name: Bytes(2)}
        return ways_out(given(*SIZED, *words), StageNeeds(stages))[:-1]

    assert ways(TEXT) == ["--fp8_t5"] and ways(DECODING) == ["--vae_tiling", "--vae_cache_cpu"]
    assert ways(SAMPLING) == ["--fp8 --fp8_scaled", "--blocks_to_swap", "--ffn_chunks"]
    assert ways(SAMPLING, "--int8_base", "--blocks_to_swap", 1) == ["--ffn_chunks"]
