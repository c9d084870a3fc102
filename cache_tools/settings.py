"""Options of the two caching scripts."""

from dataclasses import dataclass

from dataset.settings import DatasetSettings
from wan_train.cli import Tool, option
from wan_train.errors import InputError
from wan_train.models.settings import CheckpointFolderSettings, ImageEncoderSettings, TextEncoderSettings, VaeSettings
from wan_train.models.variants import VARIANTS, ControlInputs, ImageInputs

_DEVICE_HELP = "Device to encode on, such as cuda or cpu; default: the first available accelerator."
_SKIP_HELP = "Accepted for compatibility: caches that are up to date are always kept, stale ones always recreated."
_KEEP_HELP = "Accepted for compatibility: caches are only deleted with --prune."
_PRUNE_HELP = "Delete caches that match nothing in the dataset config, and stale ones, which are then recreated."
SHOWN = ("image", "console", "video")
MADE = ("canny", "gray", "blur", "tile")
CONSOLE_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")  # in the order of ANSI


@dataclass(frozen=True)
class LatentRunSettings:
    """Encoding."""

    device: str = option("", _DEVICE_HELP)
    batch_size: int | None = option(
        None,
        "Maximum number of clips per VAE batch, limited by the dataset's batch_size; default: batch_size.",
        minimum=1,
    )
    num_workers: int = option(
        2,
        "Number of videos to decode ahead while the VAE encodes; 0 disables decoding ahead and uses the least memory.",
        minimum=0,
    )
    skip_existing: bool = option(False, _SKIP_HELP)
    keep_cache: bool = option(False, _KEEP_HELP)
    prune: bool = option(False, _PRUNE_HELP)


@dataclass(frozen=True)
class InspectSettings:
    """Inspection instead of caching."""

    plan: bool = option(
        False,
        "Print what would be cached: frame rates, clips and bucket of each file, and what is dropped. Needs no model.",
    )
    plan_json: str = option(
        "", "Write the output of --plan as JSON to this file; - prints it to stdout.", metavar="FILE"
    )
    debug_mode: str = option(
        "",
        "Show clips as they would be cached: as a contact sheet (image), in the terminal (console) or as mp4 (video).",
        choices=SHOWN,
    )
    debug_dir: str = option("cache_debug", "Output folder of --debug_mode image and video.")
    console_width: int = option(80, "Width of --debug_mode console in characters.", minimum=8)
    console_back: str = option("", "Colour of the border around --debug_mode console.", choices=CONSOLE_COLOURS)
    console_num_images: int | None = option(
        None, "Maximum number of clips per dataset to show with --debug_mode; default: all.", minimum=1
    )


@dataclass(frozen=True)
class MakeControlSettings:
    """Making control videos."""

    make_control: str = option(
        "",
        "Write a control for each video or image without one, to control_directory or a folder beside that of the"
        " media,"
        " then exit: Canny edges, greyscale, Gaussian blur, or the mean colours of 8x8-pixel tiles. Needs no model.",
        choices=MADE,
    )


@dataclass(frozen=True)
class ImageSettings:
    """Tasks with images."""

    task: str = option(
        "",
        "Task to cache conditions for: i2v and flf2v tasks add those of a clip's first, or first and"
        " last frame; fun and vace tasks those of controls, reference images, masks and camera paths.",
        choices=VARIANTS,
    )
    i2v: bool = option(False, "Cache the conditions of i2v tasks from each clip's first frame; implied by --clip.")
    one_frame: bool = option(
        False,
        "Cache images as one frame of several, at the temporal positions set by the dataset's fp_1f_clean_indices"
        " (controls) and fp_1f_target_index (the image itself).",
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
