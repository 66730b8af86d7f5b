"""What a training step leaves to chance in the model, drawn for each example by a seed of its own where it has one: the
same in whichever process and company the example is."""

import torch

# One name for each thing that is drawn.
PURPOSES = (
    "modality is dropped",
    "which modality",
    "frame tokens",
    "title tokens",
    "parallel mask",
    "empty slots",
)


def seeded_uniform(
    purpose: str, size: tuple[int, ...], seeds: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Numbers of [0, 1).

    Args:
        purpose: of `PURPOSES`; draws for different ones are independent.
        size: `(batch,)` or `(batch, draws of an example)`.
        seeds: `[batch]`, whole numbers; the process's own random state if not given.

    Returns:
        A tensor of `size`. With seeds an example's first draws are the same however many follow.
    """
    if seeds is None:
        return torch.rand(size, device=device)
    draws = size[1] if len(size) > 1 else 1
    # SplitMix64 (Steele, Lea and Flood, 2014), counting on from where the seed and the purpose say.
    place = torch.arange(draws, device=device) * len(PURPOSES) + PURPOSES.index(purpose)
    start = _mix(seeds.to(device=device, dtype=torch.int64))
    bits = _mix(start[:, None] + (place + 1) * _signed(0x9E3779B97F4A7C15))
    # The upper 24 bits, all that a float holds.
    return (_shifted(bits, 40).float() * 2**-24).view(size)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, places: int) -> torch.Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (value >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number, which products wrap around to."""
    return value - (1 << 64) if value >= 1 << 63 else value
