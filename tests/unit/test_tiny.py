"""The tiny model is a small one of the official kind, the same everywhere, and its clips show what they say."""

import hashlib
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.tiny import make


def fingerprint(shapes: make.Shapes) -> str:
    """DiffSynth-Studio's: MD5 over the sorted names, each with and without its shape."""
    words = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()] + list(shapes)
    return hashlib.md5(",".join(sorted(words)).encode()).hexdigest()


@pytest.mark.parametrize(
    ("shapes", "published"),
    [
        (make.dit_shapes(dim=1536, ffn_dim=8960, num_layers=30, text_dim=4096), "9269f8db9040a9d860eaca435be61814"),
        (make.dit_shapes(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096), "aafcfd9672c3a2456dc46e1cb6e52c70"),
        (make.vae_shapes(96), "ccc42284ea13e1ad04693284c7a09be6"),
        (
            make.t5_shapes(256384, dim=4096, ffn_dim=10240, num_layers=24, num_heads=64),
            "9c8818c2cbea55eca56c7b447df170da",
        ),
    ],
    ids=["t2v-1.3B", "t2v-14B", "vae", "umt5-xxl"],
)
def test_names_and_shapes_are_the_official_ones(shapes: make.Shapes, published: str) -> None:
    assert fingerprint(shapes) == published


def test_weights_depend_on_their_name_alone() -> None:
    torch.manual_seed(1)
    first = make.draw_weight("blocks.0.ffn.0.weight", (8, 4))
    torch.manual_seed(2)
    assert torch.equal(first, make.draw_weight("blocks.0.ffn.0.weight", (8, 4)))
    assert not torch.equal(first, make.draw_weight("blocks.1.ffn.0.weight", (8, 4)))


def test_the_folder_is_complete_and_small(tmp_path: Path) -> None:
    make.make(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 16e6
    dit = load_file(tmp_path / make.DIT)
    assert {tensor.dtype for tensor in dit.values()} == {torch.bfloat16}
    assert all(tensor.abs().max() > 0 for tensor in dit.values())

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / make.TOKENIZER)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer(["a red circle", "过曝, jpeg"], padding=True)["input_ids"]
    assert max(max(row) for row in ids) < load_file(tmp_path / make.T5)["token_embedding.weight"].shape[0]
    assert [row[-1] if 0 not in row else row[row.index(0) - 1] for row in ids] == [1, 1]
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "过曝, jpeg"


def test_the_shape_of_a_clip_moves_as_its_caption_says(tmp_path: Path) -> None:
    paths = make.draw_clips(tmp_path, num_frames=20)
    assert [path.with_suffix(".txt").read_text().strip() for path in paths] == list(make.SCENES)
    with av.open(str(paths[0])) as file:
        assert file.streams.video[0].average_rate == 16
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")).float() for frame in file.decode(video=0)]
    assert len(frames) == 20
    assert frames[0].shape == (64, 96, 3)
    redness = [(frame[..., 0] - frame[..., 1]).clamp(min=60).sub(60).sum(0) for frame in frames]
    columns = torch.arange(96.0)
    centres = [float((red * columns).sum() / red.sum()) for red in redness]
    assert centres == sorted(centres)
    assert centres[-1] - centres[0] > 40
