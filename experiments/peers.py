"""Compress a GPT-2 by the methods of others, for the comparisons.

    python -m experiments.peers even_ranks 3.451M --init_from=out/base/best.pt  # → checkpoints/even_ranks_3.451M.pt
    python -m experiments.peers even_ranks 3.451M --init_from=out/base/best.pt --calibrate=pysource
    python -m experiments.peers svd_llm 3.451M --init_from=out/base/best.pt --calibrate=pysource

In all of them each matrix of each block becomes low rank and keeps the same share of its parameters.

even_ranks: without text the truncated SVD. With --calibrate the activation-aware SVD: least squares on a text, matrix after
matrix, in which all errors of the output count alike. The inputs are those of the model compressed so far, and biases are
fitted, too.
svd_llm: SVD-LLM (arXiv 2403.07378), which needs --calibrate. It takes each matrix by itself, with the inputs of the dense
model, and biases stay.
"""
import math
from bisect import bisect_right

import torch

from kronygpt import calibration, checkpoint, compress, data
from kronygpt.budget import parse_budget, room
from kronygpt.configurator import UserError, run
from kronygpt.device import float64
from kronygpt.files import output_file
from kronygpt.kron import balanced
from model import KINDS, Shape

init_from = "gpt2"  # the model to compress: a hub name, a Hugging Face directory or a checkpoint
out: str | None = None  # file to write; default: checkpoints/even_ranks_....pt or svd_llm_....pt
calibrate: str | None = None  # data set under data/ to fit the factors to
calibration_tokens = 131072  # number of its tokens
device = ""  # where to calibrate; default: CUDA if available, else Apple's mps, else the CPU

SHARES = 10_000  # steps in which the share of even_ranks is chosen


def even_ranks(config, limit):
    """The shapes {kind: [Shape of each block]} with which all matrices keep the same share of their parameters."""
    def ranks(share):  # r (m + n - r) numbers are in a file
        return {kind: [max(1, int((m + n - math.sqrt((m + n)**2 - 4 * share * m * n)) / 2)) for m, n in of_blocks]
                for kind, of_blocks in sizes.items()}

    def used(share):
        return sum(r * (m + n - r) for kind, of_blocks in sizes.items() for r, (m, n) in zip(ranks(share)[kind], of_blocks))

    sizes = {kind: [config.sizes(layer)[kind] for layer in range(config.n_layer)] for kind in KINDS}
    spare, shares = room(config, KINDS, limit), range(1, SHARES)
    share = shares[bisect_right(shares, spare, key=lambda share: used(share / SHARES)) - 1] / SHARES
    return {kind: [Shape(m, 1, r) for (m, _), r in zip(sizes[kind], rs)] for kind, rs in ranks(share).items()}


def best_on_inputs(W, G, r):
    """A [r, m, 1] and B [r, 1, n] of the rank-r matrix W_r with the least ‖X (W − W_r)‖ for W [m, n] and inputs X with the
    second moments G [m, m].

    SVD-LLM truncates the singular value decomposition Sᵀ W = U Σ Vᵀ, where S Sᵀ = G, and multiplies it with the inverse of
    Sᵀ. That is W V Vᵀ with the first r columns of V, which are eigenvectors of Wᵀ G W.
    """
    V = torch.linalg.eigh(W.T @ G @ W).eigenvectors[:, -r:]
    return balanced((W @ V).T[:, :, None], V.T[:, None, :])


def svd_llm(dense, shapes, text):
    """SVD-LLM's model in low-rank shapes, from the inputs of a KronyGPT on a text (windows, T)."""
    found, factors = calibration.statistics(dense, text), {}
    for layer, kind, matrix in dense.matrices():
        name = f"transformer.h.{layer}.{kind}"
        G = found.covariances[name] + found.means[name][:, None] * found.means[name]
        sides = best_on_inputs(float64(matrix.weight.detach()), G, shapes[kind][layer].factors)
        factors[layer, kind] = [side.to(matrix.weight).contiguous() for side in sides]
    return compress.with_factors(dense, factors)


def main(method, budget):
    if method not in ("even_ranks", "svd_llm") or (method == "svd_llm" and not calibrate):
        raise UserError("the method is even_ranks or svd_llm, and svd_llm needs --calibrate")
    path = output_file(out or f"checkpoints/{method}_{budget}.pt")
    dense, _ = checkpoint.load(init_from)
    limit = parse_budget(budget, dense.count_parameters()["total"])
    shapes, fits, text = even_ranks(dense.config, limit), [], None
    if calibrate:
        text = data.calibration_text(calibrate, calibration_tokens, dense.config, device)
        dense.to(text.device)
    if method == "svd_llm":
        new = svd_llm(dense, shapes, text)
    else:
        new = compress.factorize(dense, shapes)
        fits = calibration.calibrate(dense, new, text) if calibrate else []
    compress.report(dense, new, fits)
    options = dict(init_from=init_from, method=method, budget=budget, calibrate=calibrate,
                   calibration_tokens=calibration_tokens if calibrate else None)
    compress.write(path, dense, new, options, "config/train_gpt2_budget.py")


if __name__ == "__main__":
    run(main)
