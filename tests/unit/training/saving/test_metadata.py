import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import wan_train
from wan_train.cli import parse
from wan_train.models.fingerprint import fingerprint
from wan_train.training.saving.metadata import MINIMAL, RunFacts, saved_metadata, training_metadata
from wan_train.training.settings import TOOL

FACTS = RunFacts(3, 10, 5, 2, 10, 1, "bf16", '[{"num_train_items": 10}]', 1.5, 99)
NETWORK = {
    "ss_network_module": "networks.lora_wan",
    "ss_network_dim": "4",
    "ss_network_alpha": "1.0",
    "ss_network_dropout": "None",
    "ss_network_args": "{}",
}
# What loaders and model managers of the niche look for.
KNOWN = """
ss_session_id ss_training_started_at ss_output_name ss_learning_rate ss_num_train_items ss_num_batches_per_epoch
ss_num_epochs ss_gradient_checkpointing ss_gradient_checkpointing_cpu_offload ss_gradient_accumulation_steps
ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler ss_base_model_version ss_network_module ss_network_dim
ss_network_alpha ss_network_dropout ss_mixed_precision ss_seed ss_training_comment ss_optimizer ss_max_grad_norm
ss_fp8_base ss_full_fp16 ss_full_bf16 ss_weighting_scheme ss_logit_mean ss_logit_std ss_mode_scale ss_guidance_scale
ss_timestep_sampling ss_sigmoid_scale ss_discrete_flow_shift ss_datasets ss_network_args ss_sd_model_name ss_vae_name
ss_steps ss_epoch ss_training_finished_at
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "wan.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path)
    return path


def rows(base: Path, *more: str) -> dict[str, str]:
    required = ("--dit", str(base), "--dataset_config", "c", "--output_dir", "o", "--output_name", "n")
    settings: Any = parse(TOOL.settings, [*required, "--task", "t2v-1.3B", *more])
    return saved_metadata(settings, training_metadata(settings, FACTS, NETWORK), step=7, epoch=2)


def test_every_row_of_the_niche_is_there_as_text(base: Path) -> None:
    found = rows(base)
    assert set(KNOWN.split()) <= set(found)
    assert all(isinstance(value, str) for value in found.values())
    assert {"modelspec.sai_model_spec", "modelspec.architecture", "modelspec.date"} <= set(found)


def test_what_was_trained_on_what_is_told(base: Path) -> None:
    found = rows(base, "--min_timestep", "200", "--max_timestep", "900", "--logit_mean", "0.5", "--t5", "a/t5.pth")
    assert (found["ss_wan_task"], found["ss_sd_model_name"], found["ss_t5_name"]) == (
        "t2v-1.3B",
        "wan.safetensors",
        "t5.pth",
    )
    assert (found["ss_min_timestep"], found["ss_max_timestep"], found["ss_logit_mean"]) == ("200", "900", "0.5")
    assert found["modelspec.timestep_range"] == "200,900"
    assert json.loads(found["ss_library_versions"])["torch"].startswith(torch.__version__.split("+")[0])
    assert found["ss_wan_train_version"] == wan_train.__version__
    assert json.loads(found["ss_datasets"]) == [{"num_train_items": 10}]
    assert (found["ss_steps"], found["ss_epoch"]) == ("7", "2")


def test_no_secret_and_no_folder_gets_in(base: Path) -> None:
    text = json.dumps(rows(base, "--wandb_api_key", "k3y", "--huggingface_token", "t0ken"))
    assert "k3y" not in text and "t0ken" not in text and str(base.parent) not in text


def test_no_metadata_keeps_what_loading_needs(base: Path) -> None:
    assert set(rows(base, "--no_metadata")) == set(MINIMAL)


def test_a_fingerprint_is_of_the_file_and_not_of_its_place(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "other.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(base.read_bytes())
    assert fingerprint(str(copy)) == fingerprint(str(base)) == rows(base)["ss_base_fingerprint"]
    for tensors in (
        {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4, dtype=torch.bfloat16)},
    ):
        save_file(tensors, copy)
        assert fingerprint(str(copy)) != fingerprint(str(base))
