"""The table of shapes beside plain counts, and the ranks of a budget beside trying every combination."""
import itertools
from dataclasses import replace

import pytest
import torch

from experiments.peers import even_ranks
from kronygpt import budget
from kronygpt.configurator import UserError
from model import KINDS, KronyGPT, KronyGPTConfig, mlp_shapes

CONFIG = KronyGPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
TINY = KronyGPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=6, n_inner=10)


def n_parameters(config, shapes=None):
    """In a file, where low rank, (m, 1, r) or (1, n, r), has r (m + n - r) numbers and a bias."""
    config = replace(config, shapes=config.shapes | (shapes or {}))
    total = (config.vocab_size + config.block_size + 2 + 4 * config.n_layer) * config.n_embd
    for layer in range(config.n_layer):
        for kind, (m, n) in config.sizes(layer).items():
            dim_1, dim_2, r = config.shapes[kind][layer]
            is_low_rank = (dim_1, dim_2) in ((m, 1), (1, n)) and r < m
            sides = r * (dim_1 * dim_2 + m * n // (dim_1 * dim_2))
            total += n + (m * n if (dim_1, dim_2, r) == (m, n, 1) else sides - is_low_rank * r * r)
    return total


@pytest.mark.parametrize("n_layer, n_embd, limit", [(2, 16, 6_000), (12, 768, 82_000_000), (48, 1600, 1_000_000_000)])
def test_table_lists_every_shape_that_comes_near_the_budget(n_layer, n_embd, limit):
    config = KronyGPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 16, vocab_size=CONFIG.vocab_size)
    hidden, dense = 4 * n_embd, n_parameters(config)
    rest = dense - 2 * n_layer * n_embd * hidden
    limit += rest if n_layer == 2 else 0

    def divisors(n):
        return [d for d in range(1, n + 1) if n % d == 0]

    expected, largest = set(), int(1.01 * limit)
    for dim_1, dim_2 in itertools.product(divisors(n_embd), divisors(hidden)):
        a, b = dim_1 * dim_2, n_embd * hidden // (dim_1 * dim_2)
        is_low_rank = (dim_1, dim_2) in ((n_embd, 1), (1, hidden))
        sizes = {r: rest + n_layer * (2 * r * (a + b) - is_low_rank * r * r * (1 + (r < n_embd)))
                 for r in range(1, min(a, b) + 1)}
        fitting = [r for r, size in sizes.items() if size <= largest]
        total = sizes[max(fitting, default=1)]
        if fitting and total >= 0.99 * limit:
            expected.add((total, dim_1, dim_2, max(fitting)))
    found = budget.shapes_within(config, limit)
    assert {(size, *shape) for size, shape, _ in found} == expected
    assert len(found) == len(expected) > 1
    size, (dim_1, dim_2, r), _ = found[-1]
    assert n_parameters(config, mlp_shapes(dim_1, dim_2, [r] * n_layer)) == size


def test_table_begins_with_the_shapes_that_people_ask_for():
    sizes, shapes, costs = zip(*budget.shapes_within(KronyGPTConfig(), 82_000_000))
    assert list(zip(sizes, shapes))[:2] == [(81_972_576, (768, 768, 1)), (82_790_304, (768, 1, 170))]
    assert round(costs[0], 2) == 0.25 and list(costs[2:]) == sorted(costs[2:])


@pytest.mark.parametrize("text, number", [
    ("67M", 67_000_000), ("67.9M", 67_900_000), ("1.5B", 1_500_000_000), ("900K", 900_000), ("82000000", 82_000_000),
    ("1.716m", 1_716_000), ("66%", 6_600)])
def test_a_budget_is_a_number(text, number):
    assert budget.parse_budget(text, 10_000) == number


@pytest.mark.parametrize("text", ["0.6", "0", "-82M", "M", "", "half", "82MB", "nan", "inf%"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UserError, match="takes a number of parameters such as 82M or 66%"):
        budget.parse_budget(text, 10_000)


class Spectra:
    """Statistics with given squared singular values, {name of a matrix: σ², descending}."""

    fisher = None

    def __init__(self, spectra):
        self.spectra = spectra

    def spectrum(self, name, matrix):
        return self.spectra[name]


def random_statistics(config, kinds, seed):
    """Spectra that fall at a rate of their own in each matrix."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return Spectra({f"transformer.h.{layer}.{kind}": torch.rand(()) * 10 ** -torch.linspace(
        0, 1 + 3 * torch.rand((), generator=generator).item(), min(config.sizes(0)[kind])).double()
        for layer in range(config.n_layer) for kind in kinds})


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_lose_little_more_than_the_best_of_all_combinations(share, seed):
    statistics = random_statistics(TINY, KINDS, seed)
    dense, least = n_parameters(TINY), n_parameters(TINY, {kind: [(m, 1, 1)] for kind, (m, n) in TINY.sizes(0).items()})
    limit = int(least + share * (dense - least))
    plan, = budget.plan_widths(KronyGPT(TINY), [limit], statistics, ())

    choices = []  # of each matrix: (parameters, loss), by rank, and dense
    for kind, (m, n) in TINY.sizes(0).items():
        values = statistics.spectra[f"transformer.h.0.{kind}"]
        ranks = [r for r in range(1, len(values)) if r * (m + n) <= m * n]
        choices.append([*((r * (m + n - r), values[r:].sum().item() / 2) for r in ranks), (m * n, 0.0)])
        (_, dim_2, r), = plan.shapes[kind]
        assert (m * n if dim_2 == n else r * (m + n - r), pytest.approx(plan.losses[kind][0])) in choices[-1]
    spare = limit - dense + sum(m * n for m, n in TINY.sizes(0).values())
    best = min(sum(loss for _, loss in combination) for combination in itertools.product(*choices)
               if sum(size for size, _ in combination) <= spare)
    assert best * (1 - 1e-9) <= plan.loss <= 1.3 * best + 1e-9
    assert n_parameters(TINY, plan.shapes) <= limit


@pytest.mark.parametrize("choose", [
    even_ranks, lambda config, limit: budget.plan_widths(KronyGPT(config), [limit], None, (), ["mlp.c_fc"]),
    lambda config, limit: budget.plan_widths(KronyGPT(config), [limit], None)])
def test_a_budget_out_of_range_is_one_clear_line(choose):
    dense = n_parameters(CONFIG)
    for limit in (300, dense, dense + 1):
        with pytest.raises(UserError, match=rf"budget of {limit:,} parameters is not between [\d,]+, .* and {dense:,}"):
            choose(CONFIG, limit)
