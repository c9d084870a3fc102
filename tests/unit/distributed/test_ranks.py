import pytest

from wan_train.distributed.ranks import Place, find_place, first_machine_share


def test_a_process_alone_has_everything(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_place() == Place(0, 1, 0)
    assert find_place().share("abc") == ["a", "b", "c"]


def test_the_place_is_what_the_launcher_says(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert find_place() == Place(5, 8, 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("num_parts", [0, 1, 6, 7, 100])
def test_all_processes_together_have_each_part_once(num_parts, num_ranks):
    shares = [Place(rank, num_ranks).share(range(num_parts)) for rank in range(num_ranks)]
    assert sorted(part for share in shares for part in share) == list(range(num_parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_first_machine_shares_among_its_own_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    shares = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        shares.append(first_machine_share("abcde"))
    assert shares == [["a", "c", "e"], ["b", "d"], [], []]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert first_machine_share("abcde") == ["d"]


def test_a_process_alone_shares_with_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert first_machine_share("abc") == ["a", "b", "c"]
