import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from wan_train.errors import InputError
from wan_train.training.reporting.settings import HubSettings
from wan_train.training.saving import hub
from wan_train.training.saving.hub import HubFolder, check_hub, fetch_state, open_hub, parse_hub_path


class LocalHub:
    """The hub's client, on a local folder; it takes what the real one takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fails, self.token = folder, False, ""
        self.private: dict[str, bool] = {}
        self.gate = threading.Event()
        self.gate.set()

    def _root(self, repo_id: str, repo_type: str) -> Path:
        return self.folder / repo_type / repo_id

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.fails:
            raise PermissionError("401 Client Error: wrong token\nmore")
        self.private[repo_id] = private
        self._root(repo_id, repo_type).mkdir(parents=True, exist_ok=True)

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        self.gate.wait(10)
        if self.fails:
            raise ConnectionError("no network\nmore")
        target = self._root(repo_id, repo_type) / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(path_or_fileobj).read_bytes())

    def upload_folder(self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        for path in Path(folder_path).iterdir():
            self.upload_file(
                path_or_fileobj=str(path),
                path_in_repo=f"{path_in_repo}/{path.name}",
                repo_id=repo_id,
                repo_type=repo_type,
            )

    def snapshot_download(self, repo_id: str, *, repo_type: str, revision: str, allow_patterns: str) -> str:
        if self.fails or revision != "main":
            raise FileNotFoundError("404 Client Error")
        assert list(self._root(repo_id, repo_type).glob(allow_patterns)) or "absent" in allow_patterns
        return str(self._root(repo_id, repo_type))

    def held(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    found = LocalHub(tmp_path / "hub")

    def make(token: str | None) -> LocalHub:
        found.token = token or ""
        return found

    monkeypatch.setattr(hub, "make_client", make)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A file and a state as a run leaves them."""
    file, state = tmp_path / "name.safetensors", tmp_path / "name-state"
    file.write_bytes(b"weights")
    state.mkdir()
    (state / "manifest.json").write_text("{}")
    return file, state


def settings(**options: Any) -> HubSettings:
    return HubSettings(**({"huggingface_repo_id": "me/mine"} | options))


def test_files_are_copied_into_the_path(local: LocalHub, saved: tuple[Path, Path]) -> None:
    made = open_hub(settings(huggingface_path_in_repo="runs/a/", huggingface_token="secret"))
    assert made is not None
    for path in saved:
        made.upload(path)
    made.finish()
    assert local.held() == {"model/me/mine/runs/a/name.safetensors"}
    assert (local.private, local.token) == ({"me/mine": True}, "secret")


def test_states_are_copied_if_asked_for_and_come_back(local: LocalHub, saved: tuple[Path, Path]) -> None:
    options = settings(
        save_state_to_huggingface=True, huggingface_repo_type="dataset", huggingface_repo_visibility="public"
    )
    made = open_hub(options)
    assert made is not None
    made.upload(saved[1])
    assert local.held() == {"dataset/me/mine/name-state/manifest.json"}
    assert local.private == {"me/mine": False}
    folder = fetch_state("me/mine/name-state:main:dataset", "other")
    assert ((folder / "manifest.json").read_text(), local.token) == ("{}", "other")


def test_what_is_removed_before_its_turn_is_said_to_be_so(
    local: LocalHub, saved: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    made = open_hub(settings(), background=True)
    assert made is not None
    later = saved[0].with_name("later.safetensors")
    later.write_bytes(b"weights")
    local.gate.clear()
    made.upload(saved[0])
    made.upload(later)
    later.unlink()
    local.gate.set()
    made.finish()
    assert local.held() == {"model/me/mine/name.safetensors"}
    (told,) = [record.getMessage() for record in caplog.records if "later" in record.getMessage()]
    assert "was removed before" in told and "still here" not in told


@pytest.mark.parametrize("background", [False, True], ids=["asked for", "with several processes"])
def test_copies_wait_for_nobody_and_the_end_waits_for_them(
    local: LocalHub, saved: tuple[Path, Path], background: bool
) -> None:
    made = open_hub(settings(async_upload=not background), background=background)
    assert made is not None
    local.gate.clear()
    made.upload(saved[0])
    assert local.held() == set()
    local.gate.set()
    made.finish()
    assert local.held() == {"model/me/mine/name.safetensors"}


@pytest.mark.parametrize("later", [False, True])
def test_a_copy_that_fails_is_a_warning(
    local: LocalHub, saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str], later: bool
) -> None:
    made = open_hub(settings(async_upload=later, huggingface_token="secret"))
    assert made is not None
    local.fails = True
    made.upload(saved[0])
    made.finish()
    told = capsys.readouterr().err
    assert "WARNING" in told and "name.safetensors could not be uploaded to me/mine" in told and "no network" in told
    assert "secret" not in told and "more" not in told


def test_a_hub_that_refuses_is_told_before_training(local: LocalHub) -> None:
    local.fails = True
    with pytest.raises(
        InputError, match=r"--huggingface_repo_id me/mine cannot be used: 401 Client Error: wrong token;"
    ):
        open_hub(settings())
    with pytest.raises(InputError, match="cannot be downloaded: 404"):
        fetch_state("me/mine/name-state", None)
    local.fails = False
    open_hub(settings())
    with pytest.raises(InputError, match="has no folder absent at main"):
        fetch_state("me/mine/absent", None)


def test_nothing_is_asked_of_the_hub_unless_an_option_says_so(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(hub, "make_client", lambda token: pytest.fail("asked for"))
    assert open_hub(HubSettings()) is None
    script = "import sys, wan_train.training.saving.hub; assert 'huggingface_hub' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 0


def test_the_real_client_takes_what_the_local_one_takes() -> None:
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "upload_file", "upload_folder", "snapshot_download"):
        ours, theirs = (set(inspect.signature(getattr(kind, name)).parameters) for kind in (LocalHub, HfApi))
        assert ours <= theirs


def test_places_on_the_hub() -> None:
    assert parse_hub_path("me/mine/a/b-state:v2:dataset") == HubFolder("me/mine", "a/b-state", "v2", "dataset")
    assert parse_hub_path("me/mine/s") == parse_hub_path("me/mine/s:") == HubFolder("me/mine", "s", "main", "model")
    for wrong in ("me/mine", "me", "me//x", "me/mine/s:main:zip", "me/mine/s:main:model:more"):
        with pytest.raises(InputError, match="not a hub path"):
            parse_hub_path(wrong)


@pytest.mark.parametrize(
    ("options", "resume", "told"),
    [
        ({"huggingface_repo_id": None, "async_upload": True}, None, "--async_upload needs --huggingface_repo_id"),
        ({"huggingface_repo_id": None, "save_state_to_huggingface": True}, None, "--save_state_to_huggingface needs"),
        ({"huggingface_repo_id": "mine"}, None, "is not OWNER/NAME"),
        ({"resume_from_huggingface": True}, None, "needs --resume"),
        ({"resume_from_huggingface": True}, "auto", "not a hub path"),
    ],
)
def test_options_that_make_no_sense_together(options: dict[str, Any], resume: str | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_hub(settings(**options), resume)


def test_options_that_do() -> None:
    check_hub(HubSettings(), "auto")
    check_hub(settings(async_upload=True, resume_from_huggingface=True), "me/mine/s:main:model")
    assert open_hub(HubSettings()) is None
