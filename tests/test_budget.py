"""The budget search beside plain counts, and its candidates beside the models that are written."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import randomize_vectors

import budget
from calibration import calibrate
from compress import factorize
from configurator import UserError
from kron import van_loan
from model import KronyGPT, KronyGPTConfig, mlp_shapes

CONFIG = KronyGPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
LIMIT = 6_000  # of the 8,112 parameters of that shape when it is dense


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = KronyGPT(CONFIG)
    for p in model.parameters():
        p.data.mul_(8)  # otherwise the blocks hardly matter
    randomize_vectors(model)
    return model.eval()


def test_shapes_are_those_that_a_plain_loop_finds():
    found = {(s.dim_1, s.dim_2, s.n_factors): s for s in budget.shapes_within(CONFIG, LIMIT)}
    expected = set()
    for dim_1 in (1, 2, 4, 8, 16):
        for dim_2 in (1, 2, 4, 8, 16, 32, 64):
            fitting = []
            for r in range(1, min(dim_1 * dim_2, 1024 // (dim_1 * dim_2)) + 1):
                config = replace(CONFIG, shapes=mlp_shapes(dim_1, dim_2, [r, r]))
                total = sum(p.numel() for p in KronyGPT(config).parameters())
                if total <= LIMIT:
                    fitting.append((total, r))
            if fitting and max(fitting)[0] >= budget.SLACK * LIMIT:
                expected.add((dim_1, dim_2, max(fitting)[1]))
                assert found[dim_1, dim_2, max(fitting)[1]].parameters == max(fitting)[0]
    assert expected and set(found) == expected


def test_no_shape_is_one_clear_line():
    with pytest.raises(UserError, match="no shapes fit 100 parameters"):
        budget.shapes_within(CONFIG, 100)


def probes_of(dense):
    x = torch.randint(64, (40, 32), generator=torch.Generator().manual_seed(1))
    return list(budget.probe(dense, x, range(2))), x


def test_the_error_of_a_probe_falls_to_nothing_with_all_factors(dense):
    probes, _ = probes_of(dense)
    errors = [probes[1].error(16, 1, r, steps=1) for r in (2, 8, 16)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


def test_uneven_factors_come_to_the_same_in_all_and_go_where_they_help(dense):
    with torch.no_grad():  # a first block that is of rank 2, so that more factors do nothing for it
        mlp = dense.transformer.h[0].mlp
        for p in (mlp.c_fc.A, mlp.c_proj.A):
            U, S, V = torch.linalg.svd(p[0], full_matrices=False)
            p[0] = U[:, :2] * S[:2] @ V[:2]
    probes, _ = probes_of(dense)
    shape = budget.MLPShape(16, 1, 8, 0, 0.0, 0)
    factors = budget.uneven_factors(probes, shape, CONFIG)
    assert sum(factors) == 16 and factors[0] < factors[1]
    shape.n_factors = 14
    factors = budget.uneven_factors(probes, shape, CONFIG)
    assert sum(factors) == 28 and max(factors) <= 16  # more are none's use


def test_the_search_gives_the_loss_of_the_models_it_tried_and_puts_the_best_first(dense):
    _, x = probes_of(dense)
    held_out = x[:10, :-1], x[:10, 1:]
    shapes, candidates = budget.search(dense, x, held_out, LIMIT)
    assert [c.loss for c in candidates] == sorted(c.loss for c in candidates)
    tried = [s for s in shapes if s.error is not None]
    assert len(tried) == min(budget.KEPT, len(shapes)) and tried == shapes[:len(tried)]
    assert [s.error for s in tried] == sorted(s.error for s in tried)
    best = candidates[0]
    new = factorize(dense, mlp_shapes(best.dim_1, best.dim_2, best.factors), van_loan)
    calibrate(dense, new, x)
    with torch.no_grad():
        logp = new(held_out[0]).log_softmax(-1).gather(2, held_out[1][..., None])
    assert math.isclose(-logp.mean().item(), best.loss, rel_tol=1e-4)
    assert sum(p.numel() for p in new.parameters()) <= LIMIT


def test_shapes_that_cannot_be_fitted_are_omitted(dense, monkeypatch):
    _, x = probes_of(dense)
    held_out = x[:10, :-1], x[:10, 1:]
    monkeypatch.setattr(budget, "LARGEST_SYSTEM", 64)
    shapes, _ = budget.search(dense, x, held_out, LIMIT)
    whole = budget.shapes_within(CONFIG, LIMIT)
    assert 0 < len(shapes) < len(whole)
    for shape in shapes:
        sides = shape.dim_1, shape.dim_2, 16 // shape.dim_1, 64 // shape.dim_2
        assert shape.dim_2 == sides[2] == 1 or shape.n_factors * max(sides) <= 64 or (shape.dim_1, sides[3]) == (1, 1), shape
    monkeypatch.setattr(budget, "LARGEST_SYSTEM", -1)
    with pytest.raises(UserError, match="normal matrices are too large"):
        budget.search(dense, x, held_out, LIMIT)
