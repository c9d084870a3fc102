"""Encode every clip described by a dataset config and store its latents beside it, or in its cache folder."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import wan_train
from cache_tools.encoding import LatentEncoder, LoadedClip, batch_clips, encode_batch, name_clip
from cache_tools.extras import load_extras
from cache_tools.fitting import encode_fitting
from cache_tools.make_control import make_controls
from cache_tools.plan import show_plan
from cache_tools.runner import rank_device, summarise_run, work_ahead
from cache_tools.settings import CacheLatentsSettings, check_run, control_inputs, image_inputs
from cache_tools.show import show_clips
from cache_tools.survey import Survey, clear_remains, count_kinds, prune_caches, report_findings, survey_caches
from dataset.batching.buckets import describe_size
from dataset.caching.cache import latents_path
from dataset.caching.extras import WANTED
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import take_fingerprint
from dataset.caching.staleness import latents_state
from dataset.config import DatasetConfig, read_config
from dataset.items import Clip, Item
from dataset.reading.media import load_clips
from dataset.reading.probes import note_broken
from dataset.settings import DatasetSettings
from dataset.sources import ClipPlan, list_items, name_some, plan_clips, warn_too_short
from wan_train.conditions.kinds import CLIP_FEATURES
from wan_train.distributed.ranks import Place, find_place
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.encoders.image import check_image_encoder
from wan_train.models.vae.vae import check_vae
from wan_train.models.variants import VARIANTS, WAN21
from wan_train.precision import dtype_of
from wan_train.sampling.decode import set_up
from wan_train.sampling.encode import open_image_encoder
from wan_train.storage import check_writable

logger = get_logger(__name__)


def main(settings: CacheLatentsSettings) -> None:
    """Check everything, then encode what is missing; if nothing is missing, no model is loaded."""
    check_run(settings.run)
    if settings.controls.make_control:
        make_controls(settings.dataset, settings.controls.make_control)
        return
    images = image_inputs(settings)
    task, one_frame = settings.images.task, settings.images.one_frame
    space = VARIANTS[task].space if task else WAN21
    configs = read_config(
        settings.dataset.dataset_config,
        images=images,
        control=control_inputs(settings),
        space=space,
        one_frame=one_frame,
    )
    if settings.inspect.plan or settings.inspect.plan_json:
        show_plan(make_plans(configs, settings.dataset), settings.inspect.plan_json)
        return
    if settings.inspect.debug_mode:
        show_clips(make_plans(configs, settings.dataset), settings.inspect)
        return
    if not settings.vae.vae:
        raise InputError(f"--vae is missing: give the VAE file, such as {space.vae_file}")
    check_vae(settings.vae.vae, latent_channels=space.channels)
    if settings.image.clip:
        check_image_encoder(settings.image.clip)
    place = find_place()
    for config in configs:
        check_writable(config.cache_directory)
        clear_remains(config)
    plans = make_plans(configs, settings.dataset)
    _check_clip(plans, settings)
    surveys = [survey_plan(plan, settings, place) for plan in plans]
    for survey in surveys:
        (prune_caches if settings.run.prune else report_findings)(survey)
    encoded = _encode(surveys, settings, place) if any(survey.due for survey in surveys) else []
    warn_too_short(plans)
    num_too_short = sum(len(plan.too_short) for plan in plans)
    undecodable = {clip.item for survey in surveys for clip in survey.due} - {clip.item for clip in encoded}
    num_broken = sum(len(plan.broken) for plan in plans) + len(undecodable)
    summarise_run(
        "latents",
        count_kinds(surveys),
        place,
        num_encoded=len(encoded),
        left_out={"too short": num_too_short, "broken": num_broken},
    )


def make_plans(configs: Sequence[DatasetConfig], settings: DatasetSettings) -> list[ClipPlan]:
    """Return the plan of each dataset, from the headers of its files."""
    allowed, skip_broken = settings.allow_missing_captions, settings.skip_broken
    return [
        plan_clips(config, list_items(config, allow_missing_captions=allowed), skip_broken=skip_broken)
        for config in configs
    ]


def _check_clip(plans: Sequence[ClipPlan], settings: CacheLatentsSettings) -> None:
    """Raise InputError if images are read through CLIP without `--clip`; log the files that have no such image."""
    for plan in plans:
        images = plan.config.images
        if images is None or not images.clip:
            continue
        seen = [item.path.name for item in plan.items if _sees(item)]
        if seen and not settings.image.clip:
            raise InputError(
                f"{plan.config}: --clip is missing: --task {settings.images.task} reads the start or reference images"
                f" of {len(seen)} files through CLIP ({name_some(seen)}); give"
                " models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
            )
        if len(seen) < len(plan.items):
            without = len(plan.items) - len(seen)
            logger.info(
                "%s: %d files have no start or reference image and are cached without CLIP tokens", plan.config, without
            )


def _sees(item: Item) -> bool:
    return WANTED[CLIP_FEATURES](item)


def survey_plan(plan: ClipPlan, settings: CacheLatentsSettings, place: Place) -> Survey[Clip]:
    """Return the state of a dataset's caches and the clips that this process has to encode."""
    mine = set(place.share(plan.items))
    dtype, model = dtype_of(settings.vae.vae_dtype), Path(settings.vae.vae)
    seen = Path(settings.image.clip) if settings.image.clip else None
    return survey_caches(
        plan.config,
        [clip for clip in plan.clips if clip.item in mine],
        lambda clip, manifest: latents_state(clip, manifest, dtype=dtype, model=model, image_model=seen),
        planned=[latents_path(clip) for clip in plan.clips],
        place=place,
    )


def _encode(surveys: Sequence[Survey[Clip]], settings: CacheLatentsSettings, place: Place) -> list[Clip]:
    """Encode the missing clips; return those that were encoded."""
    device, dtype = rank_device(settings.run.device, place), dtype_of(settings.vae.vae_dtype)
    sees = any(_sees(clip.item) for survey in surveys for clip in survey.due)
    encoder = _open_encoder(surveys[0].config, settings, device, dtype, sees=sees)
    num_due = sum(len(survey.due) for survey in surveys)
    num_kept = sum(len(survey.states) for survey in surveys) - num_due
    encoded: list[Clip] = []
    broken: list[Clip] = []
    with tqdm(desc="latents", total=num_due, unit="clip", postfix={"kept": num_kept}) as bar:
        for survey in surveys:
            config = survey.config
            logger.info("%s: %s", config, _describe(survey.due, num_all=len(survey.states)))
            batch_size = min(config.batch_size, settings.run.batch_size or config.batch_size)
            with Manifest(config.cache_directory) as manifest:
                skipped = broken if settings.dataset.skip_broken else None
                loaded = _load(survey.due, manifest, settings.run.num_workers, skipped=skipped)
                for batch in batch_clips(loaded, batch_size):
                    encode_fitting(encoder.vae, batch, functools.partial(encode_batch, encoder), name=name_clip)
                    encoded += [one.clip for one in batch]
                    bar.set_postfix(kept=num_kept, skipped=len(broken), refresh=False)
                    bar.update(len(batch))
    return encoded


def _open_encoder(
    config: DatasetConfig, settings: CacheLatentsSettings, device: torch.device, dtype: torch.dtype, *, sees: bool
) -> LatentEncoder:
    with Manifest(config.cache_directory) as manifest:
        model = take_fingerprint(Path(settings.vae.vae), manifest)
        image_model = take_fingerprint(Path(settings.image.clip), manifest) if sees else None
    vae = set_up(wan_train.load_vae(settings.vae.vae, device=device, dtype=dtype), settings.vae)
    images = open_image_encoder(settings.image, device) if sees else None
    return LatentEncoder(vae, model, device, dtype, images, image_model)


def _load(
    clips: Sequence[Clip], manifest: Manifest, num_workers: int, *, skipped: list[Clip] | None
) -> Iterator[LoadedClip]:
    """Yield the frames of clips, sorted by size; all clips of one item come from one decode.

    If `skipped` is a list, items that cannot be decoded are logged and their clips appended to it.
    """
    by_item: dict[Item, list[Clip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.size):
        by_item.setdefault(clip.item, []).append(clip)

    def load(group: Sequence[Clip]) -> list[LoadedClip]:
        path = group[0].item.path
        try:
            # Before reading the images, so that a file modified in between is recognised as stale.
            source = take_fingerprint(path, manifest, group[0].reading)
            images = load_clips(group)
        except OSError as problem:
            raise InputError(f"{path} cannot be read: {problem.strerror or problem}") from None
        except InputError as problem:
            if skipped is None:
                raise
            skipped.extend(group)
            note_broken(manifest, path, problem)
            logger.warning("skipped: %s", problem)
            return []
        extras = load_extras(group, manifest)
        return [LoadedClip(clip, its, source, beside) for clip, its, beside in zip(group, images, extras, strict=True)]

    for loaded in work_ahead(load, list(by_item.values()), num_workers):
        yield from loaded


def _describe(clips: Sequence[Clip], *, num_all: int) -> str:
    buckets = Counter((clip.size, clip.num_frames) for clip in clips)
    shown = [f"{describe_size(size)}, {frames} frames: {count}" for (size, frames), count in sorted(buckets.items())]
    return f"{len(clips)} of {num_all} clips to encode{' (' * bool(shown)}{'; '.join(shown)}{')' * bool(shown)}"
