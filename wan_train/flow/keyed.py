"""Keyed random numbers: the same on every rank, in every batch and after a restart, without stored state."""

import hashlib

import torch


def generator_of(key: str, *, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded with `seed_of(key)`."""
    return torch.Generator(device).manual_seed(seed_of(key))


def seed_of(key: str) -> int:
    """Return 63 bits of the key's BLAKE2b digest."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
