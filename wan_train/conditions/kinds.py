"""The kinds of conditions: what a DiT may read of a sample beside its noisy latents and its text.

`conditions.control.dit_arguments` makes the arguments of `Dit.forward` of them: most are one as they are.

A new one is a row of `KINDS`, a function that builds it for the cache and the generator, and a row of what wants it in
`dataset.caching.extras`. Batches, conditions and the reader of caches go through the table.
"""

from dataclasses import dataclass

IMAGE_LATENTS, CLIP_FEATURES, FRAME_POSITIONS = "image_latents", "clip_features", "frame_positions"
CONTROL_LATENTS, START_LATENTS, REFERENCE = "control_latents", "start_latents", "reference_latents"
CAMERA, VACE_CONTEXT, MOTION = "camera", "vace_context", "motion_bucket_id"


@dataclass(frozen=True)
class ConditionKind:
    """A kind of condition.

    `name` is the argument of `Dit.forward`, or that of a part of one, `key` that of the tensor in the cache file and
    `mirrored_key` that of the mirrored clip's, where mirroring changes it. `is_joined`: all axes but the last become
    one, as the tokens of several images follow one another. `is_shared`: all samples of a batch have the same, which
    stays on the CPU. `is_dropped`: zeros stand for it where a sample goes without its images.
    """

    name: str
    key: str
    mirrored_key: str = ""
    is_joined: bool = False
    is_shared: bool = False
    is_dropped: bool = True

    def key_of(self, *, flipped: bool) -> str:
        """The key of the clip, or of the mirrored one."""
        return self.mirrored_key if flipped and self.mirrored_key else self.key


_ROWS = (
    # (B, 4+C, F, H, W): a mask of what is given, then the latents of that.
    ConditionKind(IMAGE_LATENTS, "latents_image", "latents_image_flipped"),
    # (B, I, width): CLIP's tokens of each image, behind one another.
    ConditionKind(CLIP_FEATURES, "clip", "clip_flipped", is_joined=True),
    # (F,): where the frames are in time, if not one after the other; they become angles on the CPU.
    ConditionKind(FRAME_POSITIONS, "f_indices", is_shared=True, is_dropped=False),
    # (B, C, F, H, W): a control video.
    ConditionKind(CONTROL_LATENTS, "latents_control", "latents_control_flipped"),
    # (B, C, 1, H, W): the first frame by itself, of models that read it without a mask.
    ConditionKind(START_LATENTS, "latents_start", "latents_start_flipped"),
    # (B, C, 1, H, W): a reference image.
    ConditionKind(REFERENCE, "latents_reference", "latents_reference_flipped"),
    # (B, N, 19): the camera at each of N pixel frames, as RealEstate10K writes it.
    ConditionKind(CAMERA, "camera", "camera_flipped", is_dropped=False),
    # (B, 96, R+F, H, W): R reference images, then inactive and reactive latents and the mask.
    ConditionKind(VACE_CONTEXT, "vace_context", "vace_context_flipped"),
    # (B,): 0 slow to 100 fast.
    ConditionKind(MOTION, "motion_bucket", is_dropped=False),
)
KINDS = {kind.name: kind for kind in _ROWS}
