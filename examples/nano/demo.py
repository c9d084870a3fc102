"""Teach the small model a word that it has never seen, with the usual training commands, and show the result.

    python examples/nano/demo.py [FOLDER] [--fast]

Clips of cyan shapes and of known ones are drawn as mp4 files with captions; a LoRA is trained on them, converted, and
used for generation; videos generated before and after are judged by rules. All output goes to FOLDER (demo/), and
`FOLDER/report.html` shows it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.nano.names import DIT, T5, VAE
from examples.nano.world import FRAMES, SIZE, Scene, all_scenes, choose_scenes, write_clips

ROOT = Path(__file__).resolve().parents[2]
NEW = "cyan"
MODEL = Path(__file__).resolve().parent
THREADS = os.environ.get("OMP_NUM_THREADS") or "2"  # of the trainer; two processes' threads on shared cores spin
# The model was trained for guidance against empty text, not against the published negative prompt.
SAMPLING = f"--video_size {SIZE} {SIZE} --video_length {FRAMES} --flow_shift 3 --guidance_scale 2 --negative_prompt ''"


@dataclass(frozen=True)
class Plan:
    """The amount of work: clips of the new word and of old ones, epochs, and videos to generate and judge."""

    new_clips: int = 48
    old_clips: int = 60
    epochs: int = 25
    previews: int = 5  # previews every N epochs
    new_videos: int = 10
    old_videos: int = 30
    steps: int = 20


FULL = Plan()
FAST = Plan(new_clips=30, old_clips=30, epochs=24, previews=12, new_videos=5, old_videos=10, steps=12)


@dataclass(frozen=True)
class Done:
    """A finished command: its words, its seconds, and its peak memory in MiB."""

    title: str
    command: str
    seconds: float
    memory_mib: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "demo")
    parser.add_argument("--fast", action="store_true", help="a fifth of the work, with weaker numbers")
    given = parser.parse_args()
    from examples.nano.demo_report import judge_all, write_report

    plan, folder = FAST if given.fast else FULL, given.folder.resolve()
    began = time.monotonic()
    prepare(folder, plan)
    steps = commands(_shown(folder), _shown(MODEL), plan)
    done = []
    for number, (title, words) in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {title}\n$ {shlex.join(words)}", flush=True)
        done.append(run(title, words))
        print(f"{done[-1].seconds:.0f} s, {done[-1].memory_mib:.0f} MiB", flush=True)
    outcome = judge_all(folder, new_scenes(plan), old_scenes(plan))
    page = write_report(folder, done, outcome)
    print("\n" + outcome.text(NEW))
    print(f"Finished in {(time.monotonic() - began) / 60:.1f} minutes; open {page}")
    return 0 if outcome.claim_holds or given.fast else 1


def new_scenes(plan: Plan) -> list[Scene]:
    """Return the scenes to generate with the new word, covering all shapes, motions and backgrounds."""
    return choose_scenes(plan.new_videos, seed=101, colours=[NEW])


def old_scenes(plan: Plan) -> list[Scene]:
    """Return the scenes to generate with old words."""
    return choose_scenes(plan.old_videos, seed=102)


def prepare(folder: Path, plan: Plan) -> None:
    """Draw the clips, and write the dataset config and the prompts."""
    asked = set(new_scenes(plan))
    others = [scene for scene in all_scenes([NEW]) if scene not in asked]
    taught = [others[(7 * index) % len(others)] for index in range(plan.new_clips)]
    for name, scenes, seed in (("new", taught, 1000), ("old", choose_scenes(plan.old_clips, seed=103), 2000)):
        (folder / "clips" / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / "clips" / name).glob("[0-9][0-9][0-9]_*_*"):
            path.unlink()  # from an earlier demo; other files are not ours
        write_clips(folder / "clips" / name, scenes, first_seed=seed)
    shown = _shown(folder)
    datasets = [
        f'[[datasets]]\nvideo_directory = "{shown}/clips/{name}"\ncache_directory = "{shown}/cache/{name}"\n'
        f"target_frames = [{FRAMES}]\nnum_repeats = {repeats}\n"
        for name, repeats in (("new", 2), ("old", 1))
    ]
    general = f'[general]\nresolution = [{SIZE}, {SIZE}]\ncaption_extension = ".txt"\nbatch_size = 8\n'
    (folder / "data.toml").write_text("\n".join([general, *datasets]), encoding="utf-8")
    options = f"--w {SIZE} --h {SIZE} --f {FRAMES} --s 12 --l 2 --fs 3 --n"
    shown_scenes = [*new_scenes(plan)[:2], *old_scenes(plan)[:2]]
    lines = [f"{scene.caption} --d {index} {options}" for index, scene in enumerate(shown_scenes)]
    (folder / "previews.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    judged = [*new_scenes(plan), *old_scenes(plan)]
    lines = [f"{scene.caption} --d {index}" for index, scene in enumerate(judged)]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def commands(folder: str, model: str, plan: Plan) -> list[tuple[str, list[str]]]:
    """Return the commands that a user would type, each with a title."""
    dit, vae, t5 = f"{model}/{DIT}", f"{model}/{VAE}", f"{model}/{T5}"
    make = (
        f"python wan_generate_video.py --task t2v-1.3B --dit {dit} --vae {vae} --t5 {t5}"
        f" --from_file {folder}/prompts.txt {SAMPLING} --infer_steps {plan.steps} --codec lossless"
    )
    lines = {
        "Cache latents": f"python wan_cache_latents.py --dataset_config {folder}/data.toml --vae {vae}",
        "Cache text": f"python wan_cache_text_encoder_outputs.py --dataset_config {folder}/data.toml --t5 {t5}"
        " --batch_size 16",
        "Generate without the LoRA": f"{make} --save_path {folder}/before/{{index}}.mp4",
        "Train": "accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no"
        f" --num_cpu_threads_per_process {THREADS} wan_train_network.py --task t2v-1.3B --dit {dit}"
        f" --dataset_config {folder}/data.toml --sdpa --mixed_precision no --optimizer_type adamw --learning_rate 4e-3"
        " --network_module networks.lora_wan --network_dim 16 --network_alpha 16 --timestep_sampling shift"
        f" --discrete_flow_shift 3.0 --max_train_epochs {plan.epochs} --lr_scheduler cosine --seed 42"
        f" --validation_split 0.1 --validate_every_n_epochs {plan.previews} --output_dir {folder}/out"
        f" --output_name {NEW} --vae {vae} --t5 {t5} --sample_prompts {folder}/previews.txt"
        f" --sample_every_n_epochs {plan.previews} --sample_at_first",
        "Convert": f"python convert_lora.py --input {folder}/out/{NEW}.safetensors"
        f" --output {folder}/{NEW}_comfy.safetensors --target other",
        "Generate with the LoRA": f"{make} --save_path {folder}/after/{{index}}.mp4"
        f" --lora_weight {folder}/{NEW}_comfy.safetensors",
    }
    return [(title, shlex.split(line)) for title, line in lines.items()]


def run(title: str, words: Sequence[str]) -> Done:
    """Run a command from the repo root, with the programs of this environment; a failure ends the demo."""
    programs = Path(sys.executable).parent
    began = time.monotonic()
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    started = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PATH": path}, executable=str(programs / words[0]))
    _, status, usage = os.wait4(started.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        sys.exit(f"exit code {code} from: {shlex.join(words)}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Done(title, shlex.join(words), time.monotonic() - began, usage.ru_maxrss / unit)


def _shown(folder: Path) -> str:
    """Return a folder as typed in the repo root."""
    return (folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder).as_posix()


if __name__ == "__main__":
    sys.exit(main())
