from docs.draw_extraction import IMAGE, draw


def test_the_image_matches_the_code() -> None:
    assert IMAGE.read_text(encoding="utf-8") == draw(), "run: python docs/draw_extraction.py"
