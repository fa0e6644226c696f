"""Sums of Kronecker products, one matrix at a time: Van Loan's decomposition, balancing.

    W [m, n] = Σ_f A_f ⊗ B_f      A [r, m1, n1]      B [r, m2, n2]      m = m1 m2,  n = n1 n2

Low rank is the member with n1 = m2 = 1; the dense matrix is the member with m2 = n2 = r = 1 and B = [[1]].
"""
import torch
from torch.nn import functional as F

from kronygpt.device import float64

NEARLY_EXACT = 1e-3  # share of the largest eigenvalue that the discarded ones must reach for float32 to separate them
OVERSAMPLING = 8  # eigenvectors beyond those asked for
LARGEST = 1.5  # number beside the identity in a side of low rank; nearer to 1, more rows would be exchanged


def rearrange(W, dim_1, dim_2):
    """Van Loan's rearrangement of W [m, n], [dim_1 dim_2, (m/dim_1) (n/dim_2)]: each row is a block of W, so that A ⊗ B
    becomes the outer product vec(A) vec(B)ᵀ."""
    m, n = W.shape
    blocks = W.reshape(dim_1, m // dim_1, dim_2, n // dim_2).transpose(1, 2)  # (dim_1, dim_2, m/dim_1, n/dim_2)
    return blocks.reshape(dim_1 * dim_2, -1)


def leading_singular_vectors(R, n):
    """The right singular vectors of R [m, k], m >= k, for its n largest singular values, and R times them.

    The eigenvectors of the Gram matrix in float32, at half the time and a few more than asked for, span a space that one
    step of subspace iteration and the Rayleigh-Ritz projection in float64 make exact. Where the approximation is within
    float32's rounding of R, the Gram matrix is computed in float64.

    Args:
        R: float64.

    Returns:
        V [k, n], orthonormal, in descending order, and R V [m, n].
    """
    k = R.shape[1]
    values, rough = torch.linalg.eigh(R.float().T @ R.float())  # in ascending order
    if values[:k - n].sum() < NEARLY_EXACT * values[-1]:
        rough = torch.linalg.eigh(R.T @ R).eigenvectors
    basis, _ = torch.linalg.qr(R.T @ (R @ rough[:, -n - OVERSAMPLING:].double()))
    image = R @ basis
    rotation = torch.linalg.eigh(image.T @ image).eigenvectors[:, -n:].flip(1)
    return basis @ rotation, image @ rotation


def van_loan(W, dim_1, dim_2, n_factors):
    """The sum of n_factors Kronecker products that is nearest to W in the Frobenius norm.

    The truncated SVD of the rearranged matrix, from the eigenvectors of the smaller of its two Gram matrices. Each
    singular value is shared evenly, ‖A_f‖ = ‖B_f‖; but a side of one element is 1.

    Source: C. F. Van Loan and N. Pitsianis, Approximation with Kronecker products, 1993.

    Args:
        W: [m, n].
        dim_1: rows of A, a divisor of m.
        dim_2: columns of A, a divisor of n.
        n_factors: at most the smaller side of the rearranged matrix.

    Returns:
        A [n_factors, dim_1, dim_2] and B [n_factors, m/dim_1, n/dim_2] in W's dtype, with W ≈ Σ_f A_f ⊗ B_f.
    """
    m, n = W.shape
    R = float64(rearrange(W, dim_1, dim_2))
    is_long = R.shape[0] >= R.shape[1]
    small, large = leading_singular_vectors(R if is_long else R.T, n_factors)
    signs = small.gather(0, small.abs().argmax(0, keepdim=True)).sign()  # eigenvectors come with either sign
    A, B = (side * signs for side in ((large, small) if is_long else (small, large)))
    A, B = balanced(A.T.reshape(-1, dim_1, dim_2), B.T.reshape(-1, m // dim_1, n // dim_2))
    return A.to(W).contiguous(), B.to(W).contiguous()


def balanced(A, B):
    """The same products A_f ⊗ B_f with ‖A_f‖ = ‖B_f‖; but a side of one element is 1."""
    if A[0].numel() == 1:
        return torch.ones_like(A), B * A
    if B[0].numel() == 1:
        return A * B, torch.ones_like(B)
    a, b = (side.flatten(1).norm(dim=1)[:, None, None] for side in (A, B))
    scale = torch.where((a > 0) & (b > 0), b.sqrt() / a.sqrt(), 1.0)
    return A * scale, B / scale


def column_side(A_shape, B_shape):
    """The side of a sum of low rank that holds its columns, "A" [r, m, 1] or "B"; None where a sum is no low rank."""
    (_, m1, n1), (_, m2, n2) = A_shape, B_shape
    return "A" if n1 == m2 == 1 else "B" if m1 == n2 == 1 else None


def with_identity(A, B):
    """The same matrix of low rank, in which r rows of the side with the columns, [r, m, 1], are the identity: those r²
    numbers need not be stored. The rows are such that no other number of the side is above LARGEST: partial pivoting finds
    r rows, and then rows are exchanged as long as one gains (S. Goreinov et al., How to find a good submatrix, 2010). PIFA
    (arXiv 2501.19090) stores low rank like this.

    Args:
        A, B: [r, m, 1] and [r, 1, n], or the other way round.

    Returns:
        A, B and pivots [r], the rows of the identity; the side with the columns has only the other rows, [r, m - r, 1].
        A and B as they are and None where the sum is not of low rank, or r is not below m.
    """
    side = column_side(A.shape, B.shape)
    column, row = (B, A) if side == "B" else (A, B)
    if side is None or column.shape[0] >= column.shape[1] or row.shape[2] == 1:  # of a column, the sides look alike
        return A, B, None
    column, row = float64(column[:, :, 0].T).cpu(), row.cpu()  # [m, r]; on GPUs a library prints warnings
    Q = torch.linalg.qr(column).Q
    order = torch.arange(len(Q))
    for i, j in enumerate((torch.linalg.lu_factor(Q).pivots - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    pivots = order[:Q.shape[1]]
    T = torch.linalg.solve(Q[pivots], Q, left=False)
    while abs(T.view(-1)[at := T.abs().argmax().item()]) > LARGEST:
        i, j = divmod(at, T.shape[1])
        change = T[i].clone()
        change[j] -= 1
        T -= torch.outer(T[:, j] / T[i, j], change)  # row i is a unit vector now, and the old row of the identity is not
        pivots[j] = i
    column, row = T[others(pivots, len(T))].to(row).T[:, :, None], (column[pivots] @ float64(row[:, 0])).to(row)[:, None]
    return (row, column, pivots) if side == "B" else (column, row, pivots)


def without_identity(A, B, pivots):
    """The inverse of with_identity(), balanced: columns of one side and rows of the other are orthogonal and of equal norms,
    as an SVD has them, so that training changes both sides alike."""
    side = column_side(A.shape, B.shape)
    rest, row = (B, A) if side == "B" else (A, B)
    r, column = len(rest), whole_column(rest.double(), pivots)
    (Q, R), (P, S) = torch.linalg.qr(column), torch.linalg.qr(row[:, 0].double().T)
    U, sigma, V = torch.linalg.svd(R @ S.T, full_matrices=False)
    column, row = (Q @ U) * sigma.sqrt(), sigma.sqrt()[:, None] * (V @ P.T)
    signs = column.gather(0, column.abs().argmax(0, keepdim=True)).sign()  # singular vectors come with either sign
    unused = r - len(row)  # factors beyond the number of columns, which no matrix needs
    column = F.pad(column * signs, (0, unused)).float().T[:, :, None]
    row = F.pad(row * signs.T, (0, 0, 0, unused)).float()[:, None]
    return (row, column) if side == "B" else (column, row)


def whole_column(rest, pivots):
    """The side with the columns, [m, r], from its other rows [r, m - r, 1] and the numbers of those of the identity."""
    r, n_rest, _ = rest.shape
    column = rest.new_empty(n_rest + r, r)
    column[pivots], column[others(pivots, n_rest + r)] = torch.eye(r, dtype=rest.dtype), rest[:, :, 0].T
    return column


def others(pivots, m):
    """The rows of m that are no pivots, in ascending order."""
    is_other = torch.ones(m, dtype=torch.bool)
    is_other[pivots] = False
    return is_other.nonzero()[:, 0]
