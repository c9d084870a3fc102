"""What several processes agree on before they do it together."""

from collections.abc import Sequence

import torch.distributed as dist

from wan_train.distributed.groups import Split


def union(items: Sequence[str], split: Split) -> list[str]:
    """Return what any of the processes has, once each and in the same order in all; all of them have to call this."""
    if split.group is None:
        return list(items)
    found: list[Sequence[str]] = [()] * split.size
    dist.all_gather_object(found, list(items), group=split.group)
    return list(dict.fromkeys(item for some in found for item in some))
