"""Encode every caption that a dataset file describes and keep its embedding in the cache folder."""

import torch
from tqdm import tqdm

import wan_train
from cache_tools.runner import summarise_run
from cache_tools.settings import CacheTextSettings
from dataset.cache import has_text, save_text
from dataset.config import read_config
from dataset.items import Item
from dataset.sources import list_items
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.text_encoder import check_text_encoder
from wan_train.precision import default_device, published_dtype
from wan_train.storage import check_writable

logger = get_logger(__name__)


def main(settings: CacheTextSettings) -> None:
    """Check everything, then encode what is not there yet; a run that finds nothing to do loads no model."""
    configs = read_config(settings.dataset.dataset_config)
    source, tokenizer = settings.text_encoder.t5, settings.text_encoder.tokenizer or "auto"
    if not source:
        raise InputError("--t5 is missing: name the text encoder's file, such as models_t5_umt5-xxl-enc-bf16.pth")
    check_text_encoder(source, tokenizer)
    device = default_device(settings.run.device)
    for config in configs:
        check_writable(config.cache_directory)
    allowed = settings.dataset.allow_missing_captions
    items = [item for config in configs for item in list_items(config, allow_missing_captions=allowed)]
    due = [item for item in items if not has_text(item)]
    if due:
        dtype = published_dtype(device)
        encoder = wan_train.load_text_encoder(source, tokenizer=tokenizer, device=device, dtype=dtype)
        with tqdm(desc="captions", total=len(due), unit="file") as bar:
            for batch in batch_captions(due, settings.run.batch_size):
                with torch.no_grad():
                    embeddings = encoder(list(batch))
                for sharing, embedding in zip(batch.values(), embeddings, strict=True):
                    for item in sharing:
                        save_text(item, embedding)
                    bar.update(len(sharing))
    logger.info(summarise_run("captions", num_encoded=len(due), num_kept=len(items) - len(due)))


def batch_captions(items: list[Item], batch_size: int) -> list[dict[str, list[Item]]]:
    """Distinct captions, at most `batch_size` together, each with the items that share it."""
    by_caption: dict[str, list[Item]] = {}
    for item in items:
        by_caption.setdefault(item.caption, []).append(item)
    captions = list(by_caption.items())
    return [dict(captions[start : start + batch_size]) for start in range(0, len(captions), batch_size)]
