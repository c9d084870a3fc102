"""The low-memory commands that users bring, on a model of four blocks."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.make import DIT, SIZE, T5, VAE, dit_shapes, draw_weight
from wan_train.cli import run
from wan_train.training.settings import TOOL

Tool = Callable[..., CompletedProcess[str]]
PROMPT = "a blue square moves down"
PREVIEW = f"{PROMPT} --w {SIZE[0]} --h {SIZE[1]} --f 5 --s 2 --d 11"
OLD_SWITCHES = ("--use_pinned_memory_for_block_swap", "--block_swap_h2d_only", "--block_swap_ring_size", 2)


class Bench:
    """A folder with caches and a model of four blocks."""

    def __init__(self, folder: Path, run: Tool) -> None:
        self.folder, self.run = folder, run

    def training(self, name: str, *more: object, steps: int = 4) -> list[object]:
        return [
            *("--task", "t2v-1.3B", "--dit", self.folder / DIT, "--dataset_config", self.folder / "data.toml"),
            *("--mixed_precision", "no", "--learning_rate", 2e-2, "--optimizer_type", "adamw"),
            *("--network_module", "networks.lora_wan", "--network_dim", 4, "--network_alpha", 4, "--seed", 1),
            *("--network_dropout", 0.1, "--max_data_loader_n_workers", 0, "--trust_cache"),
            *("--max_train_steps", steps, "--output_dir", self.folder / "out", "--output_name", name),
            *more,
        ]

    def train(self, name: str, *more: object, steps: int = 4) -> None:
        self.run("wan_train_network.py", *self.training(name, *more, steps=steps))

    def lora(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / f"{name}.safetensors")

    def losses(self, name: str) -> list[float]:
        return self.rows(name, "loss")

    def rows(self, name: str, what: str) -> list[float]:
        lines = (self.folder / "out" / f"{name}.metrics.jsonl").read_text().splitlines()
        return [json.loads(line)[what] for line in lines]

    def generate(self, name: str, *more: object) -> None:
        self.run(
            "wan_generate_video.py",
            *("--task", "t2v-1.3B", "--video_size", *SIZE, "--video_length", 5, "--infer_steps", 2, "--seed", 11),
            *("--prompt", PROMPT, "--save_path", self.folder / f"{name}.mp4", "--output_type", "both"),
            *("--dit", self.folder / DIT, "--vae", self.folder / VAE, "--t5", self.folder / T5),
            *more,
        )

    def latent(self, name: str) -> torch.Tensor:
        return load_file(self.folder / f"{name}_latent.safetensors")["latent"]


@pytest.fixture(scope="module")
def bench(tiny: Path, tmp_path_factory: pytest.TempPathFactory, run_tool: Tool) -> Bench:
    folder = tmp_path_factory.mktemp("low_memory") / "all"
    shutil.copytree(tiny, folder)
    shapes = dit_shapes(num_layers=4)
    save_file({name: draw_weight(name, shape).bfloat16() for name, shape in shapes.items()}, folder / DIT)
    data = folder / "data.toml"
    data.write_text(data.read_text().replace(str(tiny), str(folder)))
    (folder / "prompts.txt").write_text(PREVIEW + "\n")
    run_tool("wan_cache_latents.py", "--dataset_config", data, "--vae", folder / VAE)
    run_tool("wan_cache_text_encoder_outputs.py", "--dataset_config", data, "--t5", folder / T5, "--fp8_t5")
    made = Bench(folder, run_tool)
    made.train("plain", "--sdpa")
    made.generate("plain")
    return made


@pytest.mark.parametrize(
    "options",
    [
        ("--gradient_checkpointing", "--blocks_to_swap", 3, *OLD_SWITCHES),
        ("--recompute", "keep_attention", "--blocks_to_swap", 1, "--split_attn"),
        ("--recompute", "full", "--gradient_checkpointing_cpu_offload", "--attn_mode", "torch"),
    ],
)
def test_what_saves_memory_alone_changes_no_bit(bench: Bench, options: tuple[object, ...]) -> None:
    bench.train("same", *options)
    ours, plain = bench.lora("same"), bench.lora("plain")
    assert bench.losses("same") == bench.losses("plain")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_everything_at_once(bench: Bench) -> None:
    """A 12 GB card's command: scaled fp8, all blocks but one streamed, previews, an fp8 text encoder."""
    bench.train(
        "all",
        *("--sdpa", "--fp8_base", "--fp8_scaled", "--fp8_t5", "--blocks_to_swap", 3, *OLD_SWITCHES),
        *("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--ffn_chunks", 2),
        *("--vae", bench.folder / VAE, "--t5", bench.folder / T5, "--vae_tiling", "--vae_cache_cpu"),
        *("--sample_prompts", bench.folder / "prompts.txt", "--sample_every_n_steps", 2, "--sample_at_first"),
    )
    for ours, plain in zip(bench.losses("all"), bench.losses("plain"), strict=True):
        assert ours == pytest.approx(plain, rel=0.02)
    assert len(list((bench.folder / "out" / "sample").glob("all_*"))) == 3


@pytest.mark.parametrize("swap", [1, 3])
def test_streamed_generation_changes_no_bit(bench: Bench, swap: int) -> None:
    bench.generate("streamed", "--blocks_to_swap", swap)
    assert torch.equal(bench.latent("streamed"), bench.latent("plain"))


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        (("--fp8", "--fp8_t5"), 0.05),
        (("--fp8", "--fp8_scaled", "--blocks_to_swap", 2), 0.05),
        (("--fp8", "--fp8_scaled", "--fp8_fast"), 0.08),
        (("--int8_base", "--int8_ffn2", "--ffn_chunks", 3), 0.03),
    ],
)
def test_generation_in_fewer_bits(bench: Bench, options: tuple[object, ...], largest: float) -> None:
    bench.generate("fewer", *options)
    plain = bench.latent("plain")
    error = float((bench.latent("fewer") - plain).norm() / plain.norm())
    assert 0 < error < largest


@pytest.mark.slow
def test_compiled_training_and_generation(bench: Bench) -> None:
    compiled = ("--compile", "--compile_backend", "aot_eager")
    common = ("--gradient_checkpointing", "--fp8_base", "--fp8_scaled", "--network_dropout", 0)
    bench.train("compiled", *common, *compiled, "--blocks_to_swap", 2)
    bench.train("eager", *common)
    for ours, plain in zip(bench.losses("compiled"), bench.losses("eager"), strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)
    bench.generate("compiled", *compiled)
    torch.testing.assert_close(bench.latent("compiled"), bench.latent("plain"), rtol=1e-4, atol=1e-4)
    lora = ("--lora_weight", bench.folder / "out" / "plain.safetensors", "--lora_mode", "attach")
    everything = (*lora, "--fp8", "--fp8_scaled", "--blocks_to_swap", 2, "--ffn_chunks", 2)
    bench.generate("eager", *everything)
    bench.generate("compiled", *everything, *compiled)
    torch.testing.assert_close(bench.latent("compiled"), bench.latent("eager"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--blocks_to_swap", 4, "--gradient_checkpointing"), "--blocks_to_swap 4 is too many for a model of 4 blocks"),
        (("--blocks_to_swap", 2), "--blocks_to_swap 2 requires .* add --gradient_checkpointing"),
        (("--fp8_scaled",), "--fp8_scaled .*--fp8_base"),
        (("--fp8_base", "--int8_base"), "--int8_base and --fp8_base"),
        (("--sage_attn",), "--attn_mode sageattn does not support training"),
        (("--flash3",), "--attn_mode flash3 needs .*--sdpa"),
        (("--gradient_checkpointing_cpu_offload",), "--gradient_checkpointing_cpu_offload .* --gradient_checkpointing"),
        (("--compile", "--compile_backend", "none_such"), "unknown --compile_backend 'none_such'"),
    ],
)
def test_what_cannot_be_is_refused(
    bench: Bench, options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: nothing is loaded and nothing is made."""
    command = bench.training("refused", *options)
    assert run(TOOL, [str(word) for word in command]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (bench.folder / "out" / "refused.safetensors").exists()


@pytest.mark.slow
def test_adapters_learn_on_every_base_as_on_bf16(bench: Bench) -> None:
    def level(name: str, *options: object) -> float:
        bench.train(name, "--gradient_checkpointing", *options, steps=200)
        losses = bench.losses(name)
        assert sum(losses[-50:]) < 0.8 * 50 / 5 * sum(losses[:5])
        peaks = bench.rows(name, "memory_mib")
        assert peaks[-1] <= 1.01 * peaks[100]  # nothing grows with the steps
        return sum(losses[-50:]) / 50

    reference = level("bf16")
    files = other_files(bench.folder)
    for name, *options in (
        ("fp8", "--fp8_base"),
        ("fp8_scaled", "--fp8_base", "--fp8_scaled"),
        ("int8", "--int8_base"),
        ("int8_ffn2", "--int8_base", "--int8_ffn2"),
        ("streamed", "--fp8_base", "--fp8_scaled", "--blocks_to_swap", 3),
        ("fp16_file", "--dit", files["fp16"]),
        ("fp8_file", "--dit", files["fp8"], "--fp8_base"),
        ("scaled_file", "--dit", files["scaled"], "--fp8_base"),
    ):
        assert level(name, *options) == pytest.approx(reference, rel=0.03), name


def other_files(folder: Path) -> dict[str, Path]:
    """The model as others store it: fp16, all of it e4m3, and e4m3 with a scale for each matrix as ComfyUI does."""
    wide, codes = load_file(folder / DIT), torch.float8_e4m3fn
    scales = {k: t.abs().max().float() / 448 for k, t in wide.items() if k.endswith(".weight") and t.ndim == 2}
    scaled = {k: (t / scales[k]).to(codes) if k in scales else t.half() for k, t in wide.items()}
    scaled |= {k.removesuffix("weight") + "scale_weight": scale for k, scale in scales.items()}
    contents = {
        "fp16": {k: t.half() for k, t in wide.items()},
        "fp8": {k: t.to(codes) for k, t in wide.items()},
        "scaled": scaled | {"scaled_fp8": torch.empty(0, dtype=codes)},
    }
    paths = {name: folder / f"{name}.safetensors" for name in contents}
    for name, tensors in contents.items():
        save_file(tensors, paths[name])
    return paths


@pytest.mark.slow
def test_compiled_by_inductor(bench: Bench) -> None:
    bench.train("inductor", "--compile", "--recompute", "keep_attention", "--blocks_to_swap", 2, "--network_dropout", 0)
    bench.train("eager", "--network_dropout", 0)
    for ours, plain in zip(bench.losses("inductor"), bench.losses("eager"), strict=True):
        assert ours == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_the_benchmark_tells_what_the_device_would_hold(root: Path) -> None:
    command = [sys.executable, "benchmarks/memory.py", "--layers", "1", "--steps", "1", "--sizes", "32x32x1"]
    done = subprocess.run(
        [*command, "--cells", "resident", "fp8_scaled"], cwd=root, capture_output=True, text=True, check=True
    )
    first, *rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert first["device"] and first["layers"] == 1
    resident, scaled = (row["weights_gib"] for row in rows)
    assert resident > 1.3 * scaled  # what is outside the blocks stays as it is
    assert all(row["s_per_step"] > 0 and row["peak_process_gib"] > 0 and row["tokens"] == 4 for row in rows)
