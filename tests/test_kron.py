"""kron.py and the products of model.py against torch.kron and numpy.linalg.svd."""
from itertools import product

import numpy as np
import pytest
import torch
from conftest import kron_sum, random_matrix, smallest_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kronygpt import modeling_kronygpt
from kronygpt.kron import balanced, leading_singular_vectors, van_loan
from model import KronLinear, contraction_order, kron_linear, kron_weight, multiply_adds

# Sides m1, n1, m2, n2 of A and B: each equal to 1 in turn and together, then narrow and wide ones.
SIDES = [*product((1, 3), (1, 4), (1, 2), (1, 5)), (2, 2, 2, 2), (8, 32, 1, 1), (1, 1, 8, 32), (4, 32, 2, 1), (16, 2, 2, 16),
         (2, 16, 16, 2), (6, 5, 4, 7), (12, 1, 1, 48), (2, 3, 20, 4), (3, 2, 4, 20), (2, 2, 24, 24)]
ORDERS = (None, "A", "B", "W")  # of contraction; None leaves the choice to kron_linear


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_kron_linear_is_the_product_with_the_sum_of_torch_kron(sides):
    m1, n1, m2, n2 = sides
    generator = torch.Generator().manual_seed(0)
    for r, shape in product((1, 3), ((), (1,), (7,), (2, 1), (3, 50))):
        A, B, x, bias, weight = (torch.randn(*size, generator=generator).requires_grad_() for size in (
            (r, m1, n1), (r, m2, n2), (*shape, m1 * m2), (n1 * n2,), (*shape, n1 * n2)))
        expected = x.double() @ kron_sum(A.double(), B.double()) + bias.double()
        wanted = torch.autograd.grad((expected * weight).sum(), (x, A, B, bias))
        for order in ORDERS:
            y = kron_linear(x, A, B, bias, order)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            gradients = torch.autograd.grad((y * weight).sum(), (x, A, B, bias))
            torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kron_weight(A, B), kron_sum(A, B), rtol=1e-6, atol=1e-6)


def test_kron_linear_takes_inputs_that_are_not_contiguous():
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(*size, generator=generator).mT for size in ((12, 6), (2, 5, 3), (2, 2, 4)))
    for order in ORDERS:
        torch.testing.assert_close(kron_linear(x, A, B, torch.zeros(10), order), x @ kron_sum(A, B), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [(3, 4, 2, 5), (2, 2, 24, 24), (8, 1, 1, 32)], ids=str)
def test_kron_linear_multiplies_in_autocasts_dtype(sides):
    m1, n1, m2, n2 = sides
    generator = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*size, generator=generator).requires_grad_() for size in ((2, m1, n1), (2, m2, n2), (7, m1 * m2)))
    expected = x @ kron_sum(A, B)
    wanted = torch.autograd.grad(expected.sum(), (x, A, B))
    for order in ORDERS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = kron_linear(x, A, B, torch.zeros(n1 * n2), order)
        gradients = torch.autograd.grad(y.float().sum(), (x, A, B))
        for found, exact in zip((y.float(), *gradients), (expected, *wanted)):
            error = (found - exact).norm() / exact.norm()
            assert 0 < error < 0.02 and found.dtype == torch.float32


@pytest.mark.parametrize("A_shape, B_shape", [((2, 6, 5), (2, 4, 7)), ((3, 2, 16), (3, 16, 2)), ((2, 3, 2), (2, 20, 24)),
                                              ((5, 12, 1), (5, 1, 48)), ((5, 1, 48), (5, 12, 1))], ids=str)
def test_multiply_adds_are_those_that_torch_counts(A_shape, B_shape):
    A, B = torch.ones(A_shape), torch.ones(B_shape)
    m, n, tokens = A_shape[1] * B_shape[1], A_shape[2] * B_shape[2], 9
    building_W = len(A) * m * n
    for order, counted in multiply_adds(A_shape, B_shape).items():
        with FlopCounterMode(display=False) as counter:
            kron_linear(torch.ones(tokens, m), A, B, torch.zeros(n), order)
        assert counter.get_total_flops() == 2 * (tokens * counted + building_W * (order == "W"))


@pytest.mark.parametrize("A_shape, B_shape, tokens, order", [
    ((8, 768, 1), (8, 1, 3072), 512, "A"),  # low rank
    ((8, 1, 3072), (8, 768, 1), 512, "B"),  # its mirror image
    ((1, 768, 768), (1, 1, 4), 512, "A"),  # pruned
    ((400, 32, 32), (400, 24, 96), 512, "W"),  # a sum that costs more than the matrix
    ((1, 32, 64), (1, 24, 48), 1, "A"),  # for a single token nothing pays for building W
])
def test_contraction_order_is_the_cheap_one_where_it_is_clear(A_shape, B_shape, tokens, order):
    assert contraction_order(A_shape, B_shape, tokens) == order


@pytest.mark.parametrize("m, n, shape", [(12, 40, (12, 1, 3)), (40, 12, (1, 12, 3)), (12, 48, (12, 12, 1)),
                                         (48, 12, (12, 12, 1)), (12, 40, (3, 4, 2)), (12, 40, (2, 2, 60))], ids=str)
def test_exported_matrices_are_contracted_as_ours(m, n, shape):
    ours, exported = KronLinear(m, n, shape), modeling_kronygpt.KronLinear(m, n, shape)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
        exported.load_state_dict(ours.state_dict())
        for x in torch.randn(2, 300, m), torch.randn(1, m):
            with FlopCounterMode(display=False) as our_counter:
                expected = ours(x)
            with FlopCounterMode(display=False) as counter:
                torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
            assert torch.ops.aten.bmm not in counter.get_flop_counts()["Global"]  # no product for each token
            # ours multiplies a single number or pair elementwise
            assert shape[2] == 1 or counter.get_total_flops() == our_counter.get_total_flops()


@given(st.data(), st.tuples(*[st.integers(1, 8)] * 4), st.integers(0, 1000))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_van_loan_reaches_the_smallest_error_of_any_shape(data, sides, seed):
    dim_1, dim_2, m2, n2 = sides
    n_factors = data.draw(st.integers(1, min(dim_1 * dim_2, m2 * n2)))
    W = random_matrix(dim_1 * m2, dim_2 * n2, seed)
    A, B = van_loan(W, dim_1, dim_2, n_factors)
    assert A.shape == (n_factors, dim_1, dim_2) and B.shape == (n_factors, m2, n2)
    assert A.is_contiguous() and B.is_contiguous()
    error = (W - kron_sum(A, B)).norm().item()
    assert error == pytest.approx(smallest_error(W, dim_1, dim_2, n_factors), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dim_1, dim_2, m2, n2, decay", [(6, 8, 4, 5, 0.3), (4, 5, 6, 8, 0.3), (10, 8, 8, 5, 0.7)])
def test_van_loan_reaches_small_errors_to_all_their_digits(dim_1, dim_2, m2, n2, decay):
    k = min(dim_1 * dim_2, m2 * n2)
    U, V = (torch.linalg.qr(random_matrix(size, k, size)).Q.T for size in (dim_1 * dim_2, m2 * n2))
    values = decay ** torch.arange(k, dtype=torch.float64)  # the singular values of the rearranged W
    W = kron_sum((values[:, None] * U).view(k, dim_1, dim_2), V.view(k, m2, n2))
    for n_factors in (1, 3, 5, 8, 12, *range(16, k - 8, 4)):
        error = (W - kron_sum(*van_loan(W, dim_1, dim_2, n_factors))).norm()
        torch.testing.assert_close(error, values[n_factors:].norm(), rtol=1e-6, atol=0)


def test_a_kronecker_sum_is_found_again_also_with_factors_to_spare():
    W = kron_sum(random_matrix(3 * 4, 6, 1).view(3, 4, 6), random_matrix(3 * 5, 2, 2).view(3, 5, 2))
    torch.testing.assert_close(kron_sum(*van_loan(W, 4, 6, 5)), W, rtol=0, atol=1e-6)  # sqrt of float64's rounding


def test_factors_share_their_norm_and_the_largest_element_of_the_smaller_side_is_positive():
    """An eigenvector may have either sign."""
    for dims in (6, 8), (3, 4):  # B is the smaller side, then A
        A, B = van_loan(random_matrix(12, 48), *dims, 6)
        torch.testing.assert_close(A.norm(dim=(1, 2)), B.norm(dim=(1, 2)))
        small = A if dims == (3, 4) else B
        assert small.flatten(1).max(1).values.equal(small.flatten(1).abs().max(1).values)


@pytest.mark.parametrize("decay", [0.9, 0.3], ids=["flat", "steep"])  # the Gram matrix in float32, and in float64
def test_leading_singular_vectors_are_those_of_numpy(decay):
    U, V = torch.linalg.qr(random_matrix(40, 24, 1)).Q, torch.linalg.qr(random_matrix(24, 24, 2)).Q
    R = U * decay ** torch.arange(24, dtype=torch.float64) @ V.T
    for n in (1, 5, 12, 24):
        found, image = leading_singular_vectors(R, n)
        _, values, Vt = np.linalg.svd(R.numpy(), full_matrices=False)
        exact = torch.from_numpy(Vt[:n].T.copy())
        torch.testing.assert_close(found.T @ found, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
        torch.testing.assert_close(image, R @ found, rtol=0, atol=1e-12)
        if n <= 12:  # of values below the square root of float64's rounding, a Gram matrix knows little
            torch.testing.assert_close(image.norm(dim=0), torch.from_numpy(values[:n].copy()), rtol=1e-6, atol=0)
            torch.testing.assert_close((found * exact).sum(0).abs(), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-6)


def test_balanced_factors_have_the_same_products_and_equal_norms_but_a_side_of_one_element_is_1():
    A, B = random_matrix(2 * 4, 6, 1).view(2, 4, 6) * 100, random_matrix(2 * 5, 2, 2).view(2, 5, 2)
    one = torch.tensor([[[-3.0]], [[0.5]]], dtype=torch.double)
    for old in (A, B), (one, B), (A, one):
        for pair, new_pair in zip(zip(*old), zip(*balanced(*old))):
            torch.testing.assert_close(torch.kron(*new_pair), torch.kron(*pair))
    new_A, new_B = balanced(A, B)
    torch.testing.assert_close(new_A.norm(dim=(1, 2)), new_B.norm(dim=(1, 2)))
    assert (balanced(one, B)[0] == 1).all() and (balanced(A, one)[1] == 1).all()
