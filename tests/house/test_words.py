"""Texts are in the field's words: what the list in words.py leaves out stands nowhere."""

from pathlib import Path

import pytest

from tests.house.words import LEFT_OUT, find_all, in_code, in_docs, in_text

PLANTED = {
    "CPU RAM, host memory": "kept in main memory",
    "GPU memory, VRAM, device": "what is on the card",
    "8-bit, int8, fp8": "states of eight bits",
    "recompute, activation checkpointing": "blocks are computed again",
    "stochastic rounding": "rounded at random",
    "resume, resumed from, continue": "training goes on from step 5",
    "default: X": "the last part; without it the task's",
    "number of, at most N": "keep so many blocks",
    "parameters, elements; billion": "a thousand million of them",
    "NaN or Inf": "the loss is not a number",
    "image, frame": "the picture that the video begins with",
    "rope table": "queries turned by the table",
    "transfer stream": "copied on a lane",
    "evaluate, evaluation": "the first look at the held-out clips",
    "per channel, per token, block-wise": "scales of each block apart",
    "scale, effective scale alpha/rank": "how much it counts",
    "unmatched keys": "nothing answers to 2 keys",
    "is not a, has no": "x.png is no image that can be read",
}


def test_no_left_out_word_is_used() -> None:
    found = find_all()
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("say", LEFT_OUT)
def test_each_left_out_word_is_seen(say: str) -> None:
    assert [find.say for find in in_text("help", "x.py:1", PLANTED[say])] == [say]


def test_every_kind_of_text_is_read() -> None:
    source = '''
def load(what):
    """Load a picture."""
    log.info("goes on from %s", what)
    raise InputError(f"{what} is no image")
field = option(1, "Keep so many blocks.")
'''
    kinds = [find.text_kind for find in in_code(Path("x.py"), source)]
    assert sorted(kinds) == ["docstring", "help", "log", "parameter", "raised message"]
    page = "a picture\n```\na picture\n```\nthe option `picture`\n"
    assert [find.where for find in in_docs(Path("x.md"), page)] == ["x.md:1"]
