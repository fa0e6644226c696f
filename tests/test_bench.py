"""bench.py: the commands run at small sizes, and their tables are complete."""
import json
import math
import re
from pathlib import Path

import pytest
from conftest import run_here

TINY = ("--n_layer=2", "--n_embd=64", "--n_head=1", "--vocab_size=300", "--block_size=100", "--repeats=1", "--device=cpu")
MEASUREMENTS = ["training step", "forward", "generation 1 × 64", "generation 1 × 100", "generation 8 × 64",
                "generation 8 × 100", "file"]  # and peak memory, on Linux and GPUs


def test_models_are_measured_against_the_dense_one(workdir):
    done = run_here("bench.py", *TINY, "--new_tokens=4", "--shapes=32,64,2", "--out_dir=here")
    assert done.returncode == 0, done.stderr
    names = ["dense", "torch.kron (32, 64, 2)", "ours (32, 64, 2)", "transformers dense", "whole logits (32, 64, 2)"]
    results = json.loads(Path("here/results.json").read_text())
    assert list(results) == names
    for result in results.values():
        assert set(MEASUREMENTS) <= result["measured"].keys()
        assert all(math.isfinite(value) and value > 0 for value in result["faster_than_dense"].values())
    assert set(results["dense"]["faster_than_dense"].values()) == {1}
    assert results["ours (32, 64, 2)"]["faster_than_dense"]["file"] > 1
    assert results["dense"]["mfu"] > 0 and results["transformers dense"]["mfu"] == 0
    table = Path("here/table.md").read_text()
    assert re.findall(r"^\| ([^|]+?) +\|", table, re.M) == ["model", *names]
    assert table in done.stdout
    assert Path("here/ratios.png").stat().st_size > 0


def test_every_order_of_contraction_of_a_layer_is_timed(workdir):
    done = run_here("bench.py", "layer", *TINY, "--shapes=32,64,2", "--layer_shapes=64,256,1", "--layer_tokens=1 64")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"\((.*?)\) +(c_fc|c_proj) +(\d+) +(forward|backward)(.*)  ([ABW]) (\d+\.\d+)", done.stdout)
    assert [row[:4] for row in rows] == [(shape, matrix, tokens, what) for shape in ("32, 64, 2", "64, 256, 1")
                                         for matrix in ("c_fc", "c_proj") for tokens in ("1", "64")
                                         for what in ("forward", "backward")]
    assert all(float(over) >= 1 for *_, over in rows)
    for *_, cells, chosen, _ in rows:
        assert cells.split()["ABW".index(chosen)].endswith("ms")
    assert len(re.findall(r"ward: \d of 8 choices", done.stdout)) == 2


@pytest.mark.parametrize("args, said", [
    (["--shapes=768,768"], "expected shapes such as 768,768,1 256,64,10, not 768,768"),
    (["--shapes=50,768,1"], "dim_1=50 does not divide the 768 rows of mlp.c_fc"),
    (["layer", "--layer_tokens=0"], "expected numbers such as 1 64, not 0"),
    (["--repeats=0"], "--repeats is at least 1, not 0"), (["--dtype=int8"], "--dtype is float32 or bfloat16, not int8"),
    (["--new_tokens=64"], "--new_tokens is below 64, not 64"),
    (["score", "book.txt"], "bench.py takes models, layer, tokenize DOCUMENTS.jsonl, or score TEXT DENSE_MODEL MODEL"),
    (["tokenize", "no.jsonl"], "prepare_owt.py failed: error: no files match --data_files=")])
def test_bad_options_are_one_line(workdir, args, said):
    done = run_here("bench.py", *args)
    assert done.returncode in (1, 2) and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
