import json
from pathlib import Path

import pytest

from tests.parity.golden import DATA
from wan_train.errors import InputError
from wan_train.models.encoders import tokenizer as module
from wan_train.models.encoders.tokenizer import clean, find_tokenizer, read_tokenizer, tokenizer_of_sentencepiece

# A unigram model of 134 pieces whose normaliser splits the fi ligature and maps full-width letters and spaces.
MODEL = DATA / "tokenizer" / "spiece.model"

# What the SentencePiece library itself makes of each cleaned text, with the end token.
EXPECTED = {
    "a cat  crushes &amp;amp; squeezes coloured clay.": [
        *(5, 31, 6, 37, 121, 3, 122, 3, 4, 2, 20, 47, 70, 84, 66, 53, 57, 12, 10, 37, 74, 28, 2, 1),
    ],
    "ﬁne　ａｂｃ": [35, 18, 12, 5, 21, 39, 1],
    "一只猫": [4, 95, 98, 104, 1],
    "Zebra 123 ß": [4, 2, 12, 21, 23, 4, 2, 4, 128, 1],
    "": [1],
}


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a \t cat\n\nruns ", "a cat runs"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("it&#39;s", "it's"),
        ("cafÃ© â€œquotedâ€\x9d", 'café "quoted"'),
        ("ALL Caps stay", "ALL Caps stay"),
        ("一只\u3000猫", "一只 猫"),
        ("", ""),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


@pytest.mark.parametrize("text", EXPECTED)
def test_a_sentencepiece_model_tokenizes_as_its_library_does(text: str) -> None:
    assert read_tokenizer(MODEL)([text]) == [EXPECTED[text]]


def test_the_library_still_says_so() -> None:
    library = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(MODEL))
    assert {text: [*library.encode(clean(text)), 1] for text in EXPECTED} == EXPECTED


def test_a_tokenizer_json_is_used_as_it_says(tmp_path: Path) -> None:
    ours = read_tokenizer(MODEL)
    ours._backend.enable_padding(length=600)  # a setting in the file that must not reach the ids
    ours._backend.enable_truncation(3)
    ours._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(b"not asked")
    again = read_tokenizer(find_tokenizer(tmp_path, {}, embedded=False))
    assert again(list(EXPECTED)) == list(EXPECTED.values())


def test_transformers_agrees_on_a_tokenizer_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = read_tokenizer(MODEL)
    PreTrainedTokenizerFast(tokenizer_object=ours._backend, eos_token="</s>", pad_token="<pad>").save_pretrained(
        tmp_path
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in EXPECTED:
        ids = theirs(clean(text), truncation=True, max_length=512, add_special_tokens=True).input_ids
        assert read_tokenizer(tmp_path / "tokenizer.json")([text])[0] == ids


def test_each_text_that_is_cut_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    tokenize = read_tokenizer(MODEL)
    long, short, longer = tokenize(["a " * 600, "rain", "the " * 700])
    assert len(long) == len(longer) == 512
    assert long[-1] == longer[-1] == short[-1] == 1
    told = capsys.readouterr().err.splitlines()
    assert [line[:25] for line in told] == ['WARNING: the text "a a a ', 'WARNING: the text "the th']
    assert all(line.endswith('..." is longer than 512 tokens and is truncated') for line in told)
    tokenize(["a " * 600])
    assert len(tokenize(["a " * 511])[0]) == 512
    assert capsys.readouterr().err == ""


def test_texts_that_are_found_to_be_cut_are_named_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    tokenize = read_tokenizer(MODEL)
    assert tokenize.find_cut(["a " * 600, "rain"]) == {"a " * 600}
    tokenize(["a " * 600])
    assert capsys.readouterr().err == ""


def test_the_order_of_search(tmp_path: Path) -> None:
    given, beside = tmp_path / "given", tmp_path / "google" / "umt5-xxl"
    for folder in (given, beside):
        folder.mkdir(parents=True)
        (folder / "spiece.model").touch()
    checkpoint = tmp_path / "t5.safetensors"
    checkpoint.touch()
    assert find_tokenizer(given, checkpoint, embedded=True) == given / "spiece.model"
    assert find_tokenizer(given / "spiece.model", checkpoint, embedded=True) == given / "spiece.model"
    assert find_tokenizer("auto", checkpoint, embedded=True) == beside / "spiece.model"
    assert find_tokenizer("auto", tmp_path, embedded=True) == beside / "spiece.model"
    (beside / "spiece.model").unlink()
    beside.rmdir()
    assert find_tokenizer("auto", checkpoint, embedded=True) is None


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer \(tokenizer.json or spiece.model\): download"):
        find_tokenizer(tmp_path, {}, embedded=True)
    with pytest.raises(InputError, match="absent"):
        find_tokenizer(tmp_path / "absent", {}, embedded=True)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    for text in ("", "{", json.dumps({"model": {"type": "Unigram"}})):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match="is not a readable tokenizer"):
            read_tokenizer(tmp_path / "tokenizer.json")


WHOLE = MODEL.read_bytes()
POINTER = b"version https://git-lfs.github.com/spec/v1"


@pytest.mark.parametrize("broken", [b"", b"\xff" * 40, POINTER, WHOLE[:1000], WHOLE[:1001], WHOLE[:-1]])
def test_a_broken_model_is_refused(broken: bytes) -> None:
    with pytest.raises(InputError, match="is not a valid SentencePiece unigram model"):
        tokenizer_of_sentencepiece(broken, "t5.safetensors")


class Hub:
    """Stands in for the hub's client."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, offline: bool, answers: bool) -> None:
        import huggingface_hub

        self.asked: list[str] = []
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cached)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(module, "_is_reachable", lambda url: self.asked.append(url) or answers)
        self.cache: dict[str, str] = {}
        self.failure: Exception | None = None

    def cached(self, repository: str, name: str) -> str | None:
        return self.cache.get(name)

    def download(self, repository: str, name: str) -> str:
        if self.failure:
            raise self.failure
        return f"hub/{repository}/{name}"


def test_the_hub_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, offline=False, answers=True)
    assert find_tokenizer("auto", {}, embedded=False) == Path("hub/google/umt5-xxl/tokenizer.json")
    assert "huggingface.co/google/umt5-xxl" in hub.asked[0]
    hub.cache["spiece.model"] = "cache/spiece.model"
    assert find_tokenizer("auto", {}, embedded=False) == Path("cache/spiece.model")
    assert len(hub.asked) == 1


def test_offline_fails_at_once_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, offline=True, answers=True)
    with pytest.raises(InputError, match=r"download tokenizer.json.*google/umt5-xxl next to.*--tokenizer"):
        find_tokenizer("auto", {}, embedded=False)
    assert hub.asked == []
    hub = Hub(monkeypatch, offline=False, answers=False)
    with pytest.raises(InputError, match="cannot be reached"):
        find_tokenizer("auto", {}, embedded=False)
    hub = Hub(monkeypatch, offline=False, answers=True)
    hub.failure = OSError("403")
    with pytest.raises(InputError, match="cannot be reached"):
        find_tokenizer("auto", {}, embedded=False)


def test_a_host_that_is_not_there_does_not_answer() -> None:
    assert not module._is_reachable("http://localhost:9/google/umt5-xxl")
