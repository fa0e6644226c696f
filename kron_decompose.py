"""Van Loan's decomposition: every MLP matrix of a GPT-2 as its best sum of Kronecker products.

    python kron_decompose.py                            # the shapes that make an 82M model of GPT-2
    python kron_decompose.py --budget=96M               # ... of another size
    python kron_decompose.py --budget=96M --calibrate=openwebtext  # the best of them → checkpoints/best_96M.pt
    python kron_decompose.py dim_1 dim_2 n_factors      # → checkpoints/VL_{dim_1}_{dim_2}_{n_factors}.pt
    python kron_decompose.py 768 768 1
    python kron_decompose.py 256 64 16,16,10,10,10,10,10,10,10,10,10,10     # a number of factors for each layer
    python kron_decompose.py 768 768 1 --calibrate=openwebtext     # → checkpoints/calibrated_....pt

dim_1 divides n_embd, dim_2 divides 4 n_embd: they are the sides of A in c_fc, and the mirror image serves c_proj.

Van Loan's decomposition is nearest to the weights. With --calibrate it is only where the factors start from: they are then
fitted to what the weights do to text of a data set, one matrix after the other, which keeps far more of what the model
has learnt. This takes minutes, and a GPU helps. With --calibrate and no shape, the shapes within the budget are ranked by
the error that each would make on the text, the best ones tried on other text of it, and the best one of these is written.
"""
from configurator import UsageError, run

init_from = "gpt2"  # what is decomposed: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # the file to write, in the place of checkpoints/VL_....pt
calibrate: str | None = None  # a data set under data/, to whose text the factors are fitted
calibration_tokens = 32768  # how many of its tokens
refine_steps = 400  # gradient steps on each block after the closed form of the calibration; 0 for none
device = ""  # of the calibration: cuda, cpu, ...: what there is if left out
budget = "82M"  # parameters in all, for the table of shapes and the search among them

GPT2_SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
NEARLY_EXACT = 1e-3  # share of the largest eigenvalue that all those left out must reach for float32 to tell them apart
OVERSAMPLING = 8  # vectors beyond those asked for
SHOWN = 20  # shapes of the ranking that are printed


def rearrange(W, dim_1, dim_2):
    """Van Loan's rearrangement of W [m, n]: [dim_1*dim_2, (m/dim_1)*(n/dim_2)], with a block of W in each row, so
    that A ⊗ B becomes the outer product vec(A) vec(B)ᵀ."""
    m, n = W.shape
    blocks = W.reshape(dim_1, m // dim_1, dim_2, n // dim_2).transpose(1, 2)  # (dim_1, dim_2, m/dim_1, n/dim_2)
    return blocks.reshape(dim_1 * dim_2, -1)


def leading_singular_vectors(R, n):
    """The right singular vectors of R [m, k], m >= k, for its n largest singular values, and what R makes of them.

    The eigenvectors of the Gram matrix in float32, at half the time and a few more than asked for, span a space that a
    step of subspace iteration and Rayleigh and Ritz's projection in float64 make exact. Where R is within reach of
    float32's rounding from its approximation, the Gram matrix is in float64 from the beginning.

    Args:
        R: float64.

    Returns:
        V [k, n], orthonormal, in descending order, and R V [m, n].
    """
    import torch

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
    singular value is shared evenly, ‖A_f‖ = ‖B_f‖; but where one side is a single element, it is 1.

    Source: C. F. Van Loan and N. Pitsianis, Approximation with Kronecker products, 1993.

    Args:
        W: [m, n].
        dim_1: rows of A, a divisor of m.
        dim_2: columns of A, a divisor of n.
        n_factors: at most the smaller side of the rearranged matrix.

    Returns:
        A [n_factors, dim_1, dim_2] and B [n_factors, m/dim_1, n/dim_2], so that W ≈ sum_f A_f ⊗ B_f, in the type of W.
    """
    import torch

    m, n = W.shape
    R = rearrange(W, dim_1, dim_2).double()
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
    return (A.T.reshape(-1, dim_1, dim_2).to(W.dtype).contiguous(),
            B.T.reshape(-1, m // dim_1, n // dim_2).to(W.dtype).contiguous())


def parse_number(text):
    """A number of parameters such as 82M, 1.5B, 900K or 82000000."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    try:
        unit = units.get(text[-1:].upper(), 1)
        return int(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        raise UsageError(f"--budget takes a number of parameters such as 82M, not {text}") from None


def print_shapes(shapes):
    """Print a table of budget.Shapes; with the predicted errors where they are known."""
    is_ranked = shapes[0].quick_error is not None
    print(f"{'parameters':>12}  dim_1  dim_2  factors  multiply-adds of an MLP  rank, at most"
          f"{'  error, one block  error, a few' if is_ranked else ''}")
    for s in shapes:
        errors = "".join(f"  {error:>{width}.4f}" for error, width in ((s.quick_error, 16), (s.error, 12))
                         if error is not None)
        print(f"{s.parameters:>12,}  {s.dim_1:>5}  {s.dim_2:>5}  {s.n_factors:>7}  {s.multiply_adds:>16.2f} × dense  "
              f"{s.rank:>13}{errors}")


def parse_shape(dim_1, dim_2, n_factors, n_layer):
    """The positional arguments as numbers: dim_1, dim_2 and the factors of each layer."""
    try:
        factors = [int(n) for n in n_factors.split(",")]
        return int(dim_1), int(dim_2), factors * n_layer if len(factors) == 1 else factors
    except ValueError:
        raise UsageError("dim_1, dim_2 and n_factors are whole numbers (n_factors may be a comma list), not "
                         f"{dim_1} {dim_2} {n_factors}") from None


def find_shape(model, text, limit):
    """Search the shapes within a number of parameters for the one that keeps most of a model, and say what was found.

    Returns:
        dim_1, dim_2 and the factors of each layer.
    """
    from budget import search
    from calibration import calibration_text

    held_out = calibration_text(calibrate, calibration_tokens, model.config, device, between=True)
    shapes, candidates = search(model, text, held_out, limit, van_loan)
    print(f"the best {min(SHOWN, len(shapes))} of {len(shapes)} shapes by the error that they put into the residual stream")
    print_shapes(shapes[:SHOWN])
    print("calibrated on the whole model, without refinement:\n  loss on other text  shape")
    for c in candidates:
        factors = c.factors[0] if len(set(c.factors)) == 1 else ",".join(map(str, c.factors))
        print(f"{c.loss:>20.4f}  {c.dim_1} {c.dim_2} {factors}")
    return candidates[0].dim_1, candidates[0].dim_2, candidates[0].factors


def main(dim_1=None, dim_2=None, n_factors=None):
    limit = parse_number(budget)
    if refine_steps < 0:
        raise UsageError(f"--refine_steps is at least 0, not {refine_steps}")
    if dim_1 and not n_factors:
        raise UsageError("give all three of dim_1 dim_2 n_factors, or none of them for the table of shapes")
    if not dim_1 and not calibrate and init_from in GPT2_SIZES:
        from budget import shapes_within
        from model import GPT2_HEAD_DIM, KronyGPTConfig

        n_layer, n_embd = GPT2_SIZES[init_from]
        config = KronyGPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // GPT2_HEAD_DIM)
        return print_shapes(shapes_within(config, limit))

    import checkpoint

    model, _ = checkpoint.load(init_from)
    if not dim_1 and not calibrate:
        from budget import shapes_within

        return print_shapes(shapes_within(model.config, limit))
    name = f"{dim_1}_{dim_2}_{n_factors.replace(',', '-')}" if dim_1 else budget
    path = out or f"checkpoints/{('calibrated' if calibrate else 'VL') if dim_1 else 'best'}_{name}.pt"
    if dim_1:
        shape = parse_shape(dim_1, dim_2, n_factors, model.config.n_layer)
    config = dict(init_from=init_from)
    if calibrate:
        from calibration import calibration_text, save_calibrated

        config |= dict(calibrate=calibrate, calibration_tokens=calibration_tokens, refine_steps=refine_steps)
        checkpoint.check_is_file(path)
        text, _ = calibration_text(calibrate, calibration_tokens, model.config, device)
        if not dim_1:
            shape = find_shape(model.to(text.device), text, limit)
        save_calibrated(model, text, path, config, *shape, van_loan, refine_steps=refine_steps)
    else:
        checkpoint.save_refactored(model, *shape, van_loan, path, config)
    print(f"next: python train.py config/train_gpt2.py --init_from={path}")


if __name__ == "__main__":
    run(main)
