"""gpt2.py: one table of GPT-2 compressed in several ways, on a small model and local texts."""
import json
import re
from contextlib import chdir
from pathlib import Path

import numpy as np
import torch
from conftest import succeed

from experiments import compare, gpt2
from kronygpt import checkpoint
from model import KronyGPT, KronyGPTConfig


def test_every_method_is_scored_once(workdir, monkeypatch):
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=1, n_embd=16))
    checkpoint.save("dense.pt", model)
    data = Path("data/walk")
    data.mkdir(parents=True)
    for split in "train", "val":
        np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint16).tofile(data / f"{split}.bin")
    data.joinpath("meta.json").write_text(json.dumps(dict(vocab_size=256, tokenizer="bytes", tokens={}, documents={})))
    Path("a.txt").write_text("Some text. " * 50, encoding="utf-8")
    Path("tiny.py").write_text("batch_size = 2\ngradient_accumulation_steps = 1\nwarmup_iters = 1\neval_interval = 2\n"
                               "eval_iters = 1\ndevice = 'cpu'\n", encoding="utf-8")
    for name, value in dict(base="dense.pt", dataset="walk", budgets="80%,50%", sets="a.txt", steps=2,
                            train_config="tiny.py", out_dir="out").items():
        monkeypatch.setattr(gpt2, name, value)
    calls = []

    def call(script, *args, cwd="."):
        calls.append(script)
        with chdir(cwd):
            succeed(script, *args)

    for module in gpt2, compare:
        monkeypatch.setattr(module, "call", call)
    gpt2.main()
    table = Path("out/table.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\S.*?) \| [\d.]+M \| (.*) \|$", table, re.M))
    assert [*rows] == ["dense", "Van Loan (16, 16, 1)", "Krony-PT's pruning", "activation-aware SVD, 50%", "ours, 80%",
                       "ours, 50%"]
    loss = checkpoint.load("out/checkpoints/best_50%.pt")[0].eval()
    tokens = torch.tensor(list(Path("a.txt").read_bytes()))
    sums = []
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, 16):  # windows score all but their first token
            window = tokens[begin:begin + 16]
            if len(window) > 1:
                sums.append(torch.nn.functional.cross_entropy(loss(window[None, :-1])[0], window[1:], reduction="none"))
    assert float(rows["ours, 50%"].split(" | ")[0]) == round(torch.cat(sums).mean().exp().item(), 2)
    assert len(calls) == 4 + 6 * 3  # one compression to both budgets
    gpt2.main()
    assert len(calls) == 4 + 6 * 3  # nothing again
