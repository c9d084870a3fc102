"""How tokens are shared out: every token is in one share, groups stay groups, padding is known."""

import pytest
import torch

from wan_train.distributed.ring import attend_with_sums, joined
from wan_train.distributed.sequence import Layout, join_shares, take_share
from wan_train.models.dit.attention import attend_torch
from wan_train.models.dit.elementwise import modulate

LAYOUTS = [(45, 1, 2), (45, 3, 2), (45, 3, 4), (12, 3, 4), (5, 1, 4), (7, 7, 3)]


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_shares_make_the_sequence(sizes: tuple[int, int, int]) -> None:
    layout = Layout(*sizes)
    tokens = torch.arange(2.0 * layout.num_tokens * 3).view(2, layout.num_tokens, 3)
    shares = torch.stack([take_share(tokens, layout, share) for share in range(layout.num_shares)])
    assert shares.shape[2] == layout.share
    assert torch.equal(join_shares(shares, layout), tokens)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_what_is_no_padding_is_each_token_once(sizes: tuple[int, int, int]) -> None:
    layout = Layout(*sizes)
    every = list(range(layout.num_shares))
    sources = torch.cat([layout.sources(share) for share in every])
    assert sources[layout.real(every)].sort().values.tolist() == list(range(layout.num_tokens))
    assert layout.is_padded == (len(sources) > layout.num_tokens)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_modulation_by_groups_is_the_same_on_a_share(sizes: tuple[int, int, int]) -> None:
    layout, (shift, scale) = Layout(*sizes), torch.randn(2, 1, sizes[1], 4)
    tokens = torch.randn(1, layout.num_tokens, 4)
    for share in range(layout.num_shares):
        ours = modulate(take_share(tokens, layout, share), shift, scale)
        assert torch.equal(ours, take_share(modulate(tokens, shift, scale), layout, share))


def test_unequal_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="are not divisible"):
        Layout(10, 3, 2)


@pytest.mark.parametrize("kind", ["cpu", ""])
def test_attention_to_parts_of_the_keys_is_put_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel of CPUs, and by plain products; scores of some hundreds, whose exponentials overflow."""
    if not kind:
        monkeypatch.delitem(attend_with_sums.__globals__["_KERNELS"], "cpu")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, 3, 8) for count in (5, 9, 9))
    query[:, 0] *= 300
    parts = [attend_with_sums(query, key[:, part], value[:, part]) for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
    out, sums = parts[0]
    for more, more_sums in parts[1:]:
        out, sums = joined(out, sums, more, more_sums)
    torch.testing.assert_close(out, attend_torch(query, key, value), atol=1e-5, rtol=1e-5)
