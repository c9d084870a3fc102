from docs.draw_extraction import IMAGE, draw


def test_the_image_in_the_pages_is_what_the_code_takes() -> None:
    assert IMAGE.read_text(encoding="utf-8") == draw(), "run: python docs/draw_extraction.py"
