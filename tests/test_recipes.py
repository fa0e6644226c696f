"""The recipes in config/: each one starts, and the costs in their comments are the arithmetic of their numbers."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here
from test_train import write_dataset

import train
from kronygpt import checkpoint
from kronygpt.configurator import configure, option_types
from model import KronyGPT, KronyGPTConfig, mlp_shapes

RECIPES = sorted(path.stem for path in ROOT.glob("config/train_gpt2*.py"))
OTHERS = ("demo_train", "compare_bytes_train")
SHAPES = {"VL_768_768_1": (768, 768, 1), "prune_384_3072": (384, 3072, 1), "VL_32_64_4": (32, 64, 4), "gpt2": (768, 3072, 1)}


def options_of(recipe):
    """{option: value} of train.py with a recipe."""
    namespace = dict(vars(train))
    configure(namespace, [str(ROOT / f"config/{recipe}.py")])
    return {name: namespace[name] for name in option_types(namespace)}


def flops_per_token(init_from):
    """Of a training step: by model.py, or where the ranks depend on GPT-2's weights, two per parameter of a matrix and per
    product of attention, three times for forward and backward."""
    name = next((name for name in SHAPES if name in init_from), None)
    with torch.device("meta"):
        shapes = mlp_shapes(*SHAPES[name][:2], [SHAPES[name][2]] * 12) if name else {}
        model = KronyGPT(KronyGPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, shapes=shapes))
    if name:
        return model.flops_per_token()
    assert init_from == "checkpoints/best_82M.pt"
    vectors = model.count_parameters()["vectors"]
    return 3 * 2 * (82e6 - 1024 * 768 - vectors + 12 * 2 * 1024 * 768)


@pytest.mark.parametrize("recipe", [*RECIPES, *OTHERS])
def test_each_recipe_starts_on_the_cpu(recipe, workdir):
    write_dataset("tiny", 5000)
    torch.manual_seed(0)
    checkpoint.save("start.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=16)))
    said = run_here("train.py", ROOT / f"config/{recipe}.py", "--init_from=start.pt", "--dataset=tiny", "--out_dir=out",
                    "--batch_size=1", "--block_size=16", "--gradient_accumulation_steps=1", "--max_iters=2",
                    "--eval_iters=1", "--wandb_mode=off", "--device=cpu", *["--compile=False"] * torch.cuda.is_available())
    assert said.returncode == 0, said.stderr
    assert "done: best validation loss" in said.stdout
    assert json.loads(Path("out/log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_says_that_it_costs_is_its_arithmetic(recipe, capsys):
    options, text = options_of(recipe), (ROOT / f"config/{recipe}.py").read_text()
    tokens = options["batch_size"] * options["block_size"] * options["gradient_accumulation_steps"] * options["max_iters"]
    flops = flops_per_token(options["init_from"])
    said = re.search(r"# Cost: ([\d.]+)([MB]) tokens at ([\d.e]+) FLOP each, as train.py counts them, are ([\d.e]+) FLOP: "
                     r"([\d.]+) GPU hours at 1e14 FLOP/s", text)
    assert float(said[1]) * {"M": 1e6, "B": 1e9}[said[2]] == pytest.approx(tokens, rel=0.01)
    assert float(said[3]) == pytest.approx(flops, rel=0.01)
    assert float(said[4]) == pytest.approx(tokens * flops, rel=0.02)
    assert float(said[5]) == pytest.approx(tokens * flops / 1e14 / 3600, rel=0.15 if len(said[5]) == 3 else 0.03)
    assert "arithmetic, not a measurement" in text and "Why these numbers: " in text
    assert options["wandb_mode"] == "offline"  # which needs no login
    assert options["wandb_run_name"] is None  # so that it is the name of out_dir
    assert options["compile"] == torch.cuda.is_available()


def test_the_baseline_and_the_budget_differ_in_their_start_alone(capsys):
    krony_pt, budget, dense = map(options_of, ("train_gpt2", "train_gpt2_budget", "train_gpt2_dense"))
    assert (dense["init_from"], dense["max_iters"], dense["learning_rate"]) == ("gpt2", 30000, 6e-5)
    for options in krony_pt, budget, dense:
        for name in "init_from", "out_dir":
            del options[name]
    assert krony_pt == budget == dense
