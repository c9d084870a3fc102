"""A folder for what inductor compiles."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from wan_train.compile import check_compile, log_cache_use
from wan_train.compile_cache import describe_use, forget_counts, use_cache
from wan_train.errors import InputError
from wan_train.placement.settings import CompileSettings


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def compute(settings: CompileSettings) -> tuple[torch.Tensor, str]:
    """What a compiled function returns in a run of its own, and what is said of the cache."""
    torch._dynamo.reset()
    counters.clear()
    check_compile(settings, device="cpu")
    assert settings.compile_cache is not None
    out = torch.compile(torch.mm)(*torch.arange(8.0).view(2, 2, 2))  # no kernel that a C++ compiler is called for
    return out, describe_use(settings.compile_cache)


def test_inductor_keeps_its_files_there_and_the_trial_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    use_cache(str(folder))
    assert Path(cache_dir()) == folder and folder.is_dir()
    counters["inductor"].update(fxgraph_cache_hit=1, fxgraph_cache_miss=1)
    forget_counts()
    assert describe_use("x") == "compile cache x: 0 of 0 graphs loaded"
    counters["inductor"].update(fxgraph_cache_hit=3, fxgraph_cache_miss=2)
    assert describe_use("x") == "compile cache x: 3 of 5 graphs loaded, 2 compiled and added"


@pytest.mark.slow  # a new folder has a new precompiled header of torch's
def test_a_second_run_finds_the_graphs_of_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = CompileSettings(compile=True, compile_cache=str(tmp_path / "cache"))
    first, told = compute(settings)
    assert told == f"compile cache {tmp_path / 'cache'}: 0 of 1 graphs loaded, 1 compiled and added"
    assert (tmp_path / "cache" / "fxgraph").is_dir()
    second, told = compute(settings)
    assert told == f"compile cache {tmp_path / 'cache'}: 1 of 1 graphs loaded"
    assert torch.equal(first, second)
    log_cache_use(settings)
    assert [each for each in caplog.messages if each.startswith("compile cache")] == [told]


def test_it_is_for_inductor(tmp_path: Path) -> None:
    settings = CompileSettings(compile=True, compile_backend="aot_eager", compile_cache=str(tmp_path))
    with pytest.raises(InputError, match=r"--compile_cache .* inductor compiles, not --compile_backend aot_eager:"):
        check_compile(settings, device="cpu")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = CompileSettings(compile=True, compile_cache=str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"cannot write to {tmp_path / 'file'}"):
        check_compile(settings, device="cpu")


def test_without_compilation_it_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = CompileSettings(compile_cache=str(tmp_path / "cache"))
    check_compile(settings, device="cpu")
    log_cache_use(settings)
    assert caplog.messages == ["--compile_cache has no effect without --compile"]
    assert not (tmp_path / "cache").exists()
