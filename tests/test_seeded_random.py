"""Random numbers that follow from each example's seed."""

import torch

from modeling_optsg.seeded_random import PURPOSES, seeded_uniform

CPU = torch.device("cpu")
SEEDS = torch.tensor([3, 2**55 + 1, 4, 3])


def test_numbers_depend_on_the_seed_and_not_on_the_batch():
    for purpose in PURPOSES:
        numbers = seeded_uniform(purpose, (4, 5000), SEEDS, CPU)
        assert torch.equal(numbers[0], numbers[3]) and not torch.equal(numbers[0], numbers[2])
        assert torch.equal(seeded_uniform(purpose, (2, 9), SEEDS[1:3], CPU), numbers[1:3, :9])


def test_numbers_are_uniform_and_purposes_independent():
    numbers = [seeded_uniform(purpose, (3, 5000), SEEDS[:3], CPU).flatten() for purpose in PURPOSES]
    for own in numbers:
        assert 0 <= own.min() and own.max() < 1
        ratios = torch.histc(own, bins=10, min=0, max=1) / own.numel()
        assert (ratios - 0.1).abs().max() < 0.01
    correlations = torch.corrcoef(torch.stack(numbers))
    assert (correlations - torch.eye(len(numbers))).abs().max() < 0.05


def test_numbers_of_consecutive_seeds_are_independent():
    numbers = seeded_uniform("attention mask", (20_000,), torch.arange(20_000), CPU)
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 0.02
