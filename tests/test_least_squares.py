"""least_squares.py against plain dense least squares and numpy's SVD."""
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import kron_sum

import least_squares
from configurator import UserError
from kron import van_loan
from least_squares import Moments, Problem, als_step, check_size, fit, initial_factors, reduced_rank


def random_problem(m=12, n=20, tokens=200, weighted=True, seed=0, ridge=1e-3):
    """Correlated inputs with a mean, targets of W with noise; the data and their Problem."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, m, generator=generator) @ torch.randn(m, m, generator=generator) + 3
    W = torch.randn(m, n, generator=generator)
    Y = X @ W + torch.randn(tokens, n, generator=generator) + 5
    moments = Moments()
    for part in range(0, tokens, 64):
        moments.add(X[part:part + 64], Y[part:part + 64])
    weights = torch.rand(n, generator=generator) + 0.1 if weighted else None
    return X.double(), Y.double(), W, Problem(moments, W, weights, ridge)


def test_moments_are_those_of_numpy():
    X, Y, _, problem = random_problem()
    covariance = np.cov(torch.cat((X, Y), 1).T.numpy(), bias=True)
    np.testing.assert_allclose(problem.G, covariance[:12, :12], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(problem.C, covariance[:12, 12:], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(problem.variance, covariance.diagonal()[12:], rtol=1e-5)


def test_gram_in_strips_is_the_whole_product(monkeypatch):
    monkeypatch.setattr(least_squares, "GRAM_COLUMNS", 4)
    for m in (3, 4, 11):
        X = torch.randn(7, m, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(least_squares.gram(X), X.T @ X)


def test_moments_keep_their_digits_beside_a_large_mean():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, 3, generator=generator)
    moments = Moments()
    for part in X.split(100):
        moments.add(part + 1000, part[:, :2] - 500)
    np.testing.assert_allclose(moments.centred()[2], np.cov(X.T.numpy(), bias=True), atol=1e-4)


def test_error_and_bias_are_those_of_the_data():
    X, Y, _, problem = random_problem()
    W = torch.randn(12, 20, dtype=torch.double)
    best = (Y - X @ W).mean(0)
    np.testing.assert_allclose(problem.bias(W), best, rtol=1e-4, atol=1e-4)
    for bias in (None, torch.ones(20)):
        residual = (Y - X @ W - (best if bias is None else bias)).square().mean(0)
        expected = (problem.weights * residual).sum() / (problem.weights * Y.var(0, correction=0)).sum()
        assert problem.error(W, bias) == pytest.approx(expected.item(), rel=1e-4)


def test_weights_that_meet_no_input_stay():
    X = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    X[:, 2] = 0
    W = torch.arange(12.0).view(4, 3)
    moments = Moments()
    moments.add(X, -X @ W)
    A, _ = fit(Problem(moments, W), W[None], torch.ones(1, 1, 1), fixed_B=True)
    torch.testing.assert_close(A[0, 2].float(), W[2])
    torch.testing.assert_close(A[0, 0].float(), -W[0], rtol=1e-2, atol=1e-2)


def dense_als_step(problem, A, B, weights):
    """The best A by one dense least-squares problem over all its elements at once, with the ridge as further rows."""
    root = torch.linalg.cholesky(problem.ridged_G).T  # ‖Y − XW‖² + ridge ‖W − W0‖² = ‖root W − target‖² + constant
    target = torch.linalg.solve_triangular(root.T, problem.ridged_C, upper=False)
    columns = []
    for element in range(A.numel()):
        unit = torch.zeros_like(A).view(-1)
        unit[element] = 1
        columns.append((root @ kron_sum(unit.view_as(A), B) * weights.sqrt()).reshape(-1))
    solution = np.linalg.lstsq(torch.stack(columns, 1).numpy(), (target * weights.sqrt()).reshape(-1).numpy(), rcond=None)
    return torch.from_numpy(solution[0]).view_as(A)


@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 1), (4, 5, 3), (12, 5, 1), (1, 4, 2), (3, 20, 1), (6, 1, 2)])
def test_als_step_is_the_dense_least_squares_solution(dim_1, dim_2, r):
    _, _, W, problem = random_problem()
    A, B = (side.double() for side in van_loan(W, dim_1, dim_2, r))
    u, v = problem.separable_weights(dim_2, 20 // dim_2)
    expected = dense_als_step(problem, A, B, (u[:, None] * v).view(-1))
    found = als_step(problem.ridged_G, problem.ridged_C, B, dim_1, v)
    torch.testing.assert_close(kron_sum(found, B), kron_sum(expected, B), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim_1, dim_2, r", [(4, 5, 1), (4, 5, 3), (12, 10, 1), (3, 4, 2)])
def test_the_objective_never_rises(dim_1, dim_2, r, monkeypatch):
    monkeypatch.setattr(least_squares, "TOLERANCE", -1.0)
    _, _, _, problem = random_problem()
    u, v = problem.separable_weights(dim_2, 20 // dim_2)
    weights = (u[:, None] * v).view(-1)
    pair = initial_factors(problem, dim_1, dim_2, r)
    values = [problem.objective(kron_sum(*pair), weights)]
    for _ in range(10):
        pair = fit(problem, *pair, steps=1)
        values.append(problem.objective(kron_sum(*pair), weights))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(values)), values
    assert values[-1] < 0.9999 * values[0]


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
@pytest.mark.parametrize("r", [1, 4])
def test_reduced_rank_is_the_optimum(m, n, r):
    _, _, _, problem = random_problem(m, n)
    root = torch.linalg.cholesky(problem.ridged_G).T.numpy()
    target = np.linalg.solve(root.T, problem.ridged_C.numpy())
    best = np.linalg.svd(target * problem.weights.sqrt().numpy(), compute_uv=False)[r:]
    for A_is_column in (True, False):
        A, B = reduced_rank(problem, r, A_is_column)
        distance = (root @ kron_sum(A, B).numpy() - target) * problem.weights.sqrt().numpy()
        assert np.square(distance).sum() == pytest.approx(np.square(best).sum(), rel=1e-6)
        assert A.shape == ((r, m, 1) if A_is_column else (r, 1, n))


def test_alternating_least_squares_reaches_the_closed_form_of_low_rank():
    _, _, W, problem = random_problem(weighted=False)
    exact = kron_sum(*reduced_rank(problem, 3, True))
    A, B = (side.double() for side in van_loan(W, 12, 1, 3))
    for _ in range(300):
        A = als_step(problem.ridged_G, problem.ridged_C, B, 12, torch.ones(20, dtype=torch.double))
        G, C = problem.ridged_G, problem.ridged_C  # swapping the sides of a low rank changes no index
        B = als_step(G, C, A, 1, torch.ones(1, dtype=torch.double))
    torch.testing.assert_close(kron_sum(A, B), exact, rtol=1e-3, atol=1e-3)


def test_a_normal_matrix_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(least_squares, "LARGEST_SYSTEM", 12)
    check_size((3, 4, 5), (3, 3, 4))
    check_size((100, 12, 1), (100, 1, 20))  # low rank has a closed form
    for shapes in ((4, 4, 5), (4, 3, 4)), ((3, 2, 5), (3, 6, 4)):
        with pytest.raises(UserError, match=r"normal matrix of order 1[68], and the largest is 12"):
            check_size(*shapes)
    _, _, W, problem = random_problem()
    with pytest.raises(UserError, match="normal matrix"):
        fit(problem, *van_loan(W, 4, 5, 4))


def constant_problem(value, noise=0.0):
    """Inputs that never change, or by rounding only, and targets of W."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 20, generator=generator)
    X = value + noise * torch.randn(50, 12, generator=generator)
    moments = Moments()
    for part in (X[:20], X[20:]):
        moments.add(part, part @ W)
    return W, Problem(moments, W)


@pytest.mark.parametrize("value, noise", [(0.0, 0.0), (3.7, 0.0), (3.7, 1e-7), (1e-30, 0.0), (1e4, 0.0)])
def test_inputs_that_tell_nothing_leave_the_weights(value, noise):
    W, problem = constant_problem(value, noise)
    for dim_1, dim_2, r in ((12, 20, 1), (12, 1, 12), (4, 5, 12)):  # which reach every matrix
        A, B = fit(problem, *initial_factors(problem, dim_1, dim_2, r))
        np.testing.assert_allclose(kron_sum(A, B), W, rtol=0.02, atol=0.02)


def test_a_problem_of_zeros_has_factors_of_zeros_and_no_error():
    moments = Moments()
    moments.add(torch.randn(50, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(50, 20))
    problem = Problem(moments, torch.zeros(12, 20), weights=torch.zeros(20))
    for dim_1, dim_2, r in ((4, 5, 3), (12, 1, 2), (1, 20, 2)):
        A, B = fit(problem, *initial_factors(problem, dim_1, dim_2, r))
        assert A.isfinite().all() and B.isfinite().all() and not kron_sum(A, B).any()
        assert problem.error(kron_sum(A, B), torch.zeros(20)) == 0.0
    assert problem.error(torch.zeros(12, 20), torch.full((20,), 2.0)) == 20 * 4  # there is no variance to be a share of
