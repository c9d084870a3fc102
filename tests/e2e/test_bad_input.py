"""What a user gets wrong: one line that names it, exit code 2, before a model is loaded."""

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache_tools.settings import LATENTS_TOOL, TEXT_TOOL
from generate.settings import TOOL as GENERATE
from networks.settings import TOOL as CONVERT
from tests.tiny.make import CLIPS, DIT, T5, VAE
from wan_train.cli import Tool, run
from wan_train.training.settings import TOOL as TRAIN

Words = dict[str, object]


@pytest.fixture
def here(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder to spoil."""
    folder = tmp_path / "here"
    shutil.copytree(tiny, folder)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    return folder


def latents(here: Path) -> Words:
    return {"dataset_config": here / "data.toml", "vae": here / VAE}


def text(here: Path) -> Words:
    return {"dataset_config": here / "data.toml", "t5": here / T5}


def train(here: Path) -> Words:
    return {
        "task": "t2v-1.3B",
        "dit": here / DIT,
        "dataset_config": here / "data.toml",
        "output_dir": here / "out",
        "output_name": "name",
        "learning_rate": 1e-4,
    }


def generate(here: Path) -> Words:
    return {
        "task": "t2v-1.3B",
        "dit": here / DIT,
        "vae": here / VAE,
        "t5": here / T5,
        "prompt": "a cat",
        "save_path": here / "out.mp4",
    }


def convert(here: Path) -> Words:
    return {"input": here / "lora.safetensors", "output": here / "other.safetensors", "target": "other"}


JOBS: dict[str, tuple[Tool, Callable[[Path], Words]]] = {
    "latents": (LATENTS_TOOL, latents),
    "text": (TEXT_TOOL, text),
    "train": (TRAIN, train),
    "generate": (GENERATE, generate),
    "convert": (CONVERT, convert),
}


class Forbidden:
    """Whatever would hold a model: to be told before it is there is the point."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a job with changed words; the one line that it says on its way out with 2."""
    monkeypatch.setattr("wan_train.models.weights.fill", Forbidden)
    monkeypatch.setattr("wan_train.models.loading.fill", Forbidden)
    monkeypatch.setattr("wan_train.models.vae.vae.fill", Forbidden)
    monkeypatch.setattr("wan_train.models.encoders.text_files.fill", Forbidden)

    def check(job: str, **changes: object) -> str:
        tool, words = JOBS[job]
        argv: list[str] = []
        for key, value in (words(here) | changes).items():
            if value is not None:
                argv += [f"--{key}", *([] if value is True else str(value).split("|"))]
        assert run(tool, argv) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1
        return said[0]

    return check


@pytest.mark.parametrize("job", JOBS)
def test_an_unknown_option_is_named_with_the_nearest(job: str, refused: Callable[..., str]) -> None:
    known = {"latents": "vae", "text": "t5", "train": "dit", "generate": "dit", "convert": "input"}[job]
    line = refused(job, **{f"{known}x": "y"})
    assert f"--{known}x" in line and f"--{known}" in line


@pytest.mark.parametrize(
    ("job", "words", "told"),
    [
        ("train", {"network_dim": -4}, "--network_dim"),
        ("train", {"network_alpha": -1}, "--network_alpha"),
        ("train", {"network_dropout": 1.5}, "--network_dropout"),
        ("train", {"network_module": "networks.lora_van"}, "networks.lora_wan"),
        ("train", {"network_args": "rank=3"}, "rank"),
        ("train", {"optimizer_type": "AdamW9bit"}, "AdamW8bit"),
        ("train", {"optimizer_args": "beta=3"}, "betas"),
        ("train", {"lr_scheduler": "cosin"}, "cosine"),
        ("train", {"lr_warmup_steps": "110%"}, "--lr_warmup_steps"),
        ("train", {"timestep_sampling": "shifted"}, "shift"),
        ("train", {"task": "t2v-2B"}, "t2v-1.3B"),
        ("train", {"dit": "absent.safetensors"}, "absent.safetensors"),
        ("train", {"dataset_config": "absent.toml"}, "absent.toml"),
        ("train", {"output_name": "../name"}, "--output_name"),
        ("train", {"sample_every_n_epochs": 1}, "--sample_prompts"),
        ("train", {"sample_prompts": "absent.txt"}, "absent.txt"),
        ("generate", {"device": "toaster"}, "toaster"),
        ("train", {}, "wan_cache_latents.py"),
        ("generate", {"cfg_apply_ratio": 1.5, "cfg_skip_mode": "early"}, "0 to 1"),
        ("generate", {"cfg_apply_ratio": 0.5}, "--cfg_skip_mode"),
        ("generate", {"cfg_skip_mode": "middel", "cfg_apply_ratio": 0.5}, "middle"),
        ("generate", {"sample_solver": "unipcs"}, "unipc"),
        ("generate", {"infer_steps": 0}, "--infer_steps"),
        ("generate", {"video_size": "832"}, "--video_size"),
        ("generate", {"video_length": 0}, "--video_length"),
        ("generate", {"prompt": " "}, "--prompt"),
        ("generate", {"output_type": "gif"}, "video"),
        ("generate", {"lora_weight": "absent.safetensors"}, "absent.safetensors"),
        ("generate", {"lora_multiplier": "1|2"}, "--lora_multiplier"),
        ("generate", {"t5": None}, "--t5"),
        ("generate", {"vae": None}, "--vae"),
        ("generate", {"tokenizer": "absent"}, "absent"),
        ("generate", {"device": "cuda:77"}, "cuda:77"),
        ("generate", {"seed": 2**64}, "--seed"),
        ("generate", {"cfg_apply_ratio": -0.1, "cfg_skip_mode": "early"}, "0 to 1"),
        ("generate", {"slg_layers": 1, "slg_start": 2}, "0 to 1"),
        ("generate", {"slg_layers": 2}, "blocks 0 to 1"),
        ("generate", {"slg_layers": 1, "guidance_scale": 1}, "--guidance_scale"),
        ("generate", {"slg_mode": "both"}, "original"),
        ("generate", {"timesteps": "250,500"}, "must decrease"),
        ("generate", {"denoising_strength": 1.5, "video_path": "absent.mp4"}, "0.001 to 1"),
        ("generate", {"denoising_strength": 0.5}, "--video_path"),
        ("generate", {"video_path": "absent.mp4"}, "absent.mp4"),
        ("generate", {"save_path": None}, "--save_path"),
        ("generate", {"save_path": "{name}.mp4"}, "unknown placeholder {name}; use {seed} or {index}"),
        ("generate", {"save_path": "x.webm"}, ".mp4"),
        ("generate", {"codec": "h265"}, "h264"),
        ("generate", {"video_quality": 64}, "--video_quality"),
        ("generate", {"trim_tail_frames": 81}, "--trim_tail_frames"),
        ("generate", {"include_patterns": "attn"}, "--lora_weight"),
        ("generate", {"prompt": None, "from_file": "absent.txt"}, "absent.txt"),
        ("generate", {"from_file": "absent.txt"}, "--prompt and --from_file"),
        ("generate", {"prompt": None, "from_metadata": "absent.mp4"}, "absent.mp4"),
        ("generate", {"prompt": None, "latent_path": "absent.safetensors"}, "absent.safetensors"),
        ("generate", {"prompt": None, "save_merged_model": "m.safetensors"}, "--lora_weight"),
        ("generate", {"prompt": None, "interactive": True}, "{index}"),
        ("generate", {"prompt": None, "interactive": True, "slg_mode": "uncond"}, "--slg_layers"),
        ("latents", {"vae": "absent.pth"}, "absent.pth"),
        ("text", {"t5": "absent.pth"}, "absent.pth"),
        ("convert", {}, "lora.safetensors"),
        ("convert", {"target": "comfy"}, "other"),
    ],
)
def test_values_that_cannot_be(job: str, words: Words, told: str, refused: Callable[..., str]) -> None:
    assert told in refused(job, **words)


@pytest.mark.parametrize(
    ("job", "option", "given"),
    [
        ("generate", "dit", VAE),
        ("generate", "vae", DIT),
        ("generate", "t5", VAE),
        ("generate", "lora_weight", DIT),
        ("train", "dit", T5),
        ("latents", "vae", T5),
        ("text", "t5", DIT),
        ("convert", "input", VAE),
    ],
)
def test_a_checkpoint_of_another_role(
    job: str, option: str, given: str, here: Path, refused: Callable[..., str]
) -> None:
    assert given in refused(job, **{option: here / given})


@pytest.mark.parametrize(
    ("job", "option", "name"),
    [
        ("generate", "dit", DIT),
        ("generate", "vae", VAE),
        ("latents", "vae", VAE),
        ("text", "t5", T5),
        ("train", "dit", DIT),
    ],
)
def test_files_that_are_cut_short_or_hold_code(
    job: str, option: str, name: str, here: Path, refused: Callable[..., str]
) -> None:
    whole = (here / name).read_bytes()
    short = here / "short.safetensors"
    short.write_bytes(whole[: len(whole) // 2])
    assert "short.safetensors" in refused(job, **{option: short})
    torch.save(load_file(here / name), here / "whole.pth")
    cut = here / "cut.pth"
    cut.write_bytes((here / "whole.pth").read_bytes()[:-1000])
    assert "cut.pth" in refused(job, **{option: cut})
    evil = here / "evil.pth"
    evil.write_bytes(pickle.dumps({"weight": sys.exit}))
    assert "evil.pth" in refused(job, **{option: evil})


def test_a_dit_of_another_kind_than_the_task(here: Path, refused: Callable[..., str]) -> None:
    state = load_file(here / DIT)
    state["patch_embedding.weight"] = torch.zeros(256, 36, 1, 2, 2)
    save_file(state, here / "i2v.safetensors")
    for job in ("generate", "train"):
        line = refused(job, dit=here / "i2v.safetensors")
        assert "36" in line and "t2v-1.3B" in line


def test_a_lora_of_another_model(here: Path, refused: Callable[..., str]) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(4, 512), f"{name}.lora_B.weight": torch.zeros(512, 4)},
        here / "l.safetensors",
    )
    assert "512" in refused("generate", lora_weight=here / "l.safetensors")
    save_file({"x.lora_A.weight": torch.zeros(4, 256), "x.lora_B.weight": torch.zeros(256, 4)}, here / "l.safetensors")
    assert "x" in refused("generate", lora_weight=here / "l.safetensors")


@pytest.mark.parametrize(
    ("text_of_toml", "told"),
    [
        ("[general\n", "data.toml"),
        ("[general]\nresolutoin = 3\n[[datasets]]\nvideo_directory = 'clips'\n", "resolution"),
        ("[[datasets]]\nvideo_directory = 'absent'\n", "absent"),
        ("[[datasets]]\nvideo_directory = 'empty'\n", "empty"),
        ("[[datasets]]\nvideo_directory = 'clips'\nbatch_size = 0\n", "batch_size"),
        ("[[datasets]]\nvideo_directory = 'clips'\nframe_extraction = 'tail'\n", "head"),
        ("", "datasets"),
    ],
)
@pytest.mark.parametrize("job", ["latents", "text", "train"])
def test_datasets_that_cannot_be(
    job: str, text_of_toml: str, told: str, here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "empty").mkdir()
    (here / "data.toml").write_text(text_of_toml)
    monkeypatch.chdir(here)
    assert told in refused(job)


def test_a_missing_caption_names_the_clip_and_may_be_allowed(here: Path, refused: Callable[..., str]) -> None:
    (here / "clips" / "red_circle.txt").unlink()
    for job in ("latents", "text", "train"):
        line = refused(job)
        assert "red_circle" in line and "--allow_missing_captions" in line


def test_a_broken_video_is_named(here: Path, refused: Callable[..., str]) -> None:
    clip = here / "clips" / "red_circle.mp4"
    clip.write_bytes(clip.read_bytes()[:300])
    assert "red_circle.mp4" in refused("latents")
    clip.write_text("no video")
    assert "red_circle.mp4" in refused("latents")


def test_output_that_cannot_be_written(here: Path, refused: Callable[..., str]) -> None:
    (here / "file").write_text("")
    assert "file" in refused("generate", save_path=here / "file" / "out.mp4")
    assert "file" in refused("generate", save_path=here / "file" / "folder")
    assert "file" in refused("train", output_dir=here / "file")
    assert "file" in refused("generate", text_cache=here / "file")
    (here / "folder.mp4").mkdir()
    assert "folder.mp4" in refused("generate", save_path=here / "folder.mp4")
    merging = {"prompt": None, "lora_weight": make_lora(here), "save_path": None}
    for place in ("file/m.safetensors", DIT, "lora.safetensors"):
        assert str(here / place.split("/")[0]) in refused("generate", **merging, save_merged_model=here / place)


def make_lora(here: Path) -> Path:
    """A LoRA of the tiny model."""
    rows = {f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight" for side in "AB"}
    save_file({name: torch.zeros((4, 256) if "_A" in name else (256, 4)) for name in rows}, here / "lora.safetensors")
    return here / "lora.safetensors"


def test_a_line_of_a_prompt_file_that_cannot_be(here: Path, refused: Callable[..., str]) -> None:
    for line, told in (
        ("a dog --zz 3", "--zz"),
        ("a dog --s 0", "--s"),
        ("a dog --sample_solver unipcs", "unipc"),
        ("a dog --cfg_apply_ratio 2 --cfg_skip_mode late", "0 to 1"),
        ("a dog --denoising_strength 0.5", "video_path"),
        ("--w 64", "the prompt is empty"),
    ):
        (here / "prompts.txt").write_text(f"a cat\n{line}\n")
        said = refused("generate", prompt=None, from_file=here / "prompts.txt", save_path=here / "out")
        assert "prompts.txt, line 2" in said and told in said


def test_a_video_to_begin_with_that_does_not_read(here: Path, refused: Callable[..., str]) -> None:
    (here / "text.mp4").write_text("no video")
    (here / "text.png").write_text("no image")
    for name in ("text.mp4", "text.png", "data.toml", "clips"):
        assert name in refused("generate", video_path=here / name)
    assert "--vae" in refused("generate", video_path=here / CLIPS / "red_circle.mp4", output_type="latent", vae=None)
    assert T5 in refused("generate", video_path=here / CLIPS / "red_circle.mp4", output_type="latent", vae=here / T5)


def test_latents_that_are_none(here: Path, refused: Callable[..., str]) -> None:
    save_file({"latent": torch.zeros(48, 2, 4, 4)}, here / "wide.safetensors")
    save_file({"context": torch.zeros(5, 64)}, here / "text.safetensors")
    for name in ("wide.safetensors", "text.safetensors", DIT, "data.toml", "clips"):
        assert name in refused("generate", prompt=None, latent_path=here / name)
    save_file({"latent": torch.zeros(16, 2, 4, 4)}, here / "x.safetensors")
    line = refused("generate", prompt=None, latent_path=here / "x.safetensors", vae=None)
    assert "--vae" in line and "--output_type" not in line


def test_a_file_that_does_not_say_how_it_was_made(here: Path, refused: Callable[..., str]) -> None:
    make_lora(here)
    for name in (f"{CLIPS}/red_circle.mp4", "data.toml", "lora.safetensors", "clips"):
        assert name in refused("generate", prompt=None, from_metadata=here / name)


def test_a_previews_line_that_cannot_be(here: Path, refused: Callable[..., str]) -> None:
    (here / "prompts.txt").write_text("a cat --zz 3\n")
    previews = {"sample_prompts": here / "prompts.txt", "sample_at_first": True, "vae": here / VAE, "t5": here / T5}
    assert "line 1" in refused("train", **previews)
    (here / "prompts.txt").write_text("a cat\n")
    assert "--t5" in refused("train", **(previews | {"t5": None}))


@pytest.mark.parametrize("script", ["wan_train_network.py", "wan_generate_video.py"])
def test_the_process_exits_with_2_and_no_traceback(script: str, run_tool: Callable[..., object]) -> None:
    done = run_tool(script, "--dit", "absent.safetensors", expect=2)
    assert done.stderr.startswith("error: ")  # type: ignore[attr-defined]
    assert "Traceback" not in done.stderr  # type: ignore[attr-defined]
