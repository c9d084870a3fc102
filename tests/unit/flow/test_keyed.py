import torch

from wan_train.flow.keyed import generator_of


def test_the_key_alone_decides() -> None:
    torch.manual_seed(1)
    first = torch.rand(4, generator=generator_of("5/0/clip"))
    torch.manual_seed(2)
    assert torch.equal(torch.rand(4, generator=generator_of("5/0/clip")), first)
    assert not torch.equal(torch.rand(4, generator=generator_of("5/1/clip")), first)


def test_the_seed_of_a_key_never_changes() -> None:
    """Runs that resume count on it."""
    assert generator_of("5/0/0/cache/clip").initial_seed() == 619769511475031830
