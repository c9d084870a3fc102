"""benchmarks/gpu_first_look.py on the CPU, at tiny sizes, with the packages of a bare GPU image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import QUIET

# What it may import: its four packages, what torch needs, and the repository. All else is as if not installed.
BARE = """
import importlib.machinery, sys

ALLOWED = {"torch", "torchgen", "functorch", "numpy", "safetensors", "einops"}
ALLOWED |= {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "typing_extensions", "filelock", "fsspec", "triton"}
ALLOWED |= {"benchmarks", "tests", "wan_train", "networks", "dataset"}

class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        there = path is not None or top in ALLOWED | sys.stdlib_module_names or top.startswith("_")
        return importlib.machinery.PathFinder.find_spec(name, path, target) if there else None

sys.meta_path[:] = [Installed if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
"""
NOT_HERE = {"ceiling/products fp8", "mode/bitsandbytes AdamW8bit"}


def look(root: Path, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    bare = tmp_path / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "sitecustomize.py").write_text(BARE)  # Python imports it at each start, so also in the worker
    command = [sys.executable, "benchmarks/gpu_first_look.py", "--device", "cpu", "--small", *map(str, words)]
    environment = os.environ | QUIET | {"PYTHONPATH": str(bare)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)


def test_it_runs_whole_with_its_four_packages_alone(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "look.jsonl"
    done = look(root, tmp_path, "--minutes", 20, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["row"]: result for result in map(json.loads, out.read_text().splitlines())}
    missing = {name: result["status"] for name, result in results.items() if result["status"] != "ok"}
    missing.pop("mode/fp8 products", None)  # not every torch has them on a CPU
    assert missing == dict.fromkeys(NOT_HERE, "skipped")
    assert results["parity/wan21_t2v"]["float32_error"] < 1e-4
    assert results["mode/streamed"]["loss_as_plain"] and results["resume/full"]["same_weights"]
    assert results["speed/resident"]["blocks"] == 4 and results["speed/resident"]["share_of_ceiling"] > 0
    assert "| keep_attention | 4 |" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_cut_continues_with_its_file(root: Path, tmp_path: Path) -> None:
    words = ("--only", "parity/wan21_t2i", "mode/lora", "--out", tmp_path / "look.jsonl")
    cut = look(root, tmp_path, "--minutes", 0.001, *words)
    assert cut.returncode == 0
    assert cut.stdout.count("skipped: about 1 s, and 0 s are left") == 3
    first = look(root, tmp_path, "--minutes", 20, *words)
    assert first.stdout.count("\nok ") + first.stdout.startswith("ok ") == 3
    again = look(root, tmp_path, "--minutes", 20, *words)
    assert again.stdout.startswith("Measured on cpu") and "| wan21_t2i |" in again.stdout
    other = look(root, tmp_path, "--blocks", 2, "--out", tmp_path / "look.jsonl", "--only", "nothing")
    assert (other.returncode, other.stderr) == (2, "ERROR: no row begins with nothing: see docs/benchmarks.md\n")


def test_the_image_is_bare(root: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    code = "import importlib.util as u; print(*[n for n in ('numpy', 'tqdm', 'diffusers', 'PIL') if u.find_spec(n)])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["numpy"]
