"""Saved checkpoints of full fine-tuning: in shards, for our generator and for diffusers, and after kills."""

import random
import resource
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from networks.settings import EXTRACT
from tests import processes
from tests.e2e.test_full import Desk, desk
from tests.tiny.make import DIT, dit_shapes
from wan_train import load_dit
from wan_train.cli import run
from wan_train.errors import InputError
from wan_train.shards import entry_of, files_of
from wan_train.storage import read_header, read_tensors
from wan_train.tensor_writer import write_set
from wan_train.training.saving import hub
from wan_train.training.settings import TOOL as TRAIN

__all__ = ["desk"]  # the fixture

SHARDED = ("--max_shard_size", "2MB")
KEPT = [f"ages-{epoch:06d}.safetensors.index.json" for epoch in (2, 3)]  # the fourth is the end


def test_in_shards_it_is_the_checkpoint_that_one_file_is(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    whole = desk.train("one", "--save_precision", "bf16", "--max_shard_size", "1GB")
    desk.train("some", "--save_precision", "bf16", *SHARDED, "--ema_decay", 0.5)
    entry = entry_of(desk.folder / "out" / "some.safetensors")
    assert entry.name == "some.safetensors.index.json"
    assert capsys.readouterr().err.rstrip().endswith(f"done: {entry}")
    header, parts = read_header(entry), dict(read_tensors(entry))
    assert header.shapes == dit_shapes() and header.metadata["ss_network_module"] == "networks.full"
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    shards = files_of(desk.folder / "out" / "some.safetensors")[:-1]
    assert len(shards) == 3 and all(shard.stat().st_size < 2_100_000 for shard in shards)
    assert entry_of(desk.folder / "out" / "some-ema.safetensors").name == "some-ema.safetensors.index.json"
    frames = desk.generate("from_index", entry)
    assert np.array_equal(frames, desk.generate("from_shard", shards[1]))
    assert np.array_equal(frames, desk.generate("from_one", desk.folder / "out" / "one.safetensors"))
    extraction = ("--base", desk.folder / DIT, "--tuned", entry, "--rank", 4)
    assert run(EXTRACT, [*map(str, extraction), "--output", str(desk.folder / "some_lora.safetensors")]) == 0
    assert (desk.folder / "some_lora.safetensors").is_file()


def test_diffusers_loads_both_and_computes_the_same(desk: Desk) -> None:
    desk.train("ours", "--save_precision", "bf16")
    desk.train("cut", "--save_precision", "bf16", *SHARDED)
    shapes = dit_shapes()
    dim = shapes["patch_embedding.weight"][0]
    config = WanTransformer3DModel(
        num_attention_heads=dim // 128,
        text_dim=shapes["text_embedding.0.weight"][1],
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_layers=2,
    )
    config.save_config(desk.folder / "config")
    path, parts = (
        desk.folder / "out" / "ours.safetensors",
        dict(read_tensors(desk.folder / "out" / "cut.safetensors.index.json")),
    )
    ours = load_dit(path).float().eval()
    ours.compute_dtype = torch.float32
    torch.manual_seed(0)
    latents, t, text = torch.randn(1, 16, 2, 8, 12), torch.tensor([500.0]), torch.randn(1, 512, config.config.text_dim)
    with torch.no_grad():
        wanted = ours(latents, t, text)
        for source in (str(path), parts):
            theirs = WanTransformer3DModel.from_single_file(source, config=str(desk.folder / "config")).float().eval()
            found = theirs(latents, t, text, return_dict=False)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_old_sets_go_as_a_whole(desk: Desk) -> None:
    desk.train("few", *SHARDED, "--save_every_n_steps", 1, "--save_last_n_steps", 2, "--ema_decay", 0.5)
    moments = {path.name.partition("-")[2][:12] for path in (desk.folder / "out").glob("few-step*")}
    assert moments == {"step00000003"}  # of the last two steps the other one is the end
    for name in ("few-step00000003", "few-step00000003-ema"):
        assert read_header(entry_of(desk.folder / "out" / f"{name}.safetensors")).shapes == dit_shapes()


def test_of_epochs_in_shards_as_many_stay_as_are_asked_for(desk: Desk) -> None:
    desk.train("ages", *SHARDED, "--max_train_epochs", 4, "--save_every_n_epochs", 1, "--save_last_n_epochs", 2)
    assert sorted(path.name for path in (desk.folder / "out").glob("ages-0*.index.json")) == KEPT
    for name in KEPT:
        assert read_header(desk.folder / "out" / name).shapes == dit_shapes()


def test_the_hub_gets_all_of_a_set_and_its_index_last(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Mock()
    monkeypatch.setattr(hub, "make_client", lambda token: client)
    desk.train("shared", "--save_precision", "bf16", *SHARDED, "--huggingface_repo_id", "me/tuned")
    sent = [call.kwargs["path_in_repo"] for call in client.upload_file.call_args_list]
    assert sent == [
        *(f"shared-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "shared.safetensors.index.json",
    ]


def test_each_expert_has_a_set_that_is_named_at_the_end(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    experts = ("--task", "t2v-A14B", "--dit_high_noise", desk.folder / DIT, "--expert_steps", 2)
    desk.train("two", *experts, *SHARDED)
    entries = [desk.folder / "out" / f"two_{part}.safetensors.index.json" for part in ("high_noise", "low_noise")]
    assert capsys.readouterr().err.rstrip().endswith("done: " + " and ".join(map(str, entries)))
    high, low = (dict(read_tensors(entry)) for entry in entries)
    assert high.keys() == low.keys() == dit_shapes().keys()
    assert any(not torch.equal(high[name], low[name]) for name in high)


def test_a_lora_of_the_same_name_is_what_its_run_names(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.train("again", *SHARDED)
    lora = ("--network_module", "networks.lora_wan", "--network_dim", 4)
    capsys.readouterr()
    desk.train("again", *lora)
    path = desk.folder / "out" / "again.safetensors"
    said = capsys.readouterr().err.rstrip()
    assert f"saved {path}\n" in said and said.endswith(f"done: {path}")


def test_no_room_for_a_set_ends_the_run_and_leaves_what_was_saved(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *others: Any) -> list[Path]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = 1_000_000 if "step00000002" in path.name else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return write_set(path, *others)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("wan_train.training.saving.checkpoints.write_set", full)
    out = desk.folder / "out"
    options = (*SHARDED, "--save_every_n_steps", 1, "--save_state")
    assert run(TRAIN, [str(word) for word in desk.training("tight", *options)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot write {out / 'tight-step00000002.safetensors'}: File too large" in said
    assert f"resume from {out / 'tight-step00000001-state'}" in said
    assert read_header(out / "tight-step00000001.safetensors.index.json").shapes == dit_shapes()
    assert not [path for path in out.iterdir() if path.name.startswith((".tight", "tight-step00000002"))]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--max_shard_size", "big"), "--max_shard_size 'big' is not a size"),
        (("--max_shard_size", "0GB"), "--max_shard_size '0GB' is not a size"),
        ((*SHARDED, "--network_module", "networks.lora_wan"), "--max_shard_size is for the checkpoints"),
    ],
    ids=["words", "nothing", "lora"],
)
def test_sizes_that_are_refused(
    desk: Desk, more: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(TRAIN, [str(word) for word in desk.training("no", *more)]) == 2
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(desk: Desk) -> None:
    options = (*SHARDED, "--save_every_n_steps", 1, "--save_state", "--save_last_n_steps", 2, "--max_train_steps", 8)
    options = (*options, "--full_bf16", "--fused_backward_pass", "--optimizer_type", "AdamW8bitSR", "--ema_decay", 0.5)
    desk.train("calm", *options)
    chance = random.Random(0)
    command = ["wan_train_network.py", *desk.training("hunted", *options, "--resume", "auto")]
    for _ in range(40):
        process = processes.start(*command)
        wait_for_saving(process, chance.randint(1, 3))
        time.sleep(chance.random() * 0.3)
        process.kill()
        for path in (desk.folder / "out").glob("hunted*.safetensors.index.json"):
            try:
                found = dict(read_tensors(path))
            except InputError as problem:
                assert "\n" not in str(problem)
            else:
                assert found.keys() == dit_shapes().keys()
        if process.returncode == 0:
            break
    processes.run(*command)
    for ending in ("", "-ema"):
        wanted, found = (
            dict(read_tensors(entry_of(desk.folder / "out" / f"{name}{ending}.safetensors")))
            for name in ("calm", "hunted")
        )
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not [path for path in (desk.folder / "out").iterdir() if path.name.startswith(".hunted")]


def wait_for_saving(process: processes.Started, count: int) -> None:
    """Wait until it has said `count` times that it saved, or has ended."""
    while process.poll() is None and process.said()[1].count("saved") < count:
        time.sleep(0.005)
