"""What the counting mode makes of single operators."""

import pytest
import torch
from torch import Tensor

from benchmarks.counting import Counting, Rates, flash_attention


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_an_elementwise_operator_is_a_kernel_with_the_bytes_it_reads_and_writes() -> None:
    x = meta(10, 20)
    with Counting() as counting:
        x * x.new_empty(1, 20).expand(10, 20)
    assert counting.counts.kernels == 1
    assert counting.counts.elementwise_bytes == 4 * (200 + 20 + 200)
    assert counting.counts.flops == 0


def test_views_and_allocations_are_free() -> None:
    with Counting() as counting:
        meta(4, 6).flatten().unflatten(0, (2, 12)).transpose(0, 1).expand(12, 2).detach()
    assert counting.counts.kernels == 0


def test_a_copy_reads_only_its_source() -> None:
    with Counting() as counting:
        meta(8).copy_(meta(8, dtype=torch.float16))
    assert counting.counts.elementwise_bytes == 8 * 4 + 8 * 2


def test_memory_for_a_result_is_not_read() -> None:
    x, y = meta(8), meta(8)
    with Counting() as counting:
        torch.mul(x, y, out=x)
    assert counting.counts.elementwise_bytes == 3 * 8 * 4


@pytest.mark.parametrize("in_place", [False, True])
def test_products_have_flops_and_no_elementwise_bytes(in_place: bool) -> None:
    total, left, right = meta(4, 6), meta(4, 5), meta(5, 6)
    with Counting() as counting:
        total.addmm_(left, right) if in_place else torch.addmm(total, left, right)
    assert counting.counts.flops == 2 * 4 * 5 * 6
    assert counting.counts.elementwise_bytes == 0


def test_attention_is_counted_forward_and_backward() -> None:
    query, key = (meta(1, 2, length, 8, dtype=torch.bfloat16).requires_grad_() for length in (32, 16))
    with flash_attention(), Counting() as counting:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, key)
        forward = counting.counts.flops
        out.backward(torch.empty_like(out))
    assert forward == 4 * 2 * 32 * 16 * 8
    assert counting.counts.flops - forward == 10 * 2 * 32 * 16 * 8
    assert {"attention", "attention backward"} < set(counting.counts.seconds)


def test_copies_to_the_device_and_waits_for_it() -> None:
    on_host = torch.ones(3)
    with Counting() as counting:
        x = on_host.to("meta")
        assert (counting.counts.copies, counting.counts.waits) == (1, 0)
        x.sum().item()
    assert (counting.counts.copies, counting.counts.waits) == (1, 1)


def test_work_of_the_host_is_not_counted() -> None:
    with Counting() as counting:
        torch.ones(3) * 2
    assert counting.counts.kernels == 0


def test_a_group_is_one_kernel() -> None:
    def group(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).exp() + x

    with Counting() as counting:
        counting.as_one_kernel(group)(meta(5), meta(5))
    assert counting.counts.kernels == 1
    assert counting.counts.elementwise_bytes == 3 * 5 * 4


def test_seconds_are_those_of_the_slower_of_work_and_memory() -> None:
    rates = Rates(products=10.0, memory=1.0, launch=0.5)
    assert rates.seconds("products", 100, 3, float32=False) == 10.5
    assert rates.seconds("products", 10, 3, float32=False) == 3.5
