"""Van Loan's decomposition: each MLP matrix of a GPT-2 as its best sum of Kronecker products.

    python kron_decompose.py                            # the shapes that make an 82M model of GPT-2
    python kron_decompose.py --budget=96M               # ... of another size
    python kron_decompose.py --budget=96M --calibrate=openwebtext  # the best of them → checkpoints/best_96M.pt
    python kron_decompose.py dim_1 dim_2 n_factors      # → checkpoints/VL_{dim_1}_{dim_2}_{n_factors}.pt
    python kron_decompose.py 768 768 1
    python kron_decompose.py 256 64 16,16,10,10,10,10,10,10,10,10,10,10     # a number of factors for each layer
    python kron_decompose.py 768 768 1 --calibrate=openwebtext     # → checkpoints/calibrated_....pt

dim_1 divides n_embd, dim_2 divides 4 n_embd: they are the sides of A in c_fc; c_proj has the mirror image.

Van Loan's decomposition is the nearest to the weights. With --calibrate the factors are then fitted to what the weights do
to the text of a data set, one matrix after the other, which keeps far more of what the model has learnt. This takes
minutes, and a GPU helps. With --calibrate and no shape, the shapes that fit the budget are ranked by their predicted error
on the text, the best of them are tried on other text, and the best one of these is written.
"""
import time
from decimal import Decimal

from configurator import UserError, check_range, run
from files import check_is_file

init_from = "gpt2"  # the model to decompose: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/VL_....pt
calibrate: str | None = None  # data set under data/ to fit the factors to
calibration_tokens = 32768  # number of its tokens
refine_steps = 400  # gradient steps on each block after the closed-form fit; 0 for none
device = ""  # of the calibration; default: CUDA if available, else the CPU
budget = "82M"  # total number of parameters, for the table of shapes and the search

GPT2_SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
SHOWN = 20  # rows that are printed


def parse_budget(text):
    """A number of parameters such as 82M, 1.5B or 82000000, and the largest that is written so: 82M is 82.x million."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    unit = units.get(text[-1:].upper(), 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text)
        if number <= 0:
            raise ValueError
        last_digit = Decimal(1).scaleb(number.as_tuple().exponent) * unit
        return int(number * unit), int(number * unit + last_digit) - 1
    except (ArithmeticError, ValueError, TypeError):
        raise UserError(f"--budget takes a number of parameters such as 82M, not {text}") from None


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


def print_table(shapes):
    """Print the first of some budget.MLPShapes."""
    print_shapes(shapes[:SHOWN])
    if len(shapes) > SHOWN:
        print(f"... and {len(shapes) - SHOWN} more with as many multiply-adds or more")


def parse_shape(dim_1, dim_2, n_factors, n_layer):
    """The positional arguments as numbers: dim_1, dim_2 and the factors of each layer."""
    try:
        factors = [int(n) for n in n_factors.split(",")]
        return int(dim_1), int(dim_2), factors * n_layer if len(factors) == 1 else factors
    except ValueError:
        raise UserError("dim_1, dim_2 and n_factors are whole numbers (n_factors may be a comma list), not "
                         f"{dim_1} {dim_2} {n_factors}") from None


def print_search(shapes, candidates):
    """Print the result of budget.search."""
    print(f"the best {min(SHOWN, len(shapes))} of {len(shapes)} shapes by the error that they put into the residual stream")
    print_shapes(shapes[:SHOWN])
    print("calibrated on the whole model, without refinement:\n  loss on other text  shape")
    for c in candidates:
        factors = c.factors[0] if len(set(c.factors)) == 1 else ",".join(map(str, c.factors))
        print(f"{c.loss:>20.4f}  {c.dim_1} {c.dim_2} {factors}")


def main(dim_1=None, dim_2=None, n_factors=None):
    import calibration
    import checkpoint
    import compress
    from budget import search, shapes_within
    from kron import van_loan
    from model import KronyGPTConfig, mlp_shapes

    limit, largest = parse_budget(budget)
    check_range(globals(), "refine_steps", at_least=0)
    if dim_1 and not n_factors:
        raise UserError("give all three of dim_1 dim_2 n_factors, or none of them for the table of shapes")
    if not dim_1 and not calibrate and init_from in GPT2_SIZES:  # which need no download
        n_layer, n_embd = GPT2_SIZES[init_from]
        config = KronyGPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // checkpoint.GPT2_HEAD_DIM)
        return print_table(shapes_within(config, limit, largest))
    dense, rest = checkpoint.load(init_from)
    if not dim_1 and not calibrate:
        return print_table(shapes_within(dense.config, limit, largest))

    name = f"{dim_1}_{dim_2}_{n_factors.replace(',', '-')}" if dim_1 else budget
    path = out or f"checkpoints/{('calibrated' if calibrate else 'VL') if dim_1 else 'best'}_{name}.pt"
    check_is_file(path)
    if calibrate:
        source = dict(dataset=calibrate, n_tokens=calibration_tokens, config=dense.config, device=device,
                      tokenizer=rest["tokenizer"])
        text, _ = calibration.calibration_text(**source)
        dense.to(text.device)
    if dim_1:
        shape = parse_shape(dim_1, dim_2, n_factors, dense.config.n_layer)
    else:
        held_out = calibration.calibration_text(**source, between=True)
        shapes, candidates = search(dense, text, held_out, limit)
        print_search(shapes, candidates)
        shape = candidates[0].dim_1, candidates[0].dim_2, candidates[0].factors

    start, fits, options = time.perf_counter(), None, dict(init_from=init_from, tokenizer=rest["tokenizer"])
    new = compress.factorize(dense, mlp_shapes(*shape), van_loan)
    if calibrate:
        fits = calibration.calibrate(dense, new, text, refine_steps=refine_steps)
        options |= dict(calibrate=calibrate, calibration_tokens=calibration_tokens, refine_steps=refine_steps)
    seconds = time.perf_counter() - start
    compress.print_errors(dense, new, fits)
    compress.write(path, dense, new, options, f"the factors took {seconds:.1f} s")
    print(f"next: python train.py config/train_gpt2.py --init_from={path}")


if __name__ == "__main__":
    run(main)
