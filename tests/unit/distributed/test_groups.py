import pytest

from wan_train.distributed.groups import check_product
from wan_train.distributed.settings import ParallelSettings
from wan_train.errors import InputError


def test_sizes_that_multiply_to_the_processes_pass() -> None:
    check_product(ParallelSettings(), 1)
    check_product(ParallelSettings(ulysses_size=2, ring_size=3, cfg_size=2, data_parallel=2), 24)


@pytest.mark.parametrize(
    ("sizes", "processes", "reason"),
    [
        ({}, 4, "4 processes are running, but no option splits the work"),
        ({"ulysses_size": 2}, 4, "--ulysses_size 2 = 2, but 4 processes are running"),
        ({"ring_size": 2, "cfg_size": 2}, 1, "--ring_size 2 x --cfg_size 2 = 4, but 1 process is running: start 4"),
    ],
)
def test_another_product_is_named(sizes: dict[str, int], processes: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_product(ParallelSettings(**sizes), processes)
