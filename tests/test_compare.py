"""compare.py: what it keeps, what it counts, and that it goes on where it was."""
import json
import re
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import StandIn, run_here

import checkpoint
import compare
from configurator import UsageError
from model import KronyGPT, KronyGPTConfig


@pytest.fixture
def calls(workdir, monkeypatch):
    """A small model, a data set and the options of a comparison; the scripts that it calls, which run in this process."""
    directory = Path("data/walk")
    directory.mkdir(parents=True)
    steps = np.random.default_rng(0).integers(-2, 3, 3000).cumsum() % 256
    for split, part in (("train", steps[:2500]), ("val", steps[2500:])):
        part.astype(np.uint16).tofile(directory / f"{split}.bin")
    directory.joinpath("meta.json").write_text(json.dumps(dict(
        vocab_size=256, tokenizer="bytes", tokens={}, documents={}, source="a test")))
    torch.manual_seed(0)
    checkpoint.save("dense.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=1, n_embd=16)))
    Path("tiny.py").write_text("batch_size = 2\ngradient_accumulation_steps = 1\nmax_iters = 100\nwarmup_iters = 1\n"
                                 "eval_interval = 2\neval_iters = 1\ndevice = \"cpu\"\n")
    for name, value in dict(base="dense.pt", dataset="walk", train_config="tiny.py", steps=4, seeds="3,1", out_dir="out",
                            starts="whole: kron_decompose.py 16 64 1\nhalf: kron_decompose.py 16 32 1\n"
                                   "fitted: kron_decompose.py 16 32 1 --calibrate=walk --calibration_tokens=640"
                                   " --refine_steps=1 | --learning_rate=1e-3").items():
        monkeypatch.setattr(compare, name, value)
    called = []

    def run(command):
        called.append([Path(command[1]).name, *command[2:]])
        done = run_here(called[-1][0], *command[2:])
        assert done.returncode == 0, done.stderr
        return done

    monkeypatch.setattr(compare, "subprocess", StandIn(subprocess, run=run))
    return called


def test_every_start_is_trained_with_each_seed_and_scored(calls):
    compare.main()
    rows = json.loads(Path("out/results.json").read_text())
    assert [row["name"] for row in rows] == ["dense base", "whole", "half", "fitted"]
    assert rows[1]["before"] == pytest.approx(rows[0]["before"], abs=1e-5)
    training = [call for call in calls if call[0] == "train.py"]
    assert len(training) == 6 and all("--max_iters=4" in call for call in training)
    assert [sum(f"--seed={seed}" in call for call in training) for seed in (1, 3)] == [3, 3]
    assert sum("--learning_rate=1e-3" in call for call in training) == 2
    assert sum(call[0] == "kron_to_gpt.py" for call in calls) == 3  # with the first seed
    half = rows[2]
    assert half["shape"] == [16, 32, 1, 1] and [step for step, _ in half["runs"][0]["curve"]] == [0, 2, 4]
    model, _ = checkpoint.load("out/half/start.pt")
    assert half["mlp_parameters"] == sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert {"table.md", "pareto.png", "loss.png"} <= {path.name for path in Path("out").iterdir()}
    line = next(line for line in Path("out/table.md").read_text().splitlines() if line.startswith("| half"))
    losses = [run["after"] for run in half["runs"]]
    assert f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}" in line


def test_what_is_done_is_not_done_again(calls, monkeypatch):
    compare.main()
    calls.clear()
    compare.main()
    assert not calls
    monkeypatch.setattr(compare, "seeds", "3,1,2")
    compare.main()
    assert {call[0] for call in calls} == {"train.py", "perplexity.py"} and all("seed_2" in str(call) for call in calls)
    calls.clear()
    Path("out/half/seed_1.json").write_text("damaged")
    compare.main()
    assert [call[0] for call in calls] == ["train.py", "perplexity.py"]
    calls.clear()
    monkeypatch.setattr(compare, "starts", compare.starts.replace("16 32 1\n", "16 16 1\n"))
    compare.main()
    assert [call[0] for call in calls].count("kron_decompose.py") == 1
    assert [call[0] for call in calls].count("train.py") == 3


def test_the_share_taken_back_is_against_the_same_shape_and_the_dense_model_trained_as_long():
    def row(name, mlp, shape, before, *after):
        return dict(name=name, parameters=mlp + 10, mlp_parameters=mlp, shape=shape, before=before, tokens_per_second=1,
                    seconds=1, runs=[dict(after=loss, seconds=1, curve=[]) for loss in after])

    rows = [dict(row("base", 100, [4, 16, 1], 1.0), runs=[]), row("dense", 100, [4, 16, 1], 1.0, 0.8, 1.0),
            row("dense, distilled", 100, [4, 16, 1], 1.0, 0.9),
            row("plain", 50, [4, 8, 1], 5.0, 1.9), row("fitted", 50, [4, 8, 1], 2.0, 1.1),
            row("other", 50, [2, 8, 1], 3.0, 1.5)]
    assert [compare.taken_back(rows, r) for r in rows[1:]] == ["", "", "", "75% → 80%", ""]
    del rows[1:3]
    assert compare.taken_back(rows, rows[2]) == "75%"


def test_each_start_goes_on_with_its_best_learning_rate(calls, monkeypatch):
    monkeypatch.setattr(compare, "learning_rates", "1e-3,1e-2")
    compare.main()
    training = [call for call in calls if call[0] == "train.py"]
    assert [sum(f"--seed={seed}" in call for call in training) for seed in (3, 1)] == [6, 3]
    table = Path("out/table.md").read_text()
    assert "the best of 0.001, 0.01 with the first seed" in table
    for row in json.loads(Path("out/results.json").read_text())[1:]:
        losses = {rate: json.loads(Path("out", row["name"], f"rate_{rate}_seed_3", "after.json").read_text())["walk"]["loss"]
                  for rate in ("0.001", "0.01")}
        best = min(losses, key=losses.get)
        assert row["losses_by_rate"] == losses and row["runs"][0]["after"] == losses[best]
        assert str(row["learning_rate"]) == best and Path("out", row["name"], f"rate_{best}_seed_1.json").exists()
        assert re.search(rf"^\| {row['name']} .*\| {best} \|", table, re.M)
    calls.clear()
    compare.main()
    assert not calls


def test_a_training_that_was_stopped_is_no_result(calls, monkeypatch):
    run = compare.subprocess.run

    def stop_early(command):
        done = run(command)
        if "train.py" in command[1]:
            content = torch.load("out/whole/seed_3/ckpt.pt", weights_only=True)
            torch.save(dict(content, iter_num=2), "out/whole/seed_3/ckpt.pt")
        return done

    monkeypatch.setattr(compare, "subprocess", StandIn(subprocess, run=stop_early))
    with pytest.raises(compare.StepError, match="stopped after 2 of 4 steps"):
        compare.main()
    assert not Path("out/whole/seed_3.json").exists()


@pytest.mark.parametrize("starts, said", [
    ("a: prune.py '", "No closing quotation in \"a: prune.py '\""),
    ("a.b: prune.py\na-b: prune.py --offset=1", "another start has the name 'a-b'"), ("\n", "names no start")])
def test_starts_that_cannot_be_told_apart_or_read(starts, said, monkeypatch):
    monkeypatch.setattr(compare, "starts", starts)
    with pytest.raises(UsageError, match=re.escape(said)):
        compare.parse_starts()


def test_a_script_that_fails_ends_the_comparison_in_one_line(calls, monkeypatch):
    monkeypatch.setattr(compare, "subprocess",
                        StandIn(subprocess, run=lambda command: subprocess.CompletedProcess(command, 2)))
    with pytest.raises(compare.StepError, match=re.escape("perplexity.py failed; see above")):
        compare.main()
    assert not Path("out/results.json").exists()
