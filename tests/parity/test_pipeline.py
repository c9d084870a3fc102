"""The generator against diffusers' WanPipeline: from words and a seed to frames, with the same tiny random weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import wan_train
from generate.jobs import make_jobs
from generate.models import Models, VideoInputs
from generate.settings import GenerateSettings
from tests.parity.golden import TOLERANCE, relative_error
from tests.tiny import make
from wan_train.config_file import from_values
from wan_train.flow.solvers import make_solver
from wan_train.models.encoders.text_files import t5_rename
from wan_train.models.variants import NEGATIVE_PROMPT

CPU = torch.device("cpu")
WIDTH, HEIGHT = make.SIZE
STEPS, SHIFT, GUIDANCE, SEED = 4, 5.0, 5.0, 7
PROMPT = "a red  circle &amp;amp; a blue\nsquare move to the right "  # there is something to clean

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """Latents (1, 16, T, h, w), and pixels (1, 3, F, H, W) in [-1, 1] that are not rounded yet."""

    latents: Tensor
    pixels: Tensor


@dataclass(frozen=True)
class Tiny:
    """The official files of a tiny model, and a WanPipeline with the same weights."""

    folder: Path
    pipeline: WanPipeline

    def options(self, **changes: Any) -> dict[str, Any]:
        """Options of the generator, the prompt among them."""
        names = {"dit": make.DIT, "vae": make.VAE, "t5": make.T5}
        files = {option: str(self.folder / name) for option, name in names.items()}
        usual = {"video_size": make.SIZE, "infer_steps": STEPS, "flow_shift": SHIFT, "guidance_scale": GUIDANCE}
        return {"task": "t2v-1.3B", "device": "cpu", "prompt": PROMPT, "seed": SEED, **files, **usual, **changes}

    def ours(self, **changes: Any) -> Made:
        """What the generator makes, by its own stages."""
        settings = from_values(GenerateSettings, self.options(**changes), "the test")
        models, request = Models(settings, {}, CPU), make_jobs(settings)[0].request
        conditions = models.encode([request.prompt, request.negative_prompt])
        sampling = models.start(request, conditions, VideoInputs())
        with models.dit() as dit:
            sampling.advance(dit.model)
        latents = sampling.latents[None]
        with models.vae() as vae:
            return Made(latents, vae.model.decode(latents))

    def theirs(self, *, frames: int, guidance: float = GUIDANCE) -> Made:
        """What WanPipeline makes; it draws its noise from the same seed."""
        after_step: list[Tensor] = []

        def keep(pipeline: WanPipeline, step: int, timestep: Tensor, values: Weights) -> Weights:
            after_step.append(values["latents"])
            return values

        pixels = self.pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            width=WIDTH,
            height=HEIGHT,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            callback_on_step_end=keep,
        ).frames
        assert len(after_step) == STEPS
        return Made(after_step[-1], 2 * pixels.transpose(1, 2) - 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("pipeline")
    vocabulary = make.make_tokenizer(folder / make.TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(folder / make.TOKENIZER)
    dit = their_dit(write(folder / make.DIT, make.dit_shapes()))
    vae = their_vae(write(folder / make.VAE, make.vae_shapes()))
    t5 = their_t5(write(folder / make.T5, make.t5_shapes(vocabulary)))
    pipeline = WanPipeline(tokenizer, t5, vae, their_scheduler_on_our_levels(), dit)
    pipeline.set_progress_bar_config(disable=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with tensors this small, several would spend their time waiting for each other
    yield Tiny(folder, pipeline)
    torch.set_num_threads(threads)


def write(path: Path, shapes: make.Shapes) -> Weights:
    """Weights of these names and shapes, float32 also in the file at `path`."""
    weights = {name: make.draw_weight(name, shape) for name, shape in shapes.items()}
    save_file(weights, path)
    return weights


def their_dit(weights: Weights) -> WanTransformer3DModel:
    """Filled by diffusers' own converter of official files, so that no names of ours are on their side."""
    ffn_dim, dim = weights["blocks.0.ffn.0.weight"].shape
    num_layers = sum(name.endswith("ffn.0.weight") for name in weights)
    text_dim = weights["text_embedding.0.weight"].shape[1]
    model = WanTransformer3DModel(
        num_attention_heads=dim // 128, text_dim=text_dim, ffn_dim=ffn_dim, num_layers=num_layers
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)))
    return model.eval()


def their_vae(weights: Weights) -> AutoencoderKLWan:
    """As `their_dit`."""
    model = AutoencoderKLWan(base_dim=len(weights["encoder.conv1.weight"]))
    model.load_state_dict(convert_wan_vae_to_diffusers(dict(weights)))
    return model.eval()


def their_t5(weights: Weights) -> UMT5EncoderModel:
    """Filled by our names, which tests/parity/test_umt5.py holds against the official encoder: nobody else has any."""
    vocabulary, dim = weights["token_embedding.weight"].shape
    num_heads = weights["blocks.0.pos_embedding.embedding.weight"].shape[1]
    rename = t5_rename({name: tuple(tensor.shape) for name, tensor in weights.items()})
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=dim // num_heads,
        d_ff=len(weights["blocks.0.ffn.fc1.weight"]),
        num_layers=sum(name.endswith("ffn.fc1.weight") for name in weights),
        num_heads=num_heads,
    )
    model = UMT5EncoderModel(config)
    state = {rename(name): tensor for name, tensor in weights.items()}
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    return model.eval()


def their_scheduler_on_our_levels() -> UniPCMultistepScheduler:
    """Their solver on the official noise levels, tests/parity/test_solvers.py, in place of levels of its own."""
    solver = make_solver("unipc", steps=STEPS, shift=SHIFT)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    begin = scheduler.set_timesteps

    def set_timesteps(count: int, device: torch.device) -> None:
        begin(count, device)
        scheduler.sigmas, scheduler.timesteps = solver.sigmas, solver.timesteps

    scheduler.set_timesteps = set_timesteps
    return scheduler


def check_equal(ours: Made, theirs: Made) -> None:
    assert relative_error(ours.latents, theirs.latents) < TOLERANCE
    assert relative_error(ours.pixels, theirs.pixels) < TOLERANCE


def test_embeddings(tiny: Tiny) -> None:
    settings = from_values(GenerateSettings, tiny.options(), "the test")
    ours = Models(settings, {}, CPU).encode([PROMPT, NEGATIVE_PROMPT])
    with torch.no_grad():
        theirs = tiny.pipeline.encode_prompt(PROMPT, NEGATIVE_PROMPT, max_sequence_length=512)
    for text, padded in zip((PROMPT, NEGATIVE_PROMPT), theirs, strict=True):
        (rows,) = ours[text].context
        assert relative_error(rows, padded[0, : len(rows)]) < TOLERANCE
        assert not padded[0, len(rows) :].any()


@pytest.mark.parametrize("frames", [1, 9, pytest.param(17, marks=pytest.mark.slow)])
def test_noise_to_frames(tiny: Tiny, frames: int) -> None:
    made = tiny.ours(video_length=frames)
    assert made.pixels.shape == (1, 3, frames, HEIGHT, WIDTH)
    check_equal(made, tiny.theirs(frames=frames))


def test_both_prompts_in_one_batch(tiny: Tiny) -> None:
    check_equal(tiny.ours(video_length=5, cfg_merge=True), tiny.theirs(frames=5))


def test_without_guidance(tiny: Tiny) -> None:
    check_equal(tiny.ours(video_length=5, guidance_scale=1.0), tiny.theirs(frames=5, guidance=1.0))


def test_the_result_is_no_constant(tiny: Tiny) -> None:
    """Images have contrast and are not clipped, and whatever decides them tells: the other tests can fail."""
    made = tiny.ours(video_length=1)
    assert made.pixels.std() > 0.2
    assert (made.pixels.abs() == 1).float().mean() < 0.2
    changes: list[dict[str, Any]] = [{"seed": SEED + 1}, {"negative_prompt": ""}, {"guidance_scale": 1.0}]
    for change in changes:
        other = tiny.ours(video_length=1, **change)
        assert relative_error(other.latents, made.latents) > 0.3
        assert relative_error(other.pixels, made.pixels) > 0.3


def test_the_python_call_gives_these_frames_rounded(tiny: Tiny) -> None:
    frames = wan_train.generate(**tiny.options(video_length=5))
    levels = 127.5 * (tiny.theirs(frames=5).pixels[0] + 1)
    assert np.abs(frames - rearrange(levels, "C F H W -> F H W C").numpy()).max() < 0.51
