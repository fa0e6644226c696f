"""least_squares.py against plain dense least squares and numpy's SVD."""
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import kron_sum, random_matrix, square_root

from kronygpt import least_squares
from kronygpt.kron import van_loan
from kronygpt.least_squares import (
    Moments,
    Problem,
    als_step,
    alternate,
    fit,
    initial_factors,
    reduced_rank,
    separable,
    targets_of,
)


def random_problem(m=12, n=20, tokens=200, seed=0):
    """Correlated inputs with a mean, targets of W with noise; the data and their Problem."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, m, generator=generator) @ torch.randn(m, m, generator=generator) + 3
    W = torch.randn(m, n, generator=generator)
    Y = X @ W + torch.randn(tokens, n, generator=generator) + 5
    moments = Moments()
    for part in range(0, tokens, 64):
        moments.add(X[part:part + 64], Y[part:part + 64])
    gradients = torch.randn(3 * n, n, generator=generator).double() @ torch.randn(n, n, generator=generator).double()
    return X.double(), Y.double(), W, Problem(moments.centred(), W, gradients.T @ gradients)


def test_moments_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(least_squares, "GRAM_COLUMNS", 5)  # strips of 5, 5 and 2
    X, Y, _, problem = random_problem()
    covariance = np.cov(torch.cat((X, Y), 1).T.numpy(), bias=True)
    np.testing.assert_allclose(problem.G, covariance[:12, :12], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(problem.C, covariance[:12, 12:], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(problem.variance, covariance.diagonal()[12:], rtol=1e-5)


def test_moments_keep_their_digits_beside_a_large_mean():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, 3, generator=generator)
    moments = Moments()
    for part in X.split(100):
        moments.add(part + 1000, part[:, :2] - 500)
    np.testing.assert_allclose(moments.centred()[2], np.cov(X.T.numpy(), bias=True), atol=1e-4)


def test_targets_that_a_matrix_makes_need_not_be_made():
    torch.manual_seed(0)
    Z, W, bias = torch.randn(300, 6) + 2, torch.randn(6, 9), torch.randn(9)
    X, explicit, implicit = Z + 0.3 * torch.randn(300, 6), Moments(), Moments()
    for rows in slice(0, 100), slice(100, 300):
        explicit.add(X[rows], Z[rows] @ W + bias)
        implicit.add(torch.cat((X[rows], Z[rows]), 1))
    for ours, expected in zip(targets_of(implicit, W, bias), explicit.centred()):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_error_and_bias_are_those_of_the_data():
    X, Y, _, problem = random_problem()
    W = torch.randn(12, 20, dtype=torch.double)
    best = (Y - X @ W).mean(0)
    np.testing.assert_allclose(problem.bias(W), best, rtol=1e-4, atol=1e-4)
    for bias in (None, torch.ones(20)):
        residual = (Y - X @ W - (best if bias is None else bias)).square().mean(0)
        expected = residual.sum() / Y.var(0, correction=0).sum()
        assert problem.error(W, bias) == pytest.approx(expected.item(), rel=1e-4)


def test_the_metric_is_a_blend_of_the_second_moments_of_gradients_and_the_identity():
    fisher = torch.tensor([[4.0, 1], [1, 2]], dtype=torch.double)
    expected = [[0.9 * 4 / 3 + 0.1, 0.9 / 3], [0.9 / 3, 0.9 * 2 / 3 + 0.1]]
    np.testing.assert_allclose(least_squares.metric(fisher, 2, "cpu"), expected)
    for nothing in (None, torch.zeros(2, 2)):
        assert torch.equal(least_squares.metric(nothing, 2, "cpu"), torch.eye(2, dtype=torch.double))


@pytest.mark.parametrize("n1, n2", [(4, 5), (1, 20), (20, 1)])
def test_the_separable_metric_is_the_nearest_and_positive_definite(n1, n2):
    M = random_problem()[3].M
    M_1, M_2 = separable(M, n1)
    blocks = M.view(n1, n2, n1, n2).permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)
    smallest = np.linalg.svd(blocks.numpy(), compute_uv=False)[1:]
    assert torch.dist(torch.kron(M_1, M_2), M).item() == pytest.approx(np.linalg.norm(smallest), rel=1e-6, abs=1e-8)
    for side in (M_1, M_2):
        assert torch.allclose(side, side.T) and torch.linalg.eigvalsh(side)[0] > 0


def dense_best(problem, M, A, B, moving):
    """The best A or B ("A" or "B") for the other one by one dense least-squares problem over all its elements at once."""
    root, R = torch.linalg.cholesky(problem.ridged_G).T, torch.linalg.cholesky(M)
    target = torch.linalg.solve_triangular(root.T, problem.ridged_C, upper=False) @ R  # ‖root W R − target‖² + constant
    side = A if moving == "A" else B
    columns = []
    for element in range(side.numel()):
        unit = torch.zeros_like(side).view(-1)
        unit[element] = 1
        pair = (unit.view_as(A), B) if moving == "A" else (A, unit.view_as(B))
        columns.append((root @ kron_sum(*pair) @ R).reshape(-1))
    solution = np.linalg.lstsq(torch.stack(columns, 1).numpy(), target.reshape(-1).numpy(), rcond=None)[0]
    best = torch.from_numpy(solution).view_as(side)
    return kron_sum(best, B) if moving == "A" else kron_sum(A, best)


@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 1), (4, 5, 3), (12, 5, 1), (1, 4, 2), (3, 20, 1), (6, 1, 2)])
def test_als_step_is_the_dense_least_squares_solution_in_the_metric(dim_1, dim_2, r):
    _, _, W, problem = random_problem()
    A, B = (side.double() for side in van_loan(W, dim_1, dim_2, r))
    M_1, M_2 = separable(problem.M, dim_2)
    found = kron_sum(als_step(problem.ridged_G, problem.ridged_C, B, dim_1, M_2), B)
    torch.testing.assert_close(found, dense_best(problem, torch.kron(M_1, M_2), A, B, "A"), rtol=1e-6, atol=1e-6)
    swap = least_squares.swapped(problem.ridged_G, dim_1, dim_1, 12 // dim_1, 12 // dim_1), \
        least_squares.swapped(problem.ridged_C, dim_1, dim_2, 12 // dim_1, 20 // dim_2)
    found = kron_sum(A, als_step(*swap, A, 12 // dim_1, M_1))
    torch.testing.assert_close(found, dense_best(problem, torch.kron(M_1, M_2), A, B, "B"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 1), (4, 5, 3), (12, 10, 1), (3, 4, 2), (12, 1, 2)])
def test_the_objective_never_rises(dim_1, dim_2, r, monkeypatch):
    monkeypatch.setattr(least_squares, "TOLERANCE", -1.0)
    X, Y, W, problem = random_problem()
    metric = separable(problem.M, dim_2)
    pair = van_loan(W.double(), dim_1, dim_2, r)
    values = []
    for _ in range(10):
        values.append(problem.objective(kron_sum(*pair), *metric))
        pair = alternate(problem, *pair, steps=1)
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(values)), values
    assert values[-1] < 0.9999 * values[0]

    def squared_errors(V):  # of the data, with the ridge
        E, D = Y - Y.mean(0) - (X - X.mean(0)) @ V, V - W
        ridge = problem.ridged_G.diagonal()[0] - problem.G.diagonal()[0]
        return torch.trace(torch.kron(*metric) @ (E.T @ E / len(X) + ridge * D.T @ D)).item()

    V = kron_sum(*pair)
    assert problem.objective(V, *metric) == pytest.approx(squared_errors(V) - squared_errors(problem.solution), rel=1e-3)


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
@pytest.mark.parametrize("r", [1, 4])
def test_reduced_rank_is_the_optimum_in_the_metric(m, n, r):
    _, _, _, problem = random_problem(m, n)
    root = torch.linalg.cholesky(problem.ridged_G).T.numpy()
    target = np.linalg.solve(root.T, problem.ridged_C.numpy())
    half = square_root(problem.M)
    best = np.linalg.svd(target @ half, compute_uv=False)[r:]
    for A_is_column in (True, False):
        A, B = reduced_rank(problem, r, A_is_column)
        distance = (root @ kron_sum(A, B).numpy() - target) @ half
        assert np.square(distance).sum() == pytest.approx(np.square(best).sum(), rel=1e-6)
        assert A.shape == ((r, m, 1) if A_is_column else (r, 1, n))


@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 2), (3, 4, 2), (6, 10, 1)])
def test_the_start_is_exact_for_separable_moments(dim_1, dim_2, r):
    _, _, W, problem = random_problem()
    G = separable(problem.ridged_G, dim_1)
    metric = separable(problem.M, dim_2)
    problem.ridged_G, problem.M = torch.kron(*G), torch.kron(*metric)
    problem.ridged_C = problem.ridged_G @ W.double()
    start = problem.objective(kron_sum(*initial_factors(problem, dim_1, dim_2, r)), *metric)
    best = min(problem.objective(kron_sum(*alternate(problem, *(random_matrix(r * s, t, seed).view(r, s, t) for s, t in (
        (dim_1, dim_2), (12 // dim_1, 20 // dim_2))), steps=200)), *metric) for seed in range(3))
    assert start <= best * (1 + 1e-6)


@pytest.mark.parametrize("value, noise", [(0.0, 0.0), (3.7, 0.0), (3.7, 1e-7), (1e-30, 0.0), (1e4, 0.0)])  # at most rounding
def test_inputs_that_tell_nothing_leave_the_weights(value, noise):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(12, 20, generator=generator), value + noise * torch.randn(50, 12, generator=generator)
    moments = Moments()
    for part in (X[:20], X[20:]):
        moments.add(part, part @ W)
    problem = Problem(moments.centred(), W)
    for dim_1, dim_2, r in ((12, 20, 1), (12, 1, 12), (4, 5, 12)):  # which reach every matrix
        A, B = fit(problem, *van_loan(W, dim_1, dim_2, r))
        np.testing.assert_allclose(kron_sum(A, B), W, rtol=0.02, atol=0.02)


def test_a_problem_of_zeros_has_factors_of_zeros_and_no_error():
    moments = Moments()
    moments.add(torch.randn(50, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(50, 20))
    problem = Problem(moments.centred(), torch.zeros(12, 20), torch.zeros(20, 20))
    for dim_1, dim_2, r in ((4, 5, 3), (12, 1, 2), (1, 20, 2)):
        A, B = fit(problem, *van_loan(torch.zeros(12, 20), dim_1, dim_2, r))
        assert A.isfinite().all() and B.isfinite().all() and not kron_sum(A, B).any()
        assert problem.error(kron_sum(A, B), torch.zeros(20)) == 0.0
    assert problem.error(torch.zeros(12, 20), torch.full((20,), 2.0)) == 20 * 4  # there is no variance to be a share of
