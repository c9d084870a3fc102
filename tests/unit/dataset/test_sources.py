import pytest

from dataset.config import read_config
from dataset.reading.media import load_clips
from dataset.sources import list_items, name_some, plan_clips, warn_too_short
from tests.unit.dataset.drawing import draw_image, draw_video, make_clips, read_number, write_toml
from wan_train.errors import InputError


def configure(tmp_path, lines, kind="video"):
    text = f'[[datasets]]\n{kind}_directory = "{tmp_path / "clips"}"\nresolution = [64, 48]\n{lines}'
    (config,) = read_config(write_toml(tmp_path / "data.toml", text))
    return config


def plan(config):
    return plan_clips(config, list_items(config, allow_missing_captions=False))


def test_items_are_sorted_and_carry_their_captions(tmp_path):
    folder = make_clips(tmp_path / "clips", {"b": 1, "a.x": 1})
    draw_video(folder / "C.MP4", 1)
    (folder / "C.txt").write_text("\ufeffgruß \n", encoding="utf-8")
    (folder / "notes.md").write_text("not a clip")
    (folder / "._b.mp4").write_text("left by another system")
    items = list_items(configure(tmp_path, ""), allow_missing_captions=False)
    assert [(item.path.name, item.caption) for item in items] == [
        ("C.MP4", "gruß"),
        ("a.x.mp4", "caption of a.x"),
        ("b.mp4", "caption of b"),
    ]


def test_missing_captions_are_named_ten_at_a_time(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(12):
        draw_image(folder / f"{number:02d}.png")
    config = configure(tmp_path, "", "image")
    with pytest.raises(InputError) as raised:
        list_items(config, allow_missing_captions=False)
    message = str(raised.value)
    assert "12 of 12" in message and "09.png and 2 more" in message and "10.png" not in message
    assert "--allow_missing_captions" in message


def test_missing_captions_may_be_empty_text_but_are_told(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", {"a": 1, "b": 1})
    (folder / "a.txt").unlink()
    items = list_items(configure(tmp_path, ""), allow_missing_captions=True)
    assert [item.caption for item in items] == ["", "caption of b"]
    assert "a.mp4" in capsys.readouterr().err


def test_empty_captions_are_told(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", {"a": 1})
    (folder / "a.txt").write_text(" \n")
    list_items(configure(tmp_path, ""), allow_missing_captions=False)
    assert "1 captions are empty (a.mp4)" in capsys.readouterr().err


def test_a_caption_that_is_not_text_is_named(tmp_path):
    folder = make_clips(tmp_path / "clips", {"a": 1})
    (folder / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"a\.txt"):
        list_items(configure(tmp_path, ""), allow_missing_captions=False)


def test_an_empty_folder_and_equal_stems_are_errors(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    with pytest.raises(InputError, match="no videos"):
        list_items(configure(tmp_path, ""), allow_missing_captions=True)
    make_clips(folder, {"a": 1})
    draw_video(folder / "a.mov", 1, codec="mpeg4")
    with pytest.raises(InputError, match=r"a\.mov and a\.mp4"):
        list_items(configure(tmp_path, ""), allow_missing_captions=True)


def test_clips_hold_exactly_the_planned_frames(tmp_path):
    make_clips(tmp_path / "clips", {"a": 30})
    lines = 'source_fps = 24\ntarget_frames = [1, 9]\nframe_extraction = "uniform"\nframe_sample = 2'
    found = plan(configure(tmp_path, lines)).clips
    kept = [i for i in range(30) if i % 3 != 1]  # 24 fps to 16 drops the second of three
    assert [(clip.start, clip.num_frames) for clip in found] == [(0, 1), (19, 1), (0, 9), (11, 9)]
    for clip, images in zip(found, load_clips(found), strict=True):
        assert images.shape == (clip.num_frames, 48, 64, 3)
        assert [read_number(image) for image in images] == kept[clip.start : clip.start + clip.num_frames]


@pytest.mark.parametrize(
    ("lines", "spans"),
    [
        ('frame_extraction = "chunk"\ntarget_frames = [9]', [(0, 9), (9, 9), (18, 9)]),
        ('frame_extraction = "slide"\ntarget_frames = [17]\nframe_stride = 5', [(0, 17), (5, 17), (10, 17)]),
        ('frame_extraction = "full"', [(0, 29)]),
        ('frame_extraction = "full"\nmax_frames = 20', [(0, 17)]),
    ],
)
def test_every_extraction_decodes_exactly_its_frames(tmp_path, lines, spans):
    make_clips(tmp_path / "clips", {"a": 30})
    found = plan(configure(tmp_path, lines)).clips
    assert [(clip.start, clip.num_frames) for clip in found] == spans
    for clip, images in zip(found, load_clips(found), strict=True):
        assert [read_number(image) for image in images] == list(range(clip.start, clip.start + clip.num_frames))


@pytest.mark.parametrize(
    ("lines", "size"),
    [
        ("", (64, 48)),
        ("enable_bucket = true", (48, 64)),
        ("enable_bucket = true\nbucket_no_upscale = true", (32, 32)),
    ],
)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_bucket_flags_hold_for_videos_as_for_images(tmp_path, kind, lines, size):
    folder = tmp_path / "clips"
    folder.mkdir()
    draw_video(folder / "a.mp4", 1, size=(34, 44))
    draw_image(folder / "a.png", (34, 44))
    (folder / "a.txt").write_text("a")
    (clip,) = plan(configure(tmp_path, lines, kind)).clips
    assert (clip.size, clip.source_size) == (size, (34, 44))
    assert load_clips([clip])[0].shape == (1, size[1], size[0], 3)


def test_videos_too_short_for_every_target_are_named(tmp_path, capsys):
    make_clips(tmp_path / "clips", {"long": 12, "short": 8, "shorter": 3})
    found = plan(configure(tmp_path, "target_frames = [9, 25]"))
    assert [clip.item.path.stem for clip in found.clips] == ["long"]
    warn_too_short([found])
    error = capsys.readouterr().err
    assert "2 of 3" in error and "short.mp4, shorter.mp4" in error and "9 frames" in error


def test_a_dataset_without_any_clip_is_an_error(tmp_path):
    make_clips(tmp_path / "clips", {"a": 8})
    with pytest.raises(InputError, match=r"shorter than 9 frames.*a\.mp4"):
        plan(configure(tmp_path, "target_frames = [9]"))
    with pytest.raises(InputError, match="after source_fps 32"):
        plan(configure(tmp_path, "target_frames = [5]\nsource_fps = 32"))


def test_a_image_too_small_for_the_grid_is_named(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    draw_image(folder / "tiny.png", (12, 40))
    (folder / "tiny.txt").write_text("tiny")
    with pytest.raises(InputError, match=r"tiny\.png is 12 wide, 40 high"):
        plan(configure(tmp_path, "enable_bucket = true\nbucket_no_upscale = true", "image"))


def test_a_broken_file_is_named_before_anything_is_encoded(tmp_path):
    folder = make_clips(tmp_path / "clips", {"a": 1})
    (folder / "b.mp4").write_bytes(b"nothing")
    (folder / "b.txt").write_text("b")
    with pytest.raises(InputError, match=r"b\.mp4"):
        plan(configure(tmp_path, ""))


def test_names_are_cut_after_ten():
    assert name_some(["a", "b"]) == "a, b"
    assert name_some(map(str, range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_videos_of_another_rate_are_told_once_where_all_frames_are_used(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", {"a": 9, "b": 9}, fps=16)
    make_clips(folder, {"fast": 9}, fps=30)
    plan(configure(tmp_path, "target_frames = [5]"))
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1
    assert "1 of 3 videos are not at 16 fps (fast.mp4 (30))" in told
    for quiet in ('source_fps = "auto"\ntarget_frames = [5]', "source_fps = 30\ntarget_frames = [5]", ""):
        plan(configure(tmp_path, quiet))
        assert "fps" not in capsys.readouterr().err


def test_a_rate_in_words_is_auto_alone(tmp_path):
    (tmp_path / "clips").mkdir()
    with pytest.raises(InputError, match=r'source_fps = .*or "auto"'):
        configure(tmp_path, 'source_fps = "automatic"')
