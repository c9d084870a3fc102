import pytest

from dataset.config import read_config
from tests.unit.dataset.drawing import write_toml
from wan_train.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with clips/ and stills/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "stills").mkdir()
    return tmp_path


def read(folder, text):
    return read_config(write_toml(folder / "data.toml", text))


def test_defaults_are_those_that_users_know(folder):
    (config,) = read(folder, '[[datasets]]\nvideo_directory = "clips"')
    assert config.is_video and config.number == 1
    assert config.cache_directory == config.directory
    assert (config.resolution, config.batch_size, config.num_repeats) == ((960, 544), 1, 1)
    assert (config.enable_bucket, config.bucket_no_upscale) == (False, False)
    assert (config.target_frames, config.frame_extraction, config.frame_sample) == ((1,), "head", 1)
    assert config.source_fps is None


def test_general_holds_where_a_dataset_says_nothing(folder):
    text = """
    [general]
    resolution = [832, 480]
    caption_extension = ".caption"
    batch_size = 4
    enable_bucket = true
    [[datasets]]
    video_directory = "clips"
    cache_directory = "cache/clips"
    target_frames = [1, 25, 45]
    source_fps = 30
    [[datasets]]
    image_directory = "stills"
    resolution = 512
    batch_size = 2
    num_repeats = 3
    enable_bucket = false
    """
    videos, images = read(folder, text)
    assert (videos.resolution, videos.batch_size, videos.enable_bucket) == ((832, 480), 4, True)
    assert (videos.source_fps, str(videos.cache_directory)) == (30.0, "cache/clips")
    assert isinstance(videos.source_fps, float)
    assert (images.resolution, images.batch_size, images.num_repeats) == ((512, 512), 2, 3)
    assert (images.is_video, images.enable_bucket, images.caption_extension) == (False, False, ".caption")


def test_whole_numbers_may_stand_for_others(folder):
    lines = "weight = 2\ncaption_dropout_rate = 0\nsource_fps = 24"
    (config,) = read(folder, f'[[datasets]]\nvideo_directory = "clips"\n{lines}')
    assert [repr(n) for n in (config.weight, config.caption_dropout_rate, config.source_fps)] == ["2.0", "0.0", "24.0"]


def test_target_frames_are_floored_sorted_and_distinct_with_a_warning(folder, capsys):
    (config,) = read(folder, '[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [45, 24, 21, 1]')
    assert config.target_frames == (1, 21, 45)
    assert "24 to 21" in capsys.readouterr().err


def test_fitting_target_frames_give_no_warning(folder, capsys):
    read(folder, '[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [1, 25]')
    assert capsys.readouterr().err == ""


def test_uniform_with_one_sample_says_that_it_is_head(folder, capsys):
    read(folder, '[[datasets]]\nvideo_directory = "clips"\nframe_extraction = "uniform"')
    assert "head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "idle"),
    [
        ("frame_stride = 4", "frame_stride"),
        ('frame_extraction = "chunk"\nmax_frames = 9', "max_frames"),
        ('frame_extraction = "full"\ntarget_frames = [9]', "target_frames"),
        ('frame_extraction = "slide"\nframe_stride = 4', ""),
        ('frame_extraction = "full"\nmax_frames = 9', ""),
    ],
)
def test_keys_that_change_nothing_are_told(folder, capsys, lines, idle):
    read(folder, f'[[datasets]]\nvideo_directory = "clips"\n{lines}')
    error = capsys.readouterr().err
    assert (idle in error and "has no effect" in error) if idle else error == ""


def test_a_caption_extension_may_lack_its_dot(folder):
    (config,) = read(folder, '[[datasets]]\nvideo_directory = "clips"\ncaption_extension = "txt"')
    assert config.caption_extension == ".txt"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("batchsize = 2", ["dataset 1", "batchsize", "did you mean batch_size"]),
        ("zzz = 2", ["dataset 1", "zzz", "valid names: resolution"]),
        ("batch_size = 0", ["dataset 1", "batch_size = 0", "1 or more"]),
        ("batch_size = true", ["batch_size", "integer"]),
        ("batch_size = 2.0", ["batch_size", "integer"]),
        ('num_repeats = "2"', ["num_repeats", "integer"]),
        ("enable_bucket = 1", ["enable_bucket", "true or false"]),
        ("resolution = [832]", ["resolution", "width, height"]),
        ("resolution = [832, 0]", ["resolution", "16 or more"]),
        ("resolution = [832, 470]", ["resolution", "[832, 464]"]),
        ("target_frames = []", ["target_frames"]),
        ("target_frames = [0]", ["target_frames", "1 or more"]),
        ("target_frames = [2.5]", ["target_frames", "integers"]),
        ('frame_extraction = "heads"', ["frame_extraction", "did you mean head"]),
        ("frame_extraction = 3", ["frame_extraction", "head, chunk"]),
        ("frame_sample = 0", ["frame_sample"]),
        ("frame_stride = 0", ["frame_stride", "1 or more"]),
        ("max_frames = 2.5", ["max_frames", "integer"]),
        ("source_fps = 0", ["source_fps", "above 0"]),
        ("source_fps = nan", ["source_fps"]),
        ("source_fps = inf", ["source_fps"]),
        ('image_directory = "stills"', ["set exactly one of video_directory, image_directory"]),
        ("cache_directory = 3", ["cache_directory", "folder"]),
        ('caption_extension = ""', ["caption_extension"]),
        ("caption_prefix = 3", ["caption_prefix", "string in quotes"]),
        ('caption_variants = "line"', ["caption_variants", "did you mean lines"]),
        ("caption_dropout_rate = 1.5", ["caption_dropout_rate", "0 to 1"]),
        ("caption_dropout_rate = true", ["caption_dropout_rate", "0 to 1"]),
        ("caption_dropout_rate = nan", ["caption_dropout_rate", "0 to 1"]),
        ("weight = 0", ["weight", "above 0"]),
        ("weight = inf", ["weight", "above 0"]),
        ("drop_last = 1", ["drop_last", "true or false"]),
        ('recursive = "yes"', ["recursive", "true or false"]),
    ],
)
def test_a_bad_line_is_named_with_its_dataset_and_the_way_out(folder, line, parts):
    with pytest.raises(InputError) as raised:
        read(folder, f'[[datasets]]\nvideo_directory = "clips"\n{line}')
    assert all(part in str(raised.value) for part in ("data.toml", *parts)), str(raised.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[[datasets]]\nbatch_size = 1", ["dataset 1", "video_directory"]),
        ('[[datasets]]\nvideo_directory = "nowhere"', ["dataset 1", "no such folder", "nowhere"]),
        ('[[datasets]]\nimage_directory = "stills"\ntarget_frames = [1]', ["target_frames", "videos"]),
        ('[general]\ntarget_frames = [1]\n[[datasets]]\nvideo_directory = "clips"', ["[general]", "target_frames"]),
        ('[general]\nweight = 1\n[[datasets]]\nvideo_directory = "clips"', ["[general]", "weight"]),
        ('[general]\nbatchsize = 1\n[[datasets]]\nvideo_directory = "clips"', ["[general]", "batch_size"]),
        ('[genral]\nbatch_size = 1\n[[datasets]]\nvideo_directory = "clips"', ["genral", "general"]),
        ('[datasets]\nvideo_directory = "clips"', ["[[datasets]]"]),
        ("[general]\nbatch_size = 1", ["no datasets"]),
        ('[[datasets]]\nvideo_directory = "clips"\nbatch_size = = 1', ["not valid TOML", "line 3"]),
        ('[[datasets]]\nvideo_directory = "clips"\n[[datasets]]\nvideo_directory = "./clips"', ["datasets 1 and 2"]),
        (
            '[[datasets]]\nvideo_directory = "clips"\n[[datasets]]\nimage_directory = "stills"\nbatch_size = -1',
            ["dataset 2", "batch_size"],
        ),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(folder, text, parts):
    with pytest.raises(InputError) as raised:
        read(folder, text)
    assert all(part in str(raised.value) for part in ("data.toml", *parts)), str(raised.value)


def test_a_resolution_off_the_grid_is_fine_with_buckets(folder):
    (config,) = read(folder, '[[datasets]]\nvideo_directory = "clips"\nresolution = [830, 470]\nenable_bucket = true')
    assert config.resolution == (830, 470)


def test_a_missing_file_and_one_that_is_not_text(folder):
    with pytest.raises(InputError, match=r"none\.toml"):
        read_config(folder / "none.toml")
    (folder / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_config(folder / "bad.toml")
