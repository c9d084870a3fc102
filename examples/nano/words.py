"""The tokenizer of the small model: one token per word, in the format of the published tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from examples.nano.world import UNUSED_WORDS, all_scenes

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-\u2581"


def known_words() -> list[str]:
    """Return the words of all captions, then those that occur in no caption."""
    return sorted({word for scene in all_scenes() for word in scene.caption.split()}) + list(UNUSED_WORDS)


def make_tokenizer(folder: Path, words: Sequence[str]) -> int:
    """Write a Unigram tokenizer like UMT5's (pad 0, end 1, unknown 2, bytes for unknown words); return its size."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"<0x{byte:02X}>", -15.0) for byte in range(256)]
    pieces += [(letter, -6.0) for letter in _LETTERS] + [(f"\u2581{word}", -4.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>",'
        ' "unk_token": "<unk>", "model_max_length": 512}\n',
        encoding="utf-8",
    )
    return tokenizer.get_vocab_size()
