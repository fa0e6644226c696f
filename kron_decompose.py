"""Compress a GPT-2: its matrices as low rank or as sums of Kronecker products.

    python kron_decompose.py --budget=82M --calibrate=openwebtext  # the whole model in 82M → checkpoints/best_82M.pt
    python kron_decompose.py --budget=82M --calibrate=openwebtext --matrices=mlp   # ... attention stays dense
    python kron_decompose.py --budget=96M               # the shapes of the MLPs that make a 96M model
    python kron_decompose.py dim_1 dim_2 n_factors      # Van Loan's sum → checkpoints/VL_{dim_1}_{dim_2}_{n_factors}.pt
    python kron_decompose.py 256 64 16,16,10,10,10,10,10,10,10,10,10,10     # a number of factors for each layer
    python kron_decompose.py 768 768 1 --calibrate=openwebtext     # → checkpoints/calibrated_....pt
    python kron_decompose.py 768 1 164 --attention_rank=164        # attention, too: (n_embd, 1, 164)

With --budget and --calibrate, each matrix of each block gets a rank of its own: the ranks that should raise the loss on the
text least. dim_1, dim_2 and n_factors instead are one shape for all MLPs: dim_1 divides n_embd, dim_2 divides 4 n_embd, and
they are the sides of A in c_fc; c_proj has the mirror image.

Van Loan's decomposition is the nearest to the weights. With --calibrate the factors are then fitted to what the weights do
to the text of a data set, one matrix after the other, and an error counts as much as the loss feels it. This keeps far more
of what the model has learnt. It takes minutes, and a GPU helps.
"""
import time
from decimal import Decimal

from kronygpt.configurator import UserError, check_choice, check_range, run
from kronygpt.files import check_is_file

init_from = "gpt2"  # the model to decompose: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/best_....pt, VL_....pt or calibrated_....pt
budget = "82M"  # total number of parameters, of the whole model or for the table of shapes
matrices = "all"  # matrices that share the budget: all, or mlp for those of the MLPs
attention_rank = 0  # rank of the attention matrices beside dim_1 dim_2 n_factors; 0 leaves them dense
calibrate: str | None = None  # data set under data/ to fit the factors to
calibration_tokens = 131072  # number of its tokens
refine_steps = 0  # gradient steps on each block after the closed-form fit
device = ""  # of the calibration; default: CUDA if available, else the CPU
metric = "fisher"  # of errors; none, where all count alike, is for comparisons
ranks = "loss"  # of a budget: by predicted loss; even, the same share for each matrix, is for comparisons

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


def print_table(shapes):
    """Print the first of some budget.MLPShapes."""
    print(f"{'parameters':>12}  dim_1  dim_2  factors  multiply-adds of an MLP  rank, at most")
    for s in shapes[:SHOWN]:
        print(f"{s.parameters:>12,}  {s.dim_1:>5}  {s.dim_2:>5}  {s.n_factors:>7}  {s.multiply_adds:>16.2f} × dense  "
              f"{s.rank:>13}")
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


def print_allocations(allocations):
    """Print the shares of a budget, budget.Allocations."""
    print(f"{'layer':>5}  {'matrix':<11}  {'rank':>5}  {'parameters':>10}  loss added, predicted (nats per token)")
    for a in allocations:
        rank, loss = "dense" if a.shape.dim_2 > 1 else a.shape.factors, "" if a.loss is None else f"{a.loss:.5f}"
        print(f"{a.layer:>5}  {a.kind:<11}  {rank:>5}  {a.parameters:>10,}  {loss:>10}".rstrip())
    if allocations[0].loss is not None:
        total, loss = sum(a.parameters for a in allocations), sum(a.loss for a in allocations)
        print(f"in all {total:,} parameters, {loss:.4f} nats per token added")


def check_options(dim_1, n_factors):
    check_range(globals(), "refine_steps attention_rank", at_least=0)
    check_choice(globals(), "matrices", "all", "mlp")
    check_choice(globals(), "metric", "fisher", "none")
    check_choice(globals(), "ranks", "loss", "even")
    if dim_1 and not n_factors:
        raise UserError("give all three of dim_1 dim_2 n_factors, or none of them for a budget")
    if attention_rank and not dim_1:
        raise UserError("--attention_rank goes with dim_1 dim_2 n_factors; a budget chooses the ranks itself")


def main(dim_1=None, dim_2=None, n_factors=None):
    from kronygpt import calibration, checkpoint, compress, data
    from kronygpt.budget import allocate, shapes_within
    from kronygpt.kron import van_loan
    from model import KronyGPTConfig, Shape, mlp_shapes

    limit, largest = parse_budget(budget)
    check_options(dim_1, n_factors)
    by_loss = not dim_1 and ranks == "loss"
    wants_table = by_loss and not calibrate
    if wants_table and init_from in GPT2_SIZES:  # which need no download
        n_layer, n_embd = GPT2_SIZES[init_from]
        config = KronyGPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // checkpoint.GPT2_HEAD_DIM)
        return print_table(shapes_within(config, limit, largest))
    dense, _ = checkpoint.load(init_from)
    config = dense.config
    if wants_table:
        return print_table(shapes_within(config, limit, largest))

    name = f"{dim_1}_{dim_2}_{n_factors.replace(',', '-')}" if dim_1 else budget
    name += f"_attention_{attention_rank}" if attention_rank else ""
    path = out or f"checkpoints/{('calibrated' if calibrate else 'VL') if dim_1 else 'best'}_{name}.pt"
    check_is_file(path)
    kinds = [kind for kind in config.matrices
             if kind.startswith("mlp.") or (attention_rank if dim_1 else matrices == "all")]
    if dim_1:
        dim_1, dim_2, factors = parse_shape(dim_1, dim_2, n_factors, config.n_layer)
        shapes = {kind: [Shape(config.n_embd, 1, attention_rank)] * config.n_layer for kind in kinds}
        shapes |= mlp_shapes(dim_1, dim_2, factors)
        compress.reshaped(config, shapes)  # an error comes before the work
    else:
        allocations = allocate(config, kinds, limit)

    start, options, fits, fisher = time.perf_counter(), dict(init_from=init_from), None, None
    if not dim_1:
        options |= dict(budget=budget, matrices=matrices, ranks=ranks)
    if calibrate:
        options |= dict(calibrate=calibrate, calibration_tokens=calibration_tokens, metric=metric, refine_steps=refine_steps)
        text = data.calibration_text(calibrate, calibration_tokens, config, device)
        dense.to(text.device)
        if dim_1:  # the hidden units that contribute most get columns of A of their own
            hidden, _ = calibration.contributions(dense, text)
            order = [calibration.interleave(scores, dim_2, config.n_inner // dim_2) for scores in hidden]
            dense = compress.reorder_units(dense, hidden=order)
        if metric == "fisher" or by_loss:
            fisher, spectra = calibration.statistics(dense, text, kinds)
        if by_loss:
            allocations = allocate(config, kinds, limit, spectra)
    if not dim_1:
        print_allocations(allocations)
        shapes = {kind: [a.shape for a in allocations if a.kind == kind] for kind in kinds}
    new = compress.factorize(dense, shapes, van_loan)
    if calibrate:
        fits = calibration.calibrate(dense, new, text, fisher if metric == "fisher" else None, refine_steps=refine_steps)
    seconds = time.perf_counter() - start
    compress.print_errors(dense, new, fits)
    recipe = f"config/train_gpt2{'' if dim_1 else '_budget'}.py"
    compress.write(path, dense, new, options, f"the factors took {seconds:.1f} s", recipe)


if __name__ == "__main__":
    run(main)
