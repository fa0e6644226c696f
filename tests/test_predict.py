"""predict.py beside the models that kron_decompose.py writes, and a plain formula."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize_vectors, run_here
from torch.nn import functional as F

from experiments import predict
from experiments.predict import rank_correlation
from kronygpt import checkpoint, compress
from kronygpt.configurator import UserError
from kronygpt.data import load_tokens
from model import KronyGPT, KronyGPTConfig

OPTIONS = ["--init_from=dense.pt", "--calibrate=pattern", "--calibration_tokens=2048", "--budgets=0.9,0.6", "--share=0.3"]


@pytest.fixture
def dense(workdir):
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        p.data.mul_(6)  # otherwise the blocks hardly matter
    randomize_vectors(model)
    checkpoint.save("dense.pt", model)
    directory = Path("data/pattern")
    directory.mkdir(parents=True)
    tokens = np.random.default_rng(0).geometric(0.05, 5000).clip(max=255).astype(np.uint16)
    tokens[:4000].tofile(directory / "train.bin")
    tokens[4000:].tofile(directory / "val.bin")
    (directory / "meta.json").write_text(json.dumps(dict(vocab_size=256, tokenizer="bytes")))
    return model.eval()


def plain_loss(model):
    tokens = torch.from_numpy(load_tokens("pattern", "val", model.config).astype(np.int64))
    with torch.no_grad():
        return np.mean([F.cross_entropy(model(w[None, :-1])[0], w[1:]).item() for w in tokens.split(32) if len(w) == 32])


def test_what_is_measured_is_the_loss_of_the_models_that_are_written(dense):
    said = run_here("experiments/predict.py", *OPTIONS)
    assert said.returncode == 0, said.stderr
    lines = Path("out/predict/table.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:] if line.startswith("|")]
    assert [row[0] for row in rows] == ["budget", "budget"] + [
        f"block {layer} {kind}" for layer in range(2) for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert Path("out/predict/predicted.png").read_bytes()[:4] == b"\x89PNG"
    n_parameters = dense.count_parameters()["total"]
    for share, row in zip((0.9, 0.6), rows):
        limit = int(share * n_parameters)
        said = run_here("kron_decompose.py", f"--budget={limit}", "--init_from=dense.pt", "--calibrate=pattern",
                        "--calibration_tokens=2048", "--out=made.pt")
        assert said.returncode == 0, said.stderr
        made = checkpoint.load("made.pt")[0].eval()
        assert int(row[1].replace(",", "")) == made.count_parameters()["total"] <= limit
        assert float(row[4]) == pytest.approx(plain_loss(made) - plain_loss(dense), abs=2e-5)
        predicted = re.search(r"predicted, order only: ([\d.e-]+)", said.stdout)[1]
        assert float(row[3]) == pytest.approx(float(predicted), rel=0.01, abs=1e-5)


def test_rank_correlation():
    x, y = np.random.default_rng(0).random((2, 20))
    ranks = [[sorted(side).index(value) for value in side] for side in (x, y)]
    assert rank_correlation(list(zip(x, y))) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert rank_correlation([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1)


def test_the_correlation_is_that_of_matrices_alone(workdir):
    rows = [("budget", 9, 0.5, 1, 2), *((f"block {i} mlp.c_fc", 9, 0.249, i, loss) for i, loss in enumerate((1, 2, 3)))]
    predict.write_table(rows)
    table = Path("out/predict/table.md").read_text(encoding="utf-8")
    assert table.endswith("Rank correlation of matrices alone: 1.00 over 3 matrices at 25%.\n")


def test_what_was_measured_is_there_when_a_later_model_fails(dense, monkeypatch):
    apply, done = compress.apply, []

    def fail_later(*args):
        done.append(1)
        if len(done) > 2:
            raise UserError("an error")
        return apply(*args)

    monkeypatch.setattr(compress, "apply", fail_later)  # the script is read after this
    assert run_here("experiments/predict.py", *OPTIONS).stderr == "error: an error\n"
    assert Path("out/predict/table.md").read_text(encoding="utf-8").count("| budget") == 2
