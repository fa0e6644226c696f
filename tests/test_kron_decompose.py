"""kron_decompose.py against numpy.linalg.svd, torch.kron and plain counting."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, kron_sum, smallest_error, succeed
from transformers import GPT2LMHeadModel

from kronygpt import checkpoint
from kronygpt.budget import shapes_within


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_script_prints_and_writes_the_best_approximation(gpt2_dir, workdir):
    said = succeed("kron_decompose.py", 32, 64, "2,3", f"--init_from={gpt2_dir}")
    dense = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    found = torch.load("checkpoints/VL_32_64_2-3.pt", weights_only=True)["model"]
    errors = {tuple(line.split()[:3]): line.split()[3] for line in said.stdout.splitlines() if " mlp." in line}
    for layer, factors in ((0, 2), (1, 3)):
        for name, dims in (("c_fc", (32, 64)), ("c_proj", (64, 32))):
            W = dense.state_dict()[f"transformer.h.{layer}.mlp.{name}.weight"]  # [in, out]
            A, B = (found[f"transformer.h.{layer}.mlp.{name}_{side}"] for side in (0, 1))
            assert A.shape == (factors, *dims)
            smallest = smallest_error(W, *dims, factors)
            assert (W - kron_sum(A, B)).norm().item() == pytest.approx(smallest, rel=1e-5)
            assert errors[str(layer), f"mlp.{name}", str(factors)] == f"{smallest / W.norm():.4f}"

    n_factor_parameters = 2 * (2 + 3) * (32 * 64 + 2 * 4)
    after = n_parameters(dense) - 4 * 64 * 256 + n_factor_parameters
    assert f"in all: {n_parameters(dense):,} → {after:,} " in said.stdout
    assert f" → {n_factor_parameters + 2 * (64 + 256):,} " in said.stdout  # of the MLPs, with their biases


def test_everything_but_the_mlp_weights_is_kept(gpt2_dir, workdir):
    said = succeed("kron_decompose.py", 64, 256, 1, f"--init_from={gpt2_dir}", "--out=dense.pt")
    assert "mlp.c_fc" not in said.stdout
    assert "next:" not in said.stdout  # the recipes are for GPT-2's vocabulary and context
    ours = torch.load("dense.pt", weights_only=True)["model"]
    for name, p in GPT2LMHeadModel.from_pretrained(gpt2_dir).state_dict().items():
        if name.endswith((".attn.c_attn.weight", ".attn.c_proj.weight")):
            assert torch.equal(ours[name], p.T), name
        elif ".mlp." in name and name.endswith(".weight"):
            assert torch.equal(ours[name.replace(".weight", "_0")], p[None]), name
        else:
            assert torch.equal(ours[name.replace("c_fc.", "c_fc_").replace("mlp.c_proj.", "mlp.c_proj_")], p), name


def test_a_budget_without_a_text_lists_shapes(gpt2_dir):
    said = succeed("kron_decompose.py", f"--init_from={gpt2_dir}", "--budget=56K,70K")
    rows = [tuple(map(int, line.replace(",", "").split()[:4])) for line in said.stdout.splitlines() if "× dense" in line]
    config = checkpoint.load(str(gpt2_dir))[0].config
    assert rows == [(size, *shape) for limit in (56_000, 70_000) for size, shape, _ in shapes_within(config, limit)[:20]]


def test_help_comes_without_torch():
    command = [sys.executable, "-X", "importtime", ROOT / "kron_decompose.py", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "--budget=82M" in said.stdout
    imported = {line.split("|")[-1].strip() for line in said.stderr.splitlines()}
    assert "kronygpt.configurator" in imported and not imported & {"torch", "numpy", "transformers"}
