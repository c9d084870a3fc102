"""Which keys and columns about control, references, masks, camera and speed give what to which task."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dataset.config import read_config
from dataset.items import CameraSource
from dataset.sources import list_items, plan_clips
from tests.unit.dataset.drawing import draw_image, draw_video, make_clips, write_toml
from wan_train.conditions.camera import ORIGIN, SPEED
from wan_train.errors import InputError
from wan_train.models.variants import VARIANTS

TOML = '[[datasets]]\nvideo_directory = "clips"\nresolution = [64, 48]\ntarget_frames = [5]\n'
ENTRY = " ".join(map(str, ORIGIN)) + "\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with clips/{a,b}.mp4 of 9 frames, and empty folders for what goes with them."""
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path / "clips", {"a": 9, "b": 9})
    for name in ("controls", "references", "masks", "cameras"):
        (tmp_path / name).mkdir()
    return tmp_path


def configure(lines, task="", toml=TOML):
    row = VARIANTS[task] if task else None
    (config,) = read_config(
        write_toml(Path("data.toml"), toml + lines), images=row and row.images, control=row and row.control
    )
    return config


def items_of(lines, task="", toml=TOML):
    return list_items(configure(lines, task, toml), allow_missing_captions=True)


def plan_of(lines, task):
    config = configure(lines, task)
    return plan_clips(config, list_items(config, allow_missing_captions=True))


def listed(kind, text, lines="", task=""):
    path = Path(f"list.{kind}")
    path.write_text(text)
    toml = f'[[datasets]]\nvideo_{kind}_file = "{path}"\ncache_directory = "cache"\ntarget_frames = [5]\n'
    return items_of(lines, task, toml)


def as_jsonl(*rows):
    return "".join(json.dumps({"video_path": "clips/a.mp4", "caption": "c", **row}) + "\n" for row in rows)


def test_references_match_the_stem_and_then_numbers_and_may_be_missing(folder, capsys):
    for name in ("a_1.png", "a.jpg", "a_0.png", "other.png"):
        draw_image(folder / "references" / name)
    a, b = items_of('reference_directory = "references"', "vace-1.3B")
    assert a.references == tuple(Path("references") / name for name in ("a.jpg", "a_0.png", "a_1.png"))
    assert b.references == ()
    assert "1 of 2 files have no reference (b.mp4): they are trained without one" in capsys.readouterr().err


def test_several_references_are_refused_where_the_task_reads_one(folder):
    for name in ("a.png", "a_0.png"):
        draw_image(folder / "references" / name)
    with pytest.raises(InputError, match=r"clips/a\.mp4 has 2 references, but the task uses one: .*a\.png, .*a_0\.png"):
        items_of('reference_directory = "references"', "fun-control-1.3B")


def test_masks_are_those_of_vace_under_its_tasks_and_loss_masks_elsewhere(folder, capsys):
    draw_video(folder / "masks/a.mp4", 9)
    draw_image(folder / "masks/b.png")
    (folder / "losses").mkdir()
    draw_image(folder / "losses/a.png")
    keys = 'mask_directory = "masks"\n'
    found = [(item.vace_mask, item.mask) for item in items_of(keys, "vace-1.3B")]
    assert found == [(Path("masks/a.mp4"), None), (Path("masks/b.png"), None)]
    found = [(item.vace_mask, item.mask) for item in items_of(keys + 'loss_mask_directory = "losses"', "vace-1.3B")]
    assert found == [(Path("masks/a.mp4"), Path("losses/a.png")), (Path("masks/b.png"), None)]
    for task in ("", "t2v-1.3B", "fun-control-1.3B"):
        for key in ("mask_directory", "loss_mask_directory"):
            items = items_of(f'{key} = "masks"', task)
            assert [(item.vace_mask, item.mask) for item in items] == [
                (None, Path("masks/a.mp4")),
                (None, Path("masks/b.png")),
            ]
    both = keys + 'loss_mask_directory = "losses"'
    assert [item.mask for item in items_of(both)] == [Path("losses/a.png"), None]
    capsys.readouterr()
    with pytest.raises(InputError, match="mask_directory and loss_mask_directory both hold loss masks"):
        items_of(both, "fun-control-1.3B")


def test_a_missing_vace_mask_and_control_are_named_and_no_error(folder, capsys):
    draw_video(folder / "controls/a.mp4", 9)
    a, b = items_of('mask_directory = "masks"\ncontrol_directory = "controls"', "vace-1.3B")
    assert (a.controls, b.controls) == ((Path("controls/a.mp4"),), ())
    told = capsys.readouterr().err
    assert "2 of 2 files have no VACE mask (a.mp4, b.mp4)" in told and "1 of 2 files have no control (b.mp4)" in told


def test_captions_alone_ask_for_no_partner(folder, capsys):
    """The text encoder's tool does not know the task, and VACE's controls may be missing."""
    config = configure('control_directory = "controls"\nmask_directory = "masks"')
    items = list_items(config, allow_missing_captions=True, with_partners=False)
    assert [(item.captions, item.controls, item.mask) for item in items] == [
        (("caption of a",), (), None),
        (("caption of b",), (), None),
    ]
    assert capsys.readouterr().err == ""


def test_a_control_task_without_any_control_says_so(capsys):
    items_of("", "fun-control-1.3B")
    assert "no control_directory and no control_path: the model receives no control video" in capsys.readouterr().err


def test_a_camera_file_goes_before_the_datasets_direction(folder):
    (folder / "cameras/a.txt").write_text(ENTRY * 9)
    keys = 'camera_directory = "cameras"\ncamera_direction = "LeftUp"\ncamera_speed = 0.5'
    cameras = [item.camera for item in items_of(keys, "fun-camera-1.3B")]
    assert cameras == [CameraSource(Path("cameras/a.txt")), CameraSource(None, "LeftUp", 0.5)]
    (camera, _) = (item.camera for item in items_of('camera_direction = "In"', "fun-camera-1.3B"))
    assert camera == CameraSource(None, "In", SPEED)
    with pytest.raises(
        InputError, match=r"1 of 2 files have no camera path in cameras \(b\.mp4\): set camera_direction"
    ):
        items_of('camera_directory = "cameras"', "fun-camera-1.3B")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('camera_direction = "Lefft"', r"camera_direction = 'Lefft': expected one of Left, .*Out.*Left"),
        ("camera_speed = -1", "camera_speed = -1: expected .* 0 or more"),
        ("motion_bucket_id = 101", "motion_bucket_id = 101: expected an integer from 0 \\(slow\\) to 100 \\(fast\\)"),
        ("motion_bucket_id = -1", "motion_bucket_id = -1: expected"),
        ("motion_bucket_id = 1.5", r"motion_bucket_id = 1\.5: expected"),
        ('start_image = "yes"', "start_image = 'yes': expected true or false"),
    ],
)
def test_values_out_of_range_are_named(line, part):
    with pytest.raises(InputError, match=part):
        configure(line)


@pytest.mark.parametrize(
    ("line", "task", "part"),
    [
        (
            'control_directory = "controls"',
            "fun-camera-1.3B",
            "control_directory: the task does not use a control video",
        ),
        (
            'reference_directory = "references"',
            "fun-camera-1.3B",
            "reference_directory: the task does not use a reference",
        ),
        ('camera_direction = "In"', "fun-control-1.3B", "camera_direction: the task does not use a camera path"),
        ('camera_directory = "cameras"', "vace-1.3B", "camera_directory: the task does not use a camera path"),
        ("start_image = true", "vace-1.3B", "start_image: the task does not use a start image"),
        ("start_image = false", "fun-camera-1.3B", "start_image: the task always uses a start image"),
        ("start_image = true", "i2v-14B", "start_image: the task always uses a start image"),
    ],
)
def test_keys_that_the_task_does_not_read_are_refused(line, task, part):
    with pytest.raises(InputError, match=rf"dataset 1: {part}"):
        configure(line, task)


def test_a_start_image_is_the_users_choice_where_it_is_optional():
    chosen = [
        configure(line, "fun-control-1.3B").start_image for line in ("", "start_image = false", "start_image = true")
    ]
    assert chosen == [False, False, True]


def test_without_a_task_all_keys_are_taken(folder):
    for name in "ab":
        draw_video(folder / f"controls/{name}.mp4", 9)
        draw_image(folder / f"references/{name}.png")
    keys = 'control_directory = "controls"\nreference_directory = "references"\ncamera_direction = "In"\n'
    a, _ = items_of(keys + "start_image = true\nmotion_bucket_id = 7")
    assert (a.control, a.references) == (Path("controls/a.mp4"), (Path("references/a.png"),))
    assert a.motion_bucket_id == 7


def test_a_line_of_jsonl_gives_everything_and_goes_before_the_dataset(folder):
    for path in ("masks/m.png", "references/r.png", "references/s.png"):
        draw_image(folder / path)
    draw_video(folder / "controls/c.mp4", 9)
    (folder / "p.txt").write_text(ENTRY * 9)
    row = {"control_path": "controls/c.mp4", "reference_path_1": "references/s.png"}
    row |= {"reference_path_0": "references/r.png", "vace_mask_path": "masks/m.png", "motion_bucket_id": 0}
    (item,) = listed("jsonl", as_jsonl(row), "motion_bucket_id = 50", "vace-1.3B")
    assert (item.control, item.vace_mask) == (Path("controls/c.mp4"), Path("masks/m.png"))
    assert item.references == (Path("references/r.png"), Path("references/s.png"))
    assert item.motion_bucket_id == 0
    keys = 'camera_direction = "In"\ncamera_speed = 0.25\nmotion_bucket_id = 50'
    rows = [{"camera_direction": "Out"}, {"camera_speed": 1}, {"camera_path": "p.txt"}, {"camera_path": None}]
    for number, row in enumerate(rows):
        (item,) = listed("jsonl", as_jsonl(row), keys, "fun-camera-1.3B")
        camera = [("Out", 0.25), ("In", 1), None, ("In", 0.25)][number]
        assert item.camera == (CameraSource(Path("p.txt")) if camera is None else CameraSource(None, *camera))
        assert item.motion_bucket_id == 50


def test_diffsynths_metadata_works_as_it_is(folder, capsys):
    """Its columns, relative to the folder of the file, each read by the tasks that it is for."""
    data = folder / "data"
    data.mkdir()
    for name in ("v", "control", "vv"):
        draw_video(data / f"{name}.mp4", 9)
    for name in ("r", "m", "vr"):
        draw_image(data / f"{name}.png")
    header = "video,prompt,control_video,reference_image,vace_video,vace_video_mask,vace_reference_image"
    header += ",camera_control_direction,camera_control_speed,motion_bucket_id\n"
    (data / "metadata.csv").write_text(
        f"{header}v.mp4,a,control.mp4,r.png,vv.mp4,m.png,vr.png,LeftUp,0.018518518,50.0\n"
    )
    toml = '[[datasets]]\nvideo_csv_file = "data/metadata.csv"\ncache_directory = "cache"\ntarget_frames = [5]\n'

    def item_for(task):
        (item,) = items_of("", task, toml)
        assert item.motion_bucket_id == 50
        return replace(item, config=None, captions=(), path=Path(), motion_bucket_id=None)

    bare = item_for("t2v-1.3B")
    assert (bare.controls, bare.references, bare.camera) == ((), (), None)
    assert (
        "columns that only some tasks read: camera_control_direction, camera_control_speed, control_video"
        in capsys.readouterr().err
    )
    for task in ("fun-control-1.3B", "fun-control-A14B", "i2v-14B-FC"):
        item = item_for(task)
        assert item == replace(bare, controls=(Path("data/control.mp4"),), references=(Path("data/r.png"),))
    item = item_for("vace-14B")
    assert (item.controls, item.references) == ((Path("data/vv.mp4"),), (Path("data/vr.png"),))
    assert (item.vace_mask, item.mask, item.camera) == (Path("data/m.png"), None, None)
    capsys.readouterr()
    assert item_for("fun-camera-A14B") == replace(bare, camera=CameraSource(None, "LeftUp", 0.018518518))
    assert (
        "columns that only some tasks read: control_video, reference_image, vace_reference_image"
        in capsys.readouterr().err
    )


def test_empty_cells_of_a_table_give_nothing(folder):
    draw_image(folder / "r.png")
    rows = "video,prompt,vace_reference_image,motion_bucket_id\nclips/a.mp4,a,r.png,\nclips/b.mp4,b,,3\n"
    a, b = listed("csv", rows, task="vace-1.3B")
    assert (a.references, a.motion_bucket_id) == ((Path("r.png"),), None)
    assert (b.references, b.motion_bucket_id) == ((), 3)


@pytest.mark.parametrize(
    ("row", "task", "part"),
    [
        ({"reference_path": "r.png"}, "", "reference_path 'r.png': no such file"),
        ({"vace_mask_path": 3}, "", "vace_mask_path 3: no such file"),
        ({"camera_direction": "Forward"}, "", "camera_direction 'Forward': expected one of Left"),
        (
            {"camera_direction": "In", "camera_speed": "x"},
            "",
            "camera_speed 'x': expected the camera's movement per frame",
        ),
        ({"camera_speed": 1}, "", "sets a camera's speed without its direction"),
        ({"camera_path": "clips/a.mp4", "camera_direction": "In"}, "", "by file and by direction or speed"),
        ({"motion_bucket_id": 101}, "", "motion_bucket_id 101: expected an integer from 0"),
        ({"motion_bucket_id": "fast"}, "", "motion_bucket_id 'fast': expected an integer from 0"),
        ({"control_path": "clips/a.mp4"}, "fun-camera-1.3B", "control_path: the task does not use a control video"),
        ({"reference_path_0": "clips/a.mp4"}, "fun-camera-1.3B", "reference_path_0: the task does not use a reference"),
        (
            {"control_path": "clips/a.mp4", "control_video": "clips/a.mp4"},
            "fun-control-1.3B",
            "control_path and control_video both set the control_path",
        ),
    ],
)
def test_a_bad_cell_is_named_with_its_line(row, task, part):
    with pytest.raises(InputError) as raised:
        listed("jsonl", as_jsonl({}, row), task=task)
    assert "list.jsonl line 2: " in str(raised.value) and part in str(raised.value), str(raised.value)


@pytest.mark.parametrize("key", ["reference_directory", "camera_directory", "loss_mask_directory"])
def test_a_folder_that_is_not_there_is_named(key):
    with pytest.raises(InputError, match="directory: no such folder: nowhere"):
        configure(f'{key} = "nowhere"')


def test_folders_of_partners_in_the_media_folder_are_no_media(folder):
    for name in ("controls", "references", "masks", "cameras"):
        (folder / "clips" / name).mkdir()
    for name in "ab":
        draw_video(folder / f"clips/controls/{name}.mp4", 9)
        draw_image(folder / f"clips/references/{name}.png")
        draw_image(folder / f"clips/masks/{name}.png")
    keys = 'recursive = true\ncontrol_directory = "clips/controls"\nreference_directory = "clips/references"\n'
    items = items_of(keys + 'mask_directory = "clips/masks"', "vace-1.3B")
    assert [item.path.name for item in items] == ["a.mp4", "b.mp4"]
    assert all(item.control and item.references and item.vace_mask for item in items)


def test_a_control_shorter_than_the_clips_is_an_error_with_both_numbers(folder):
    for name, frames in (("a", 9), ("b", 4)):
        draw_video(folder / f"controls/{name}.mp4", frames)
    keys = 'control_directory = "controls"'
    for task in ("fun-control-1.3B", "fun-control-A14B", "vace-1.3B"):
        with pytest.raises(InputError) as raised:
            plan_of(keys, task)
        assert str(raised.value) == (
            "controls/b.mp4 has 4 frames, but the clips of clips/b.mp4 use 5 of its 9: extend it to that length,"
            " or lower target_frames"
        )
    draw_video(folder / "controls/b.mp4", 5)
    assert len(plan_of(keys, "fun-control-1.3B").clips) == 2
    longer = "frame_extraction = 'full'\n"
    with pytest.raises(InputError, match=r"b\.mp4 has 5 frames, but the clips of clips/b\.mp4 use 9 of its 9"):
        plan_of(longer + keys, "vace-1.3B")
    draw_video(folder / "controls/b.mp4", 4)
    assert len(plan_of(keys, "t2v-1.3B").clips) == 2


def test_a_control_of_another_aspect_is_an_error_with_both_sizes(folder):
    for name, size in (("a", (128, 96)), ("b", (96, 64))):
        draw_video(folder / f"controls/{name}.mp4", 9, size=size)
    with pytest.raises(InputError) as raised:
        plan_of('control_directory = "controls"', "fun-control-1.3B")
    assert str(raised.value) == (
        "controls/b.mp4 is 96 wide, 64 high and clips/b.mp4 is 64 wide, 48 high: use the same aspect ratio for both"
    )
    draw_video(folder / "controls/b.mp4", 9, size=(130, 96))
    assert len(plan_of('control_directory = "controls"', "fun-control-1.3B").clips) == 2


def test_a_vace_mask_goes_with_its_clip_or_is_a_still(folder):
    draw_image(folder / "masks/a.png")
    draw_video(folder / "masks/b.mp4", 4)
    with pytest.raises(InputError, match=r"masks/b\.mp4 has 4 frames, but the clips of clips/b\.mp4 use 5 of its 9"):
        plan_of('mask_directory = "masks"', "vace-1.3B")
    draw_video(folder / "masks/b.mp4", 5)
    assert len(plan_of('mask_directory = "masks"', "vace-1.3B").clips) == 2
    draw_image(folder / "masks/a.png", (64, 64))
    with pytest.raises(InputError, match=r"masks/a\.png is 64 wide, 64 high and clips/a\.mp4 is 64 wide, 48 high"):
        plan_of('mask_directory = "masks"', "vace-1.3B")


def test_all_pairs_that_do_not_fit_are_counted(folder):
    for name in "ab":
        draw_video(folder / f"controls/{name}.mp4", 4)
    with pytest.raises(InputError, match=r"controls/a\.mp4 has 4 frames.* \(and 1 more pairs\)$"):
        plan_of('control_directory = "controls"', "fun-control-1.3B")


def test_a_camera_file_that_is_wrong_or_short_is_named_with_its_line(folder):
    keys = 'camera_directory = "cameras"'
    for name in "ab":
        (folder / f"cameras/{name}.txt").write_text(ENTRY * 5)
    assert len(plan_of(keys, "fun-camera-1.3B").clips) == 2
    (folder / "cameras/b.txt").write_text(ENTRY * 4)
    with pytest.raises(InputError, match=r"cameras/b\.txt has 4 camera entries, but the clips of clips/b\.mp4 use 5"):
        plan_of(keys, "fun-camera-1.3B")
    (folder / "cameras/b.txt").write_text(ENTRY * 4 + ENTRY.replace(" 0.5", "", 1))
    with pytest.raises(InputError, match=r"cameras/b\.txt, line 5: expected 19 numbers"):
        plan_of(keys, "fun-camera-1.3B")


def test_a_broken_reference_is_found_in_the_plan(folder):
    (folder / "references/a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"references/a\.png is an incomplete image"):
        plan_of('reference_directory = "references"', "vace-1.3B")


def test_images_take_controls_and_references_too(folder):
    for kind in ("stills", "controls", "references"):
        (folder / kind).mkdir(exist_ok=True)
        draw_image(folder / kind / "s.png")
    toml = '[[datasets]]\nimage_directory = "stills"\nresolution = 64\ncontrol_directory = "controls"\n'
    config = configure('reference_directory = "references"', "fun-control-1.3B", toml)
    (clip,) = plan_clips(config, list_items(config, allow_missing_captions=True)).clips
    assert (clip.item.control, clip.item.references) == (Path("controls/s.png"), (Path("references/s.png"),))


def test_control_models_are_not_trained_on_one_frame_of_several():
    row = VARIANTS["i2v-14B-FC"]
    path = write_toml(Path("data.toml"), '[[datasets]]\nimage_directory = "clips"\nresolution = [64, 48]\n')
    with pytest.raises(InputError, match=r"--one_frame needs a Wan2\.1 image task"):
        read_config(path, images=row.images, control=row.control, one_frame=True)
