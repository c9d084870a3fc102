import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.lora_wan import attach
from networks.settings import NetworkSettings
from tests.parity.golden import load_case
from wan_train.cli import parse
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.models.dit.dit import Dit, DitConfig
from wan_train.models.settings import VaeSettings
from wan_train.models.vae.vae import WanVAE
from wan_train.models.variants import VARIANTS
from wan_train.placement.lanes import make_lane
from wan_train.placement.recompute import apply_recompute
from wan_train.placement.settings import RecomputeSettings, StreamSettings
from wan_train.placement.stream import apply_stream
from wan_train.sampling.decode import open_vae
from wan_train.sampling.request import SampleRequest, preview_defaults
from wan_train.training.reporting.preview import Previewer, check_previews
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.settings import TOOL

CPU = torch.device("cpu")
SHORT = replace(preview_defaults(VARIANTS["t2v-1.3B"]), width=32, height=32, frames=5, steps=2, negative_prompt="")
REQUESTS = [replace(SHORT, prompt=prompt) for prompt in ("cat", "dog", "owl")]


def make_dit() -> Dit:
    torch.manual_seed(0)
    return Dit(DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=8))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(load_case("wan21_vae").state_dict(), path)
    return open_vae(VaeSettings(vae=str(path)), CPU)


def previewer(folder: Path, vae: Any, requests: list[SampleRequest] = REQUESTS) -> Previewer:
    generator = torch.Generator().manual_seed(1)
    texts = ["", *(request.prompt for request in requests)]
    conditions = {text: Conditions((torch.randn(3, 8, generator=generator),)) for text in texts}
    images = dict.fromkeys(range(len(requests)))
    save = SaveSettings(str(folder), "name")
    return Previewer(dict(enumerate(requests)), conditions, images, vae, CPU, save, 16, 40)


def fail_on(model: Dit, call: int, error: BaseException) -> Callable[[], None]:
    """Let the model's second block fail at one call, a big tensor in its hands; undone by what is returned."""
    calls = SimpleNamespace(count=0)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.count += 1
        if calls.count == call:
            big = torch.zeros(1000)
            calls.reference = weakref.ref(big)
            raise error

    handle = model.blocks[1].register_forward_pre_hook(hook)

    def check() -> None:
        handle.remove()
        gc.collect()
        assert calls.reference() is None

    return check


def test_a_preview_that_fails_costs_a_warning_and_its_memory_comes_back(
    tmp_path: Path, vae: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_dit()
    check = fail_on(model, 5, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    made = previewer(tmp_path, vae).make(model, "000005")
    check()
    names = {index: path.name.split("_")[2] + path.name[-7:] for index, path in made.items()}
    assert names == {0: "00_40.mp4", 2: "02_42.mp4"}
    assert all(path.is_file() for path in made.values())
    assert model.training
    warning = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert warning == ["WARNING: preview 1 at 000005 failed, training continues: CUDA out of memory."]


def test_a_vae_that_fails_is_parked_again(tmp_path: Path) -> None:
    places: list[str] = []

    def decode(latents: Tensor) -> Tensor:
        raise RuntimeError("no")

    broken: Any = SimpleNamespace(to=lambda place: places.append(str(place)), decode=decode)
    one_gpu = previewer(tmp_path, broken, REQUESTS[:1])
    assert one_gpu.make(make_dit(), "000001") == {}
    assert places[-1] == "cpu"


def test_ctrl_c_passes(tmp_path: Path, vae: Any) -> None:
    model = make_dit()
    check = fail_on(model, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        previewer(tmp_path, vae).make(model, "000001")
    assert model.training
    check()


def fail(model: Dit, folder: Path, vae: WanVAE) -> None:
    check = fail_on(model, 2, RuntimeError("no"))
    assert previewer(folder, vae, REQUESTS[:1]).make(model, "000001") == {}
    check()


def reuse(model: Dit, folder: Path, vae: WanVAE) -> None:
    """Previews that leave blocks out, by step caches and in windows."""
    calls: list[int] = []
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    all_of = [replace(request, steps=6) for request in REQUESTS]
    caches = ({"step_cache": "teacache", "tea_cache_l1_thresh": 100.0}, {"step_cache": "attention"})
    requests = [replace(all_of[0], **caches[0]), replace(all_of[1], **caches[1]), replace(all_of[2], **caches[0])]
    requests[2] = replace(requests[2], sliding_window_size=1)
    assert len(previewer(folder, vae, requests).make(model, "000001")) == len(requests)
    handle.remove()
    assert len(calls) == 2 * (2 + 6 + 2 * 2), "first and last step; all steps; those of two windows"


@pytest.mark.parametrize("preview", [fail, reuse])
def test_training_goes_on_after_previews_as_if_there_had_been_none(
    preview: Callable[[Dit, Path, WanVAE], None], tmp_path: Path, vae: WanVAE
) -> None:
    """Blocks that stream are where the previews left them; what follows must not care."""

    def gradients(*, has_previews: bool) -> list[Tensor]:
        model = make_dit()
        attach(model, NetworkSettings(), seed=1)
        apply_stream(model.blocks, StreamSettings(blocks_to_swap=2), make_lane(CPU))
        apply_recompute(list(model.blocks), RecomputeSettings(recompute="full"), CPU)
        if has_previews:
            preview(model, tmp_path, vae)
        latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
        model(
            latents, torch.tensor([500.0]), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(3))
        ).sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in found) > 0
        return found

    for ours, plain in zip(gradients(has_previews=True), gradients(has_previews=False), strict=True):
        assert torch.equal(ours, plain)


def settings(*more: str) -> Any:
    required = ("--dit", "d", "--dataset_config", "c", "--output_dir", "o", "--output_name", "n")
    return parse(TOOL.settings, [*required, *more])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--sample_with_ema",), "--sample_with_ema requires --ema_decay"),
        (("--sample_at_first",), "--sample_prompts"),
        (("--sample_every_n_steps", "5"), "--sample_prompts"),
        (("--sample_prompts", "{prompts}"), "previews need --vae"),
        (("--sample_prompts", "{prompts}", "--vae", "v"), "previews need --t5"),
        (("--sample_prompts", "{wrong}", "--vae", "v", "--t5", "t"), r"wrong\.txt, line 2: --s 0"),
    ],
)
def test_what_previews_need_is_asked_for_before_training(tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "wrong.txt").write_text("a cat\na dog --s 0\n")
    paths = {"{prompts}": str(tmp_path / "prompts.txt"), "{wrong}": str(tmp_path / "wrong.txt")}
    with pytest.raises(InputError, match=told):
        check_previews(settings(*(paths.get(word, word) for word in options)), VARIANTS["t2v-1.3B"])


def test_the_log_says_what_each_preview_is_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for check in ("check_vae", "check_given_clip", "check_text_encoder"):
        monkeypatch.setattr(f"wan_train.training.reporting.preview.{check}", lambda *_, **__: None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --w 64 --h 32 --f 5 --s 4 --l 1 --fs 3 --d 7\n")
    check_previews(settings("--sample_prompts", str(prompts), "--vae", "v", "--t5", "t"), VARIANTS["t2v-A14B"])
    told = capsys.readouterr().err
    bare = "256x256, 1 frames, 20 steps, solver unipc, shift 12, guidance scale 4 and then 3"
    assert f'preview 0 ("a cat", the run\'s seed + 0): {bare}' in told
    assert (
        'preview 1 ("a dog", seed 7): 64x32, 5 frames, 4 steps, solver unipc, shift 3, guidance scale 4 and then 1'
        in told
    )


def test_a_name_that_previews_cannot_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("check_vae", "check_given_clip", "check_text_encoder"):
        monkeypatch.setattr(f"wan_train.training.reporting.preview.{check}", lambda *_, **__: None)
    (tmp_path / "prompts.txt").write_text("a cat --d 7\n")
    words = ("--sample_prompts", str(tmp_path / "prompts.txt"), "--vae", "v", "--t5", "t")
    words = (*words, "--output_dir", str(tmp_path / "new"))
    for length, told in ((220, ""), (240, "too long .*; give a shorter --output_name")):
        named = settings(*words, "--output_name", "n" * length)
        if not told:
            assert len(check_previews(named, VARIANTS["t2v-1.3B"])) == 1
            continue
        with pytest.raises(InputError, match=told):
            check_previews(named, VARIANTS["t2v-1.3B"])
    assert not (tmp_path / "new").exists()


def test_a_strict_run_refuses_what_looks_like_an_option(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat -w 832\n")
    with pytest.raises(InputError, match=r'line 1: "-w 832" looks like an option'):
        check_previews(
            settings("--sample_prompts", str(tmp_path / "prompts.txt"), "--strict_prompts"), VARIANTS["t2v-1.3B"]
        )


def test_without_prompts_there_are_no_previews() -> None:
    assert check_previews(settings("--ema_decay", "0.9"), VARIANTS["t2v-1.3B"]) == []
