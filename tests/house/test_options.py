"""What users and their scripts rely on: the options, how they are explained, and that --help answers at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs import make_options
from docs.make_options import describe
from wan_train.cli import groups, options

REFRESH = "if that is meant, run: python docs/make_options.py"
TOOLS = make_options.find_tools()
# Each takes seconds to import, or does not import without its device.
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "deepspeed", "bitsandbytes", "cv2", "av", "scipy", "peft")


def test_the_entry_points_are_those_of_the_readme() -> None:
    assert set(TOOLS) >= {
        "wan_cache_latents",
        "wan_cache_text_encoder_outputs",
        "wan_train_network",
        "wan_generate_video",
        "convert_lora",
        "extract_lora",
        "lora_post_hoc_ema",
    }


@pytest.mark.parametrize("name", TOOLS)
def test_no_option_changed_by_accident(name: str) -> None:
    frozen = json.loads(make_options.FROZEN.read_text(encoding="utf-8")).get(name, {})
    now = make_options.list_options(TOOLS[name])
    assert sorted(set(frozen) - set(now)) == [], f"options of {name} are gone; {REFRESH}"
    assert sorted(set(now) - set(frozen)) == [], f"options of {name} are new; {REFRESH}"
    changed = {flag: f"{frozen[flag]} -> {now[flag]}" for flag in now if frozen[flag] != now[flag]}
    assert changed == {}, f"defaults of {name} changed; {REFRESH}"


def test_the_options_pages_are_what_the_settings_say() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in make_options.PAGES.glob("*.md")}
    assert pages == {name: describe(tool) for name, tool in TOOLS.items()}, REFRESH


@pytest.mark.parametrize("name", TOOLS)
def test_every_option_is_explained(name: str) -> None:
    silent = [
        f"--{field.name}"
        for group in groups(TOOLS[name].settings).values()
        for field, described, _ in options(group)
        if not described.help.endswith(".")
    ]
    assert silent == []


@pytest.mark.parametrize("name", TOOLS)
def test_help_answers_without_importing_a_framework(name: str, root: Path) -> None:
    script = f"""
import runpy, sys
sys.argv = ["{name}.py", "--help"]
try:
    runpy.run_path("{name}.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
print("\\nheavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("name", TOOLS)
def test_an_unknown_option_is_one_line_and_exit_code_2(name: str, root: Path) -> None:
    done = subprocess.run([sys.executable, f"{name}.py", "--no_such_option"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
