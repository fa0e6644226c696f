"""bench.py: it runs at small sizes, and its table is complete."""
import json
import math
import re
from pathlib import Path

import torch
from conftest import succeed

from experiments import bench

TINY = ("--n_layer=2", "--n_embd=64", "--n_head=1", "--vocab_size=300", "--block_size=100", "--repeats=1", "--device=cpu")
GENERATION = ["generation 1 × 64", "generation 1 × 100", "generation 8 × 64", "generation 8 × 100"]
MEASUREMENTS = ["training step", "forward", *GENERATION, "file"]  # and peak memory, on Linux and GPUs


def test_models_are_measured_against_the_dense_one(workdir):
    done = succeed("experiments/bench.py", *TINY, "--new_tokens=4", "--shapes=32,64,2", "--out_dir=here")
    names = ["dense", "ours (32, 64, 2)", "torch.kron (32, 64, 2)", "transformers dense", "whole logits (32, 64, 2)"]
    results = json.loads(Path("here/results.json").read_text(encoding="utf-8"))
    assert list(results) == names
    for name, result in results.items():
        missing = set(MEASUREMENTS) - result["measured"].keys()
        assert missing == (set(GENERATION) if name.startswith("torch.kron") else set())
        assert all(math.isfinite(value) and value > 0 for value in result["faster_than_dense"].values())
    assert set(results["dense"]["faster_than_dense"].values()) == {1}
    assert results["ours (32, 64, 2)"]["faster_than_dense"]["file"] > 1
    table = Path("here/table.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+?) +\|", table, re.M) == ["model", *names]
    assert table in done.stdout


def test_generation_makes_as_many_tokens_for_each_candidate(monkeypatch):
    """model.generate alone makes none: it is a generator."""
    for name, value in dict(n_layer=1, n_embd=8, n_head=1, vocab_size=300, block_size=100).items():
        monkeypatch.setattr(bench, name, value)
    candidates, calls = bench.make_candidates((8, 8, 1), is_first=True), []
    candidates = {name: candidate for name, candidate in candidates.items() if candidate.generate}
    for name, candidate in candidates.items():
        candidate.model.register_forward_hook(lambda *args, name=name: calls.append(name))
        if hasattr(candidate.model, "hidden"):
            candidate.model.transformer.ln_f.register_forward_hook(lambda *args, name=name: calls.append(name))
        candidate.generate(torch.zeros(1, 3, dtype=torch.long), 5)
    assert all(calls.count(name) >= 5 for name in candidates)


def test_a_fourth_number_factors_attention_and_many_factors_have_no_loop(monkeypatch):
    """A loop over many would keep as many whole matrices: 50 GB for GPT-2's MLPs at (768, 1, 153)."""
    for name, value in dict(n_layer=1, n_embd=64, n_head=1, vocab_size=300, block_size=100).items():
        monkeypatch.setattr(bench, name, value)
    matrices = bench.make_candidates((64, 1, 5, 7), is_first=False)["ours (64, 1, 5, 7)"].model.matrices()
    assert {kind: tuple(matrix.A.shape) for _, kind, matrix in matrices} == {
        "attn.c_attn": (7, 64, 1), "attn.c_proj": (7, 64, 1), "mlp.c_fc": (5, 64, 1), "mlp.c_proj": (5, 1, 64)}
    for shape, has_loop in (((64, 1, 16), True), ((64, 1, 17), False), ((64, 64, 1, 17), False)):
        assert (f"torch.kron {shape}" in bench.make_candidates(shape, is_first=False)) == has_loop
