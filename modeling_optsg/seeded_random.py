"""Random numbers that depend on each example's own seed, not on the batch or the process that it is in."""

import hashlib

import torch

# Each purpose has its own stream of numbers. The order is part of the stream: append, never reorder.
PURPOSES = (
    "modality dropout",
    "dropped modality",
    "frame token dropout",
    "title token dropout",
    "attention mask",
    "pad slots",
    "pooled title",
)


def example_seed(seed: int, epoch: int, example: int | str) -> int:
    """Return the 56-bit random seed of an example in an epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{example}".encode(), digest_size=7).digest(), "big")


def seeded_uniform(
    purpose: str, size: tuple[int, ...], seeds: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Draw uniform numbers in [0, 1).

    Args:
        purpose: One of `PURPOSES`. Numbers drawn for different purposes are independent.
        size: `(batch,)` or `(batch, draws per example)`.
        seeds: `[batch]`, integers. Without seeds the numbers come from torch's global generator.
        device: Device of the result.

    Returns:
        A tensor of `size`. With seeds, the first draws of an example do not depend on how many follow.
    """
    if seeds is None:
        return torch.rand(size, device=device)
    draws = size[1] if len(size) > 1 else 1
    # SplitMix64 (Steele, Lea and Flood, 2014); the purposes interleave in one sequence per seed.
    index = torch.arange(draws, device=device) * len(PURPOSES) + PURPOSES.index(purpose)
    start = _mix(seeds.to(device=device, dtype=torch.int64))
    bits = _mix(start[:, None] + (index + 1) * _as_signed(0x9E3779B97F4A7C15))
    # A float32 holds the upper 24 bits.
    return (_logical_right_shift(bits, 40).float() * 2**-24).view(size)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _logical_right_shift(value, 30)) * _as_signed(0xBF58476D1CE4E5B9)
    value = (value ^ _logical_right_shift(value, 27)) * _as_signed(0x94D049BB133111EB)
    return value ^ _logical_right_shift(value, 31)


def _logical_right_shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right and fill with zeros; torch's `>>` copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _as_signed(value: int) -> int:
    """Read an unsigned 64-bit constant as a signed one, as torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value
