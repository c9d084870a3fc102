"""Options of the two caching scripts."""

from dataclasses import dataclass

from dataset.settings import DatasetSettings
from wan_train.cli import Tool, option
from wan_train.errors import InputError
from wan_train.models.settings import CheckpointFolderSettings, ImageEncoderSettings, TextEncoderSettings, VaeSettings
from wan_train.models.variants import VARIANTS, ControlInputs, ImageInputs

_DEVICE_HELP = "Device to encode on, such as cuda or cpu; default: the first accelerator, else the CPU."
_SKIP_HELP = "Accepted for compatibility: up-to-date caches are always kept, and stale ones are always replaced."
_KEEP_HELP = "Accepted for compatibility: nothing is deleted without --prune."
_PRUNE_HELP = "Delete caches that belong to no item of the dataset; stale ones are deleted and cached again."
SHOWN = ("image", "console", "video")
MADE = ("canny", "gray", "blur", "tile")
CONSOLE_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")  # in the order of ANSI


@dataclass(frozen=True)
class LatentRunSettings:
    """Encoding."""

    device: str = option("", _DEVICE_HELP)
    batch_size: int | None = option(
        None, "Maximum number of clips per VAE call, limited by the dataset's batch_size.", minimum=1
    )
    num_workers: int = option(
        2,
        "Number of videos decoded ahead while the VAE encodes; 0 decodes in the main process and uses the "
        "least memory.",
        minimum=0,
    )
    skip_existing: bool = option(False, _SKIP_HELP)
    keep_cache: bool = option(False, _KEEP_HELP)
    prune: bool = option(False, _PRUNE_HELP)


@dataclass(frozen=True)
class InspectSettings:
    """Inspection instead of caching."""

    plan: bool = option(
        False, "Print what would be cached, without a model: frame rates, clips, buckets, and what is dropped and why."
    )
    plan_json: str = option("", "Write the output of --plan to this JSON file; - writes to stdout.", metavar="FILE")
    debug_mode: str = option(
        "",
        "Show each clip as it would be cached: as an image of all frames, in the terminal, or as an mp4.",
        choices=SHOWN,
    )
    debug_dir: str = option("cache_debug", "Output folder for --debug_mode image and video.")
    console_width: int = option(80, "Width of --debug_mode console, in characters.", minimum=8)
    console_back: str = option("", "Color of the border around --debug_mode console.", choices=CONSOLE_COLOURS)
    console_num_images: int | None = option(
        None, "Maximum number of clips shown per dataset with --debug_mode; default: all.", minimum=1
    )


@dataclass(frozen=True)
class MakeControlSettings:
    """Making control videos."""

    make_control: str = option(
        "",
        "Write a control video or image for each media file that has none, into control_directory or a folder"
        " next to the media, and exit: edges, grayscale, blurred or tiled. Needs no model.",
        choices=MADE,
    )


@dataclass(frozen=True)
class ImageSettings:
    """Tasks with images."""

    task: str = option(
        "",
        "Task to cache for: i2v and flf2v tasks also cache the first, or first and last frame; fun and vace "
        "tasks also cache controls, reference images, masks and camera paths.",
        choices=VARIANTS,
    )
    i2v: bool = option(False, "Cache the first frame of each clip for i2v tasks; implied by --clip.")
    one_frame: bool = option(
        False,
        "Cache images for one-frame training; fp_1f_clean_indices and fp_1f_target_index of the dataset give "
        "the temporal positions of the control and target images.",
    )


@dataclass(frozen=True)
class TextRunSettings:
    """Encoding."""

    device: str = option("", _DEVICE_HELP)
    batch_size: int = option(4, "Number of captions per text encoder batch.", minimum=1)
    skip_existing: bool = option(False, _SKIP_HELP)
    keep_cache: bool = option(False, _KEEP_HELP)
    prune: bool = option(False, _PRUNE_HELP)


@dataclass(frozen=True)
class CacheLatentsSettings:
    """All options of `wan_cache_latents.py`."""

    dataset: DatasetSettings
    folder: CheckpointFolderSettings
    vae: VaeSettings
    image: ImageEncoderSettings
    images: ImageSettings
    run: LatentRunSettings
    inspect: InspectSettings
    controls: MakeControlSettings


@dataclass(frozen=True)
class CacheTextSettings:
    """All options of `wan_cache_text_encoder_outputs.py`."""

    dataset: DatasetSettings
    folder: CheckpointFolderSettings
    text_encoder: TextEncoderSettings
    run: TextRunSettings


def check_run(run: LatentRunSettings | TextRunSettings) -> None:
    """Raise InputError for contradictory options."""
    if run.keep_cache and run.prune:
        raise InputError("--keep_cache and --prune contradict each other: use one of them")


def control_inputs(settings: CacheLatentsSettings) -> ControlInputs | None:
    """Return the conditions other than images to cache; None: task unknown."""
    task, one_frame = settings.images.task, settings.images.one_frame
    if not task or one_frame:  # one_frame uses the images of a control_directory differently
        return VARIANTS[task].control if task else None
    return VARIANTS[task].control or ControlInputs()


def image_inputs(settings: CacheLatentsSettings) -> ImageInputs | None:
    """Return the images to cache conditions of. Raises InputError for contradictory options.

    `--clip` may be missing if a start image is optional for the model: then the dataset config decides.
    """
    task, clip, i2v = settings.images.task, bool(settings.image.clip), settings.images.i2v
    if not task:
        return ImageInputs(clip=clip) if i2v or clip else None
    images = VARIANTS[task].images
    if images is None and (i2v or clip):
        flag = "--i2v" if i2v else "--clip"
        raise InputError(f"{flag}: --task {task} does not take images: remove one of the two")
    if clip and not VARIANTS[task].reads_clip:
        raise InputError(f"--clip: --task {task} does not use CLIP: remove it")
    looking = settings.inspect.plan or settings.inspect.plan_json or settings.inspect.debug_mode
    if images is not None and images.clip and not images.optional and not clip and not looking:
        raise InputError(
            f"--clip is missing: --task {task} also reads its images through CLIP; give"
            " models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        )
    return images


LATENTS_TOOL = Tool(
    "wan_cache_latents.py",
    "Encode the videos and images of a dataset config with the VAE and cache their latents for training.",
    CacheLatentsSettings,
    "cache_tools.cache_latents:main",
)
TEXT_TOOL = Tool(
    "wan_cache_text_encoder_outputs.py",
    "Encode the captions of a dataset config with the text encoder and cache their embeddings for training.",
    CacheTextSettings,
    "cache_tools.cache_text_encoder_outputs:main",
)
