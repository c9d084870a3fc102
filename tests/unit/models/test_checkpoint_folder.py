"""Which files of a folder are taken for the DiT, the VAE and the encoders."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny.images import CLIP, clip_shapes, image_dit_shapes
from tests.tiny.make import DIT, T5, VAE, Shapes, dit_shapes, make_models, make_tokenizer, save, t5_shapes
from tests.tiny.vae22 import VAE22, vae22_shapes
from wan_train.errors import InputError
from wan_train.models.checkpoint_folder import with_found_files
from wan_train.models.vae.names import diffusers_name as vae_diffusers_name
from wan_train.models.weights import diffusers_name
from wan_train.storage import read_header

FLAGS = ("--task", "--dit", "--dit_high_noise", "--vae", "--t5", "--tokenizer", "--clip", "--ckpt_dir", "--model_base")
INDEXED = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_models(folder)
    return folder


@pytest.fixture
def official(tiny: Path, tmp_path: Path) -> Path:
    """Wan2.1 T2V as Wan-AI publishes it, the text encoder a .pth."""
    folder = tmp_path / "Wan2.1-T2V"
    shutil.copytree(tiny, folder)
    (folder / DIT).rename(folder / "diffusion_pytorch_model.safetensors")
    (folder / T5).unlink()
    shapes = read_header(tiny / T5).shapes
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "models_t5_umt5.pth")
    save(folder / "lora.safetensors", {"x.lora_down.weight": (4, 8), "x.lora_up.weight": (8, 4)}, torch.float32)
    return folder


def found(folder: Path, task: str, *words: str, flags: tuple[str, ...] = FLAGS) -> dict[str, str]:
    """By flag, the files below the folder."""
    argv = [*words, "--ckpt_dir", str(folder), "--task", task]
    result = with_found_files(argv, dict.fromkeys(flags, False))
    assert result[-len(argv) :] == argv
    pairs = (word.split("=") for word in result[: -len(argv)])
    return {flag: str(Path(path).relative_to(folder)) for flag, path in pairs}


def put(path: Path, shapes: Shapes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, shapes, torch.bfloat16)


def test_an_official_folder(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(official, "t2v-1.3B") == {
        "--dit": "diffusion_pytorch_model.safetensors",
        "--vae": VAE,
        "--t5": "models_t5_umt5.pth",
        "--tokenizer": "google/umt5-xxl",
    }
    assert "using Wan2.1_VAE.safetensors as --vae" in capsys.readouterr().err


def test_files_are_told_by_what_they_hold(official: Path) -> None:
    for index, path in enumerate(sorted(official.glob("*.safetensors"))):
        path.rename(official / f"{index}.safetensors")
    put(official / "i2v.safetensors", image_dit_shapes())
    put(official / "clip.safetensors", clip_shapes())
    save(official / "vae22.safetensors", vae22_shapes(), torch.float32)
    text, image = found(official, "t2v-1.3B"), found(official, "i2v-14B")
    assert set(text) == set(image) - {"--clip"}
    assert image["--dit"] == "i2v.safetensors" and image["--clip"] == "clip.safetensors"
    assert image["--vae"] == text["--vae"] != "vae22.safetensors"
    assert "diffusion_pytorch" not in text["--dit"]


def test_a_folder_of_two_experts(official: Path) -> None:
    shards = {INDEXED.replace(".index.json", ""): dit_shapes()}
    for name in ("high_noise_model", "low_noise_model"):
        for file, shapes in shards.items():
            put(official / name / file, shapes)
    (official / "diffusion_pytorch_model.safetensors").unlink()
    names = found(official, "t2v-A14B")
    assert Path(names["--dit"]).parts[0] == "low_noise_model"
    assert Path(names["--dit_high_noise"]).parts[0] == "high_noise_model"
    with pytest.raises(
        InputError, match=r"2 candidates for --dit of --task t2v-14B .*high_noise.*choose one with --dit"
    ):
        found(official, "t2v-14B")


def test_one_model_is_not_taken_for_both_experts(official: Path) -> None:
    with pytest.raises(InputError, match=r"one DiT \(diffusion_pytorch_model.safetensors\) for the two experts"):
        found(official, "t2v-A14B")
    high = str(official / "diffusion_pytorch_model.safetensors")
    assert "--dit" in found(official, "t2v-A14B", "--dit_high_noise", high)


def test_shards_are_one_checkpoint(official: Path) -> None:
    shapes = list(dit_shapes().items())
    (official / "diffusion_pytorch_model.safetensors").unlink()
    for index, part in enumerate((shapes[:5], shapes[5:]), start=1):
        put(official / f"diffusion_pytorch_model-{index:05d}-of-00002.safetensors", dict(part))
    assert found(official, "t2v-1.3B")["--dit"] == "diffusion_pytorch_model-00001-of-00002.safetensors"
    weights = {
        name: f"diffusion_pytorch_model-0000{1 + (i > 4)}-of-00002.safetensors" for i, (name, _) in enumerate(shapes)
    }
    (official / INDEXED).write_text(f'{{"weight_map": {weights}}}'.replace("'", '"'))
    assert found(official, "t2v-1.3B")["--dit"] == INDEXED


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    """Of Wan2.2's two transformers the first is for high noise."""
    folder = tmp_path / "Wan2.2-I2V-A14B-Diffusers"
    named = {diffusers_name(name): shape for name, shape in dit_shapes(in_dim=36).items()}
    for name in ("transformer", "transformer_2"):
        put(folder / name / "diffusion_pytorch_model.safetensors", named)
    vae = {vae_diffusers_name(name): shape for name, shape in read_header_of_vae(tmp_path).items()}
    put(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    vocabulary = make_tokenizer(folder / "tokenizer")
    put(folder / "text_encoder" / "model.safetensors", t5_shapes(vocabulary))
    names = found(folder, "i2v-A14B")
    assert {flag: Path(path).parts[0] for flag, path in names.items()} == {
        "--dit": "transformer_2",
        "--dit_high_noise": "transformer",
        "--vae": "vae",
        "--t5": "text_encoder",
        "--tokenizer": "tokenizer",
    }


def read_header_of_vae(folder: Path) -> Shapes:
    make_models(folder / "models")
    return read_header(folder / "models" / VAE).shapes


def test_the_tokenizer_of_clips_text_side_is_not_the_text_encoders(official: Path) -> None:
    other = official / "xlm-roberta-large"
    other.mkdir()
    for name in ("tokenizer.json", "sentencepiece.bpe.model"):
        (other / name).write_text("{}")
    assert found(official, "t2v-1.3B")["--tokenizer"] == "google/umt5-xxl"


def test_what_is_given_wins_and_is_not_looked_for(official: Path) -> None:
    shutil.copy(official / VAE, official / "again.safetensors")
    with pytest.raises(InputError, match=r"--vae of --task t2v-1.3B \(Wan2.1_VAE.safetensors, again.safetensors\)"):
        found(official, "t2v-1.3B")
    assert "--vae" not in found(official, "t2v-1.3B", "--vae", "mine.pth")


def test_a_tool_is_given_what_it_has_options_for(official: Path) -> None:
    assert set(found(official, "t2v-1.3B", flags=("--vae", "--clip", "--task"))) == {"--vae"}
    put(official / CLIP, clip_shapes())
    assert set(found(official, "i2v-14B", flags=("--vae", "--clip", "--task"))) == {"--vae", "--clip"}
    assert set(found(official, "i2v-14B", "--latent_path", "x", flags=("--dit", "--vae", "--latent_path"))) == {"--vae"}


def test_what_is_missing_is_one_error_with_what_is_there(official: Path) -> None:
    (official / VAE).unlink()
    save(official / VAE22, vae22_shapes(), torch.float32)
    (official / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(InputError) as caught:
        found(official, "i2v-14B")
    told = str(caught.value)
    assert "no file for --dit and --vae and --clip of --task i2v-14B" in told
    assert "diffusion_pytorch_model.safetensors: Wan DiT" in told and f"{VAE22}: Wan2.2 VAE" in told
    assert "broken.safetensors: not readable" in told
    with pytest.raises(InputError, match="--model_base /nowhere is not a folder"):
        with_found_files(["--model_base", "/nowhere"], dict.fromkeys(FLAGS, False))
