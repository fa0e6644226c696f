"""The table of shapes beside plain counts, and the ranks of a budget beside trying every combination."""
import itertools
from dataclasses import replace

import pytest
import torch

from kronygpt import budget
from kronygpt.configurator import UserError
from model import KronyGPT, KronyGPTConfig, mlp_shapes

CONFIG = KronyGPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
LIMIT = 6_000  # of the 8,112 parameters of that shape when it is dense
TINY = KronyGPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=6, n_inner=10)


def n_parameters(config):
    return sum(p.numel() for p in KronyGPT(config).parameters())


def test_shapes_are_those_that_a_plain_loop_finds():
    found = {(s.dim_1, s.dim_2, s.n_factors): s for s in budget.shapes_within(CONFIG, LIMIT)}
    expected = set()
    for dim_1 in (1, 2, 4, 8, 16):
        for dim_2 in (1, 2, 4, 8, 16, 32, 64):
            fitting = []
            for r in range(1, min(dim_1 * dim_2, 1024 // (dim_1 * dim_2)) + 1):
                total = n_parameters(replace(CONFIG, shapes=mlp_shapes(dim_1, dim_2, [r, r])))
                if total <= LIMIT:
                    fitting.append((total, r))
            if fitting and max(fitting)[0] >= budget.SLACK * LIMIT:
                expected.add((dim_1, dim_2, max(fitting)[1]))
                assert found[dim_1, dim_2, max(fitting)[1]].parameters == max(fitting)[0]
    assert expected and set(found) == expected


def test_no_shape_is_one_clear_line():
    with pytest.raises(UserError, match="no shapes fit 100 parameters"):
        budget.shapes_within(CONFIG, 100)


def random_spectra(config, kinds, seed):
    """Squared singular values that fall at a rate of their own in each matrix, in descending order."""
    generator = torch.Generator().manual_seed(seed)
    return {f"transformer.h.{layer}.{kind}": torch.rand(()) * 10 ** -torch.linspace(
        0, 1 + 3 * torch.rand((), generator=generator).item(), min(config.matrices[kind])).double()
        for layer in range(config.n_layer) for kind in kinds}


def shapes_of(allocations, kinds):
    return {kind: [a.shape for a in allocations if a.kind == kind] for kind in kinds}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_lose_little_more_than_the_best_of_all_combinations(share, seed):
    torch.manual_seed(seed)
    kinds = [*TINY.matrices]
    spectra = random_spectra(TINY, kinds, seed)
    dense, least = n_parameters(TINY), n_parameters(replace(
        TINY, shapes={kind: [(m, 1, 1)] for kind, (m, n) in TINY.matrices.items()}))
    limit = int(least + share * (dense - least))
    found = budget.allocate(TINY, kinds, limit, spectra)

    choices = []  # of each matrix: (parameters, loss), by rank, and dense
    for kind, (m, n) in TINY.matrices.items():
        values = spectra[f"transformer.h.0.{kind}"]
        ranks = [(r * (m + n), values[r:].sum().item() / 2) for r in range(1, len(values)) if r * (m + n) < m * n]
        choices.append([*ranks, (m * n, 0.0)])
    spare = limit - dense + sum(m * n for m, n in TINY.matrices.values())
    best = min(sum(loss for _, loss in combination) for combination in itertools.product(*choices)
               if sum(size for size, _ in combination) <= spare)
    lost = sum(a.loss for a in found)
    assert best * (1 - 1e-9) <= lost <= 1.3 * best + 1e-9
    for a, options in zip(found, choices):
        assert (a.parameters, pytest.approx(a.loss)) in options
    total = n_parameters(replace(TINY, shapes=shapes_of(found, kinds)))
    assert total <= limit and total - dense == sum(a.parameters for a in found) - spare - dense + limit


def test_what_the_price_leaves_is_spent():
    """No single change within the budget lowers the predicted loss; the dense model is reached at its own size."""
    kinds = ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]
    torch.manual_seed(0)
    spectra = random_spectra(CONFIG, kinds, 0)
    dense = n_parameters(CONFIG)
    for limit in range(3_500, dense, 97):
        for found in (budget.allocate(CONFIG, kinds, limit), budget.allocate(CONFIG, kinds, limit, spectra)):
            total = n_parameters(replace(CONFIG, shapes=shapes_of(found, kinds)))
            assert total <= limit
        for a in found:
            m, n = CONFIG.matrices[a.kind]
            if a.shape.dim_2 == 1:
                assert total + m + n > limit and total - a.parameters + m * n > limit, a


def test_a_matrix_stays_dense_where_that_is_cheap():
    """One matrix whose singular values do not fall, beside others of low rank."""
    kinds = [*CONFIG.matrices]
    spectra = {f"transformer.h.{layer}.{kind}": torch.tensor([1.0] + 15 * [1e-9], dtype=torch.double)
               for layer in range(2) for kind in kinds}
    spectra["transformer.h.1.attn.c_proj"] = torch.ones(16, dtype=torch.double)
    least = n_parameters(replace(CONFIG, shapes={kind: [(m, 1, 1)] * 2 for kind, (m, n) in CONFIG.matrices.items()}))
    found = budget.allocate(CONFIG, kinds, least + 16 * 16 - 32, spectra)
    assert [a.kind for a in found if a.layer == 1 and a.shape == (16, 16, 1)] == ["attn.c_proj"]
    assert all(a.shape.factors == 1 for a in found)


@pytest.mark.parametrize("kinds", [["mlp.c_fc", "mlp.c_proj"], [*CONFIG.matrices]])
def test_even_ranks_keep_the_same_share_of_each_matrix(kinds):
    config = replace(CONFIG, n_embd=64, n_inner=256, shapes={})
    limit = n_parameters(config) * 6 // 10
    found = budget.allocate(config, kinds, limit)
    total = n_parameters(replace(config, shapes=shapes_of(found, kinds)))
    assert 0.97 * limit < total <= limit
    shares = [a.parameters / (config.matrices[a.kind][0] * config.matrices[a.kind][1]) for a in found]
    assert max(shares) - min(shares) < 0.04 and all(a.loss is None for a in found)


def test_shapes_of_other_matrices_stay():
    config = replace(CONFIG, shapes={"attn.c_proj": [(16, 1, 2), (4, 4, 3)]})
    found = budget.allocate(config, ["mlp.c_fc", "mlp.c_proj"], 5_000)
    total = n_parameters(replace(config, shapes=config.shapes | shapes_of(found, ["mlp.c_fc", "mlp.c_proj"])))
    assert 4_800 < total <= 5_000
    again = replace(config, shapes=config.shapes | shapes_of(found, ["mlp.c_fc", "mlp.c_proj"]))
    assert budget.allocate(again, ["mlp.c_fc", "mlp.c_proj"], 5_000) == found  # what was factored before does not matter


def test_a_budget_out_of_range_is_one_clear_line():
    dense = n_parameters(CONFIG)
    for limit in (1_000, dense, dense + 1):
        with pytest.raises(UserError, match=rf"budget of {limit:,} parameters is not between [\d,]+, with .* and {dense:,}"):
            budget.allocate(CONFIG, ["mlp.c_fc"], limit)
