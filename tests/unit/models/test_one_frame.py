import pytest

from wan_train.models.one_frame import OneFrame, read_one_frame


@pytest.mark.parametrize(
    ("text", "controls", "target", "positions", "place"),
    [
        ("control_index=0,target_index=1", (0,), 1, (0, 1), 1),
        ("control_index=0;2,target_index=1", (0, 2), 1, (0, 1, 2), 1),
        ("control_index = 9 , target_index = 3", (9,), 3, (3, 9), 0),
    ],
)
def test_reading(text: str, controls: tuple[int, ...], target: int, positions: tuple[int, ...], place: int) -> None:
    one_frame = read_one_frame(text)
    assert one_frame == OneFrame(controls, target)
    assert (one_frame.positions, one_frame.target_place) == (positions, place)
    assert read_one_frame(str(one_frame)) == one_frame


@pytest.mark.parametrize(
    "text",
    [
        "",
        "target_index=1",
        "control_index=0",
        "control_index=0,target_index=0",
        "control_index=0;0,target_index=1",
        "control_index=0;1;2,target_index=3",
        "control_index=-1,target_index=3",
        "control_index=a,target_index=3",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        read_one_frame(text)
