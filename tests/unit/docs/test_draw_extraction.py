from docs.draw_extraction import PICTURE, draw


def test_the_picture_in_the_pages_is_what_the_code_takes() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run: python docs/draw_extraction.py"
