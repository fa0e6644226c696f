"""bench.py: it runs at small sizes, and its table is complete."""
import json
import math
import re
from pathlib import Path

import torch
from conftest import succeed

from experiments import bench
from kronygpt import checkpoint
from model import KronyGPT, KronyGPTConfig, mlp_shapes

TINY = ("--n_layer=2", "--n_embd=64", "--n_head=1", "--vocab_size=300", "--block_size=100", "--repeats=1", "--device=cpu")
GENERATION = ["generation 1 × 64", "generation 1 × 100", "generation 8 × 64", "generation 8 × 100"]
MEASUREMENTS = ["training step", "forward", *GENERATION, "file"]  # and peak memory, on Linux and GPUs


def test_models_are_measured_against_the_dense_one(workdir):
    config = KronyGPTConfig(vocab_size=300, block_size=100, n_layer=2, n_embd=64, n_head=1, shapes=mlp_shapes(64, 1, [9, 9]))
    checkpoint.save("low.pt", KronyGPT(config))
    done = succeed("experiments/bench.py", *TINY, "--new_tokens=4", "--shapes=32,64,2", "--models=low.pt", "--out_dir=here")
    names = ["dense", "ours (32, 64, 2)", "transformers dense", "whole logits (32, 64, 2)", "low.pt"]
    results = json.loads(Path("here/results.json").read_text(encoding="utf-8"))
    assert list(results) == names
    for result in results.values():
        assert set(MEASUREMENTS) <= result["measured"].keys()
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
    for name, candidate in candidates.items():
        candidate.model.register_forward_hook(lambda *args, name=name: calls.append(name))
        if hasattr(candidate.model, "hidden"):
            candidate.model.transformer.ln_f.register_forward_hook(lambda *args, name=name: calls.append(name))
        candidate.generate(torch.zeros(1, 3, dtype=torch.long), 5)
    assert all(calls.count(name) >= 5 for name in candidates)
