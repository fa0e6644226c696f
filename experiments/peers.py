"""Compress a GPT-2 by the methods of others, for the comparisons.

    python -m experiments.peers even_ranks 0.931M --init_from=out/base/best.pt  # → checkpoints/even_ranks_0.931M.pt
    python -m experiments.peers even_ranks 0.931M --init_from=out/base/best.pt --calibrate=pydocs

even_ranks: each matrix of each block becomes low rank and keeps the same share of its parameters. Without text this is the
truncated SVD. With --calibrate it is the activation-aware SVD: the least squares on the inputs of a text, in which all
errors of the output count alike, in the way of SVD-LLM (arXiv 2403.07378), but with the inputs of the model compressed so
far and with refitted biases.
"""
import math
import time
from bisect import bisect_right

from kronygpt.configurator import run

init_from = "gpt2"  # the model to compress: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/even_ranks_....pt
calibrate: str | None = None  # data set under data/ to fit the factors to
calibration_tokens = 131072  # number of its tokens
device = ""  # where to calibrate; default: CUDA if available, else the CPU

SHARES = 10_000  # steps in which the share of even_ranks is chosen


def even_ranks(config, limit):
    """The shapes {kind: [Shape of each block]} with which all matrices keep the same share of their parameters."""
    from kronygpt.budget import room
    from model import KINDS, Shape

    def ranks(share):  # r (m + n - r) numbers are in a file
        return {kind: [max(1, int((m + n - math.sqrt((m + n)**2 - 4 * share * m * n)) / 2)) for m, n in of_blocks]
                for kind, of_blocks in sizes.items()}

    def used(share):
        return sum(r * (m + n - r) for kind, of_blocks in sizes.items() for r, (m, n) in zip(ranks(share)[kind], of_blocks))

    sizes = {kind: [config.sizes(layer)[kind] for layer in range(config.n_layer)] for kind in KINDS}
    spare, shares = room(config, KINDS, limit), range(1, SHARES)
    share = shares[bisect_right(shares, spare, key=lambda share: used(share / SHARES)) - 1] / SHARES
    return {kind: [Shape(m, 1, r) for (m, _), r in zip(sizes[kind], rs)] for kind, rs in ranks(share).items()}


METHODS = {"even_ranks": even_ranks}


def main(method, budget):
    from kronygpt import calibration, checkpoint, compress, data
    from kronygpt.budget import parse_budget
    from kronygpt.files import output_file

    path, start = output_file(out or f"checkpoints/{method}_{budget}.pt"), time.perf_counter()
    dense, _ = checkpoint.load(init_from)
    limit, _ = parse_budget(budget, dense.count_parameters()["total"])
    new, fits = compress.factorize(dense, METHODS[method](dense.config, limit)), []
    if calibrate:
        text = data.calibration_text(calibrate, calibration_tokens, dense.config, device)
        fits = calibration.calibrate(dense.to(text.device), new.to(text.device), text)
    compress.report(dense, new, fits)
    print(f"compressed in {time.perf_counter() - start:.1f} s")
    options = dict(init_from=init_from, method=method, budget=budget, calibrate=calibrate,
                   calibration_tokens=calibration_tokens if calibrate else None)
    compress.write(path, dense, new, options, "config/train_gpt2_budget.py")


if __name__ == "__main__":
    run(main)
