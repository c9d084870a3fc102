"""The kinds of conditions: what a DiT may read of a sample in addition to its noisy latents and its text.

`conditions.control.dit_arguments` converts them to arguments of `Dit.forward`; most need no conversion.

To add one, add a row to `KINDS`, a function that builds it for caching and the generator, and a row to
`dataset.caching.extras`. Batches, conditions and the cache reader use the table.
"""

from dataclasses import dataclass

IMAGE_LATENTS, CLIP_FEATURES, FRAME_POSITIONS = "image_latents", "clip_features", "frame_positions"
CONTROL_LATENTS, START_LATENTS, REFERENCE = "control_latents", "start_latents", "reference_latents"
CAMERA, VACE_CONTEXT, MOTION = "camera", "vace_context", "motion_bucket_id"


@dataclass(frozen=True)
class ConditionKind:
    """A kind of condition.

    `name` is the argument of `Dit.forward`, or a part of one, `key` the key in the cache file and `mirrored_key` that
    of the mirrored clip, if mirroring changes it. `is_joined`: all axes but the last are flattened, which concatenates
    the tokens of several images. `is_shared`: all samples of a batch share it, and it stays on the CPU. `is_dropped`:
    it is zero where a sample drops its images; control and reference are dropped separately.
    """

    name: str
    key: str
    mirrored_key: str = ""
    is_joined: bool = False
    is_shared: bool = False
    is_dropped: bool = True

    def key_of(self, *, flipped: bool) -> str:
        """Return the key of the clip or its mirrored version."""
        return self.mirrored_key if flipped and self.mirrored_key else self.key


_ROWS = (
    # (B, 4+C, F, H, W): the mask of given frames, then their latents.
    ConditionKind(IMAGE_LATENTS, "latents_image", "latents_image_flipped"),
    # (B, I, width): the CLIP tokens of all images, concatenated.
    ConditionKind(CLIP_FEATURES, "clip", "clip_flipped", is_joined=True),
    # (F,): temporal positions of the frames if not consecutive; they become rotary angles on the CPU.
    ConditionKind(FRAME_POSITIONS, "f_indices", is_shared=True, is_dropped=False),
    # (B, C, F, H, W): a control video.
    ConditionKind(CONTROL_LATENTS, "latents_control", "latents_control_flipped", is_dropped=False),
    # (B, C, 1, H, W): the first frame alone, for models that read it without a mask.
    ConditionKind(START_LATENTS, "latents_start", "latents_start_flipped"),
    # (B, C, 1, H, W): a reference image.
    ConditionKind(REFERENCE, "latents_reference", "latents_reference_flipped", is_dropped=False),
    # (B, N, 19): the camera at each of N pixel frames, in RealEstate10K format.
    ConditionKind(CAMERA, "camera", "camera_flipped", is_dropped=False),
    # (B, 96, R+F, H, W): R reference images, then inactive and reactive latents and the mask.
    ConditionKind(VACE_CONTEXT, "vace_context", "vace_context_flipped", is_dropped=False),
    # (B,): from 0 (slow) to 100 (fast).
    ConditionKind(MOTION, "motion_bucket", is_dropped=False),
)
KINDS = {kind.name: kind for kind in _ROWS}
