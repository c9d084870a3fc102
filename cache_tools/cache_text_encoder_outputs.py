"""Encode every caption described by a dataset config and store its embedding in the cache folder."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import wan_train
from cache_tools.runner import rank_device, summarise_run
from cache_tools.settings import CacheTextSettings, check_run
from cache_tools.survey import Survey, clear_remains, count_kinds, prune_caches, report_findings, survey_caches
from dataset.caching.cache import save_text, text_names, text_path
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import Recipe, take_fingerprint
from dataset.caching.staleness import text_state
from dataset.config import DatasetConfig, read_config
from dataset.items import Item
from dataset.sources import list_items, name_some
from wan_train.distributed.ranks import Place, find_place
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.encoders.text import check_text_encoder
from wan_train.models.variants import TEXT_LENGTH
from wan_train.precision import name_of, published_dtype
from wan_train.storage import check_writable

logger = get_logger(__name__)

_STRETCH = 16  # number of batches whose texts are sorted together


def main(settings: CacheTextSettings) -> None:
    """Check everything, then encode what is missing; if nothing is missing, no model is loaded."""
    check_run(settings.run)
    configs = read_config(settings.dataset.dataset_config)
    source, tokenizer = settings.text_encoder.t5, settings.text_encoder.tokenizer or "auto"
    if not source:
        raise InputError("--t5 is missing: give the text encoder file, such as models_t5_umt5-xxl-enc-bf16.pth")
    check_text_encoder(source, tokenizer)
    place = find_place()
    device = rank_device(settings.run.device, place)
    for config in configs:
        check_writable(config.cache_directory)
        clear_remains(config)
    surveys = [survey_items(config, settings, place) for config in configs]
    for survey in surveys:
        (prune_caches if settings.run.prune else report_findings)(survey)
    due = [item for survey in surveys for item in survey.due]
    if due:
        with Manifest(configs[0].cache_directory) as manifest:
            model = take_fingerprint(Path(source), manifest)
        dtype, fp8 = published_dtype(device), settings.text_encoder.fp8_t5
        encoder = wan_train.load_text_encoder(source, tokenizer=tokenizer, device=device, dtype=dtype, fp8=fp8)
        if encoder.tokenizer is not None:
            warn_cut(due, encoder.tokenizer.find_cut)
        with tqdm(desc="captions", total=len(due), unit="file") as bar:
            for item, embeddings in encode_items(encoder, due, settings.run.batch_size):
                save_text(item, embeddings, Recipe(model, name_of(torch.bfloat16)))
                bar.update()
    summarise_run("captions", count_kinds(surveys), place, num_encoded=len(due))


def survey_items(config: DatasetConfig, settings: CacheTextSettings, place: Place) -> Survey[Item]:
    """Return the state of a dataset's text caches and the items that this process has to encode."""
    # Other conditions do not matter here, and which of them are optional depends on the task.
    items = list_items(config, allow_missing_captions=settings.dataset.allow_missing_captions, with_partners=False)
    model = Path(settings.text_encoder.t5)
    return survey_caches(
        config,
        place.share(items),
        lambda item, manifest: text_state(item, manifest, model=model),
        planned=[text_path(item) for item in items],
        place=place,
        is_text=True,
    )


def warn_cut(items: Sequence[Item], find_cut: Callable[[Collection[str]], set[str]]) -> None:
    """Warn once about the files with a caption that the text encoder truncates."""
    cut = find_cut({text for item in items for text in item.captions})
    if cut:
        names = [item.path.name for item in items if not cut.isdisjoint(item.captions)]
        told = "%d of %d captions are longer than %d tokens and will be truncated (%s)"
        logger.warning(told, len(names), len(items), TEXT_LENGTH, name_some(names))


def encode_items(
    encoder: Callable[[list[str]], Sequence[Tensor]], items: Sequence[Item], batch_size: int
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Yield each item with the embeddings of its texts once all are available; shared texts are encoded once.

    An embedding is released when no further item needs it.
    """
    lacking = [set(text_names(item).values()) for item in items]
    uses = Counter(text for texts in lacking for text in texts)
    sharing: dict[str, list[int]] = defaultdict(list)
    for index, texts in enumerate(lacking):
        for text in texts:
            sharing[text].append(index)
    known: dict[str, Tensor] = {}
    for batch in batch_texts(items, batch_size):
        with torch.no_grad():
            known |= {text: found.cpu() for text, found in zip(batch, encoder(batch), strict=True)}
        for done, index in ((text, index) for text in batch for index in sharing[text]):
            lacking[index].remove(done)
            if not lacking[index]:
                texts = set(text_names(items[index]).values())
                yield items[index], {text: known[text] for text in texts}
                uses.subtract(texts)
                for last in (text for text in texts if not uses[text]):
                    del known[last]


def batch_texts(items: Sequence[Item], batch_size: int) -> list[list[str]]:
    """Return the distinct texts of items in batches of similar length, to reduce padding.

    All texts of an item lie within a short stretch, so that few embeddings are held for incomplete items.
    """
    per_item = [list(text_names(item).values()) for item in items]
    ordered = sorted(per_item, key=lambda texts: max(map(len, texts)))
    distinct = list(dict.fromkeys(text for texts in ordered for text in texts))
    stretches = split(distinct, _STRETCH * batch_size)
    return [batch for stretch in stretches for batch in split(sorted(stretch, key=len), batch_size)]


def split(texts: list[str], size: int) -> list[list[str]]:
    """Return a list in chunks of `size`; the last may be smaller."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]
