"""Sums of Kronecker products, one matrix at a time: contraction, Van Loan's decomposition, balancing.

    W [m, n] = Σ_f A_f ⊗ B_f      A [r, m1, n1]      B [r, m2, n2]      m = m1 m2,  n = n1 n2

Low rank is the member with n1 = m2 = 1; the dense matrix is the member with m2 = n2 = r = 1 and B = [[1]].
"""
import torch

from kronygpt.device import float64

COPY = 64  # multiply-adds that take as long as writing one number to memory; 32 to 500 choose alike
WIDE = 16  # columns from which a batch of small products beats one large product on a transposed copy
NEARLY_EXACT = 1e-3  # share of the largest eigenvalue that the discarded ones must reach for float32 to separate them
OVERSAMPLING = 8  # eigenvectors beyond those asked for


def kron_weight(A, B):
    """The dense matrix Σ_f A_f ⊗ B_f [m1 m2, n1 n2] of A [r, m1, n1] and B [r, m2, n2]."""
    # sum(torch.kron(A[f], B[f]) for f in range(r))
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    if r == 1:
        W = A[0, :, None, :, None] * B[0, None, :, None, :]  # (m1, m2, n1, n2)
    else:
        W = (A.flatten(1).T @ B.flatten(1)).view(m1, n1, m2, n2).transpose(1, 2)  # the sum over f is one product
    return W.reshape(m1 * m2, n1 * n2)


def multiply_adds(A_shape, B_shape):
    """Multiply-adds per token of x (Σ_f A_f ⊗ B_f) in each order of contraction.

    Args:
        A_shape, B_shape: (r, m1, n1) and (r, m2, n2).

    Returns:
        {"A": A first, "B": B first, "W": W built once and multiplied}; building W is not counted.
    """
    (r, m1, n1), (_, m2, n2) = A_shape, B_shape
    return {"A": r * n1 * m2 * (m1 + n2), "B": r * m1 * n2 * (m2 + n1), "W": m1 * m2 * n1 * n2}


def contraction_order(A_shape, B_shape, tokens):
    """The cheapest order in which to contract x with A and B: "A" first, "B" first, or "W" built and multiplied.

    The cost counts multiply-adds and, as COPY of them, each element of an intermediate that is written to memory:

        A:  T r n1 m2 (m1 + n2)  +  COPY T (r n1 m2 + [1 < m2 < WIDE] (m1 m2 + r n1 m2))
        B:  T r m1 n2 (m2 + n1)  +  COPY T (r m1 n2 + [1 < n2 < WIDE] (n1 n2 + r m1 n2))
        W:  (T + r) m1 m2 n1 n2  +  COPY 2 m1 m2 n1 n2

    with T tokens; the brackets are the transposed copies in `multiply_left`. Backward costs twice as much in every order.
    """
    (r, m1, n1), (_, m2, n2) = A_shape, B_shape
    macs = multiply_adds(A_shape, B_shape)
    after_a, after_b, dense = r * n1 * m2, r * m1 * n2, m1 * m2 * n1 * n2
    costs = {
        "A": tokens * (macs["A"] + COPY * (after_a + (1 < m2 < WIDE) * (m1 * m2 + after_a))),
        "B": tokens * (macs["B"] + COPY * (after_b + (1 < n2 < WIDE) * (n1 * n2 + after_b))),
        "W": tokens * macs["W"] + r * dense + COPY * 2 * dense,
    }
    return min(costs, key=costs.get)


class SharedLeftProduct(torch.autograd.Function):
    """L [p, q] @ X [T, q, s] -> [T, p, s] with one L for all T.

    Autograd's own backward of the broadcast product would make a gradient of L for each of the T and add them up.
    """

    @staticmethod
    def forward(L, X):
        return torch.bmm(L.expand(len(X), -1, -1), X)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        L, X = ctx.saved_tensors
        grad_L = grad_X = None
        if ctx.needs_input_grad[0]:
            grad_L = grad.transpose(0, 1).flatten(1) @ X.transpose(0, 1).flatten(1).T
        if ctx.needs_input_grad[1]:
            grad_X = torch.bmm(L.T.expand(len(X), -1, -1), grad)
        return grad_L, grad_X


def multiply_left(L, X):
    """L [p, q] @ X [T, q, s] -> [T, p, s]: batched where the products are wide, else one large one on a transposed copy."""
    T, q, s = X.shape
    if s == 1:
        return (X.reshape(T, q) @ L.T)[:, :, None]
    if s < WIDE:
        return (X.transpose(1, 2).reshape(T * s, q) @ L.T).view(T, s, -1).transpose(1, 2)
    return SharedLeftProduct.apply(L, X)


def kron_linear(x, A, B, bias, order=None):
    """x (Σ_f A_f ⊗ B_f) + bias, without the Kronecker products where that is cheaper.

    Args:
        x: (..., m1 m2).
        A: [r, m1, n1].
        B: [r, m2, n2].
        bias: [n1 n2].
        order: "A", "B" or "W", to force an order of contraction; default: contraction_order chooses.

    Returns:
        (..., n1 n2)
    """
    # x @ sum(torch.kron(A[f], B[f]) for f in range(r)) + bias
    if torch.is_autocast_enabled(x.device.type):  # for what autocast does not know: broadcast and batched products
        x, A, B = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, A, B))
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    rows = x.reshape(-1, m1 * m2)
    T = len(rows)
    order = order or contraction_order(A.shape, B.shape, T)
    if order == "W":
        y = rows @ kron_weight(A, B)
    elif order == "A":
        z = multiply_left(A.permute(2, 0, 1).reshape(n1 * r, m1), rows.reshape(T, m1, m2))  # (T, n1 r, m2)
        z = z.reshape(T * n1, r * m2)
        y = z * B[0] if r * m2 == 1 else z @ B.reshape(r * m2, n2)  # (T n1, n2)
    else:
        z = rows.reshape(T * m1, m2) @ B.transpose(0, 1).reshape(m2, r * n2)  # (T m1, r n2)
        y = multiply_left(A.permute(2, 1, 0).reshape(n1, m1 * r), z.view(T, m1 * r, n2))  # (T, n1, n2)
    return y.reshape(*x.shape[:-1], n1 * n2) + bias.to(y.dtype)


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
    if min(R.shape) == 1:
        small, large = R.new_ones(1, 1), R.reshape(-1, 1)
    else:
        small, large = leading_singular_vectors(R if is_long else R.T, n_factors)
        signs = small.gather(0, small.abs().argmax(0, keepdim=True)).sign()  # eigenvectors come with either sign
        norms = large.norm(dim=0)
        share = norms.clamp(min=max(torch.finfo(W.dtype).eps * norms[0], torch.finfo(W.dtype).tiny)).sqrt() * signs
        small, large = small * share, large / share
    A, B = (large, small) if is_long else (small, large)
    return (A.T.reshape(-1, dim_1, dim_2).to(W).contiguous(),
            B.T.reshape(-1, m // dim_1, n // dim_2).to(W).contiguous())


def balanced(A, B):
    """The same products A_f ⊗ B_f with ‖A_f‖ = ‖B_f‖; but a side of one element is 1."""
    if A[0].numel() == 1:
        return torch.ones_like(A), B * A
    if B[0].numel() == 1:
        return A * B, torch.ones_like(B)
    a, b = (side.flatten(1).norm(dim=1)[:, None, None] for side in (A, B))
    scale = torch.where((a > 0) & (b > 0), b.sqrt() / a.sqrt(), 1.0)
    return A * scale, B / scale
