"""What control models are given of a batch, what goes without it, and what they learn to make."""

from dataclasses import replace

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey
from wan_train.conditions.vace import num_references
from wan_train.models.variants import VARIANTS
from wan_train.training.objective.conditioning import Dropped, Rates, conditions_of, drop
from wan_train.training.objective.loss import draw
from wan_train.training.objective.target import target_of
from wan_train.training.settings import TimestepSettings

CPU = torch.device("cpu")
FUN, VACE = VARIANTS["fun-control-1.3B"], VARIANTS["vace-1.3B"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(weights: Tensor | None = None, **extras: Tensor) -> Batch:
    keys = (SampleKey("a", 0), SampleKey("b", 0))
    texts = [torch.zeros(3, 8), torch.zeros(3, 8)]
    return Batch(keys, drawn(2, 16, 3, 4, 6, seed=0), texts, weights=weights, extras=extras)


def fun(*names: str) -> Batch:
    every = {
        "control_latents": drawn(2, 16, 3, 4, 6, seed=1),
        "start_latents": drawn(2, 16, 1, 4, 6, seed=2),
        "reference_latents": drawn(2, 16, 1, 4, 6, seed=3),
        "clip_features": drawn(2, 257, 8, seed=4),
    }
    return batch(**{name: every[name] for name in names})


def test_each_kind_is_dropped_by_itself() -> None:
    whole = fun("control_latents", "start_latents", "reference_latents", "clip_features")
    second = [False, True]
    plain = conditions_of(whole, FUN, CPU).extras
    for dropped, gone in (
        (Dropped(images=second), {"start"}),
        (Dropped(control=second), {"control"}),
        (Dropped(reference=second), {"reference", "clip"}),  # CLIP saw the reference
    ):
        found = conditions_of(whole, FUN, CPU, dropped=dropped).extras
        parts = {
            "control": found["image_latents"][:, :16],
            "start": found["image_latents"][:, 16:],
            "reference": found["reference_latents"],
            "clip": found["clip_features"],
        }
        assert {name for name, part in parts.items() if not part[1].any()} == gone
        assert all(torch.equal(found[name][0], plain[name][0]) for name in plain)


def test_without_a_reference_clip_goes_with_the_start_image() -> None:
    some = fun("control_latents", "start_latents", "clip_features")
    found = conditions_of(some, FUN, CPU, dropped=Dropped(images=[True, False], reference=[False, True])).extras
    assert not found["clip_features"][0].any() and found["clip_features"][1].any()


def test_a_batch_without_some_kinds_has_zeros_for_them() -> None:
    found = conditions_of(fun("control_latents"), FUN, CPU, dropped=Dropped([True] * 2, [False] * 2, [True] * 2)).extras
    assert set(found) == {"image_latents"} and not found["image_latents"][:, 16:].any()


def vace(num_before: int, *, mask: float = 1.0) -> Tensor:
    context = drawn(2, 96, num_before + 3, 4, 6, seed=5)
    context[:, 16:, :num_before] = 0
    context[:, 32:, num_before:] = mask
    return context


def test_a_dropped_vace_video_is_grey_where_its_latents_are_known() -> None:
    """With a mask they are not, even if all that is packed of it is white: the first frame may be black."""
    context = vace(2)
    for masked, is_known in (((), True), ((False, True), True), ((True, False), False)):
        given = replace(batch(vace_context=context), has_vace_mask=masked)
        found = conditions_of(given, VACE, CPU, dropped=Dropped(control=[True, False])).extras["vace_context"]
        assert torch.equal(found[1], context[1]) and torch.equal(found[0, :, :2], context[0, :, :2])
        grey = context[0, :16, 2:] if is_known else torch.zeros(16, 3, 4, 6)
        assert torch.equal(found[0, :32, 2:], torch.cat([grey, grey])) and bool((found[0, 32:, 2:] == 1).all())


def test_dropped_vace_references_are_zeros_and_the_video_stays() -> None:
    context = vace(2)
    found = conditions_of(batch(vace_context=context), VACE, CPU, dropped=Dropped(reference=[False, True])).extras
    assert not found["vace_context"][1, :, :2].any()
    assert torch.equal(found["vace_context"][:, :, 2:], context[:, :, 2:])


def test_the_target_of_vace_begins_with_its_references() -> None:
    """Noise is drawn for all of it, and their weights are 1 beside those of a loss mask."""
    for num_before in (0, 1, 2):
        weights = torch.full((2, 1, 3, 4, 6), 0.5)
        given = batch(weights, vace_context=vace(num_before))
        target = target_of(given)
        assert target.latents.shape == (2, 16, num_before + 3, 4, 6) and target.weights is not None
        assert torch.equal(target.latents[:, :, :num_before], given.extras["vace_context"][:, :16, :num_before])
        assert torch.equal(target.latents[:, :, num_before:], given.latents)
        assert bool((target.weights[:, :, :num_before] == 1).all())
        assert torch.equal(target.weights[:, :, num_before:], weights)
        noise = draw(given.keys, target.latents.shape[1:], TimestepSettings(), seed=1, epoch=1).noise
        assert noise.shape == target.latents.shape
        assert num_references(given.extras["vace_context"], given.latents) == num_before


def test_drops_are_drawn_by_key_and_independently() -> None:
    keys = [SampleKey(f"clip {number}", 0) for number in range(2000)]
    found = drop(keys, Rates(0.5, 0.25, 0.1), seed=3, epoch=2)
    again = drop(keys[::-1], Rates(0.5, 0.25, 0.1), seed=3, epoch=2)
    rows = torch.tensor([found.images, found.control, found.reference]).float()
    assert [list(row) for row in (again.images, again.control, again.reference)] == [
        list(row)[::-1] for row in (found.images, found.control, found.reference)
    ]
    torch.testing.assert_close(rows.mean(1), torch.tensor([0.5, 0.25, 0.1]), atol=0.04, rtol=0)
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 0.08
