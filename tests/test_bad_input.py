"""Every command against every kind of bad input: one line that names it, an exit status, and nothing changed.

The rows run in this process; under the marker `slow` they run again as processes of their own.
"""
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_here

from kronygpt import checkpoint

SCRIPTS = ("kron_decompose.py", "prune.py", "train.py", "kron_to_gpt.py", "perplexity.py", "sample.py", "play.py",
           "prepare_owt.py", "experiments/prepare_pydocs.py", "experiments/compare.py", "experiments/bench.py")
MODEL_COMMANDS = {  # {name: command with a model}
    "kron_decompose": "kron_decompose.py 16 64 1 --init_from={} --out=made.pt",
    "prune": "prune.py --init_from={} --out=made.pt",
    "train": "train.py --dataset=tiny --block_size=16 --batch_size=2 --gradient_accumulation_steps=1 --max_iters=1 "
             "--eval_iters=1 --init_from={}",
    "kron_to_gpt": "kron_to_gpt.py {} made",
    "perplexity": "perplexity.py {} tiny",
    "sample": "sample.py {} --max_new_tokens=1",
}
BAD_MODELS = {  # {what: words of the line}
    "missing.pt": "no checkpoint missing.pt",
    "nobody/nothing": "no file or directory nobody/nothing, nor models/nobody/nothing",
    "no-such-gpt2": "no file or directory no-such-gpt2",
    "empty.pt": "empty.pt",
    "truncated.pt": "truncated.pt",
    "text.pt": "text.pt is no checkpoint",
    "list.pt": "list.pt is no checkpoint: it holds a list",
    "other.pt": "other.pt holds no GPT-2 that we know",
    "evil.pt": "evil.pt is no checkpoint",
    "evil_zip.pt": "evil_zip.pt is no checkpoint",
    "shapes.pt": "shapes.pt does not fit together: weight transformer.h.1.mlp.c_proj.B",
    "lacking.pt": "lacking.pt does not fit together: weight transformer.h.0.ln_1.weight is missing",
    "huge.pt": "huge.pt claims more numbers than it holds: transformer.h.0.mlp.c_fc_0",
    "nan.pt": "nan.pt has weights that are not finite: transformer.h.1.mlp.c_fc.B",
    "folder": "directory folder holds no model",
    "bert": "bert is a bert model, not a GPT-2",
    "half_hf": "half_hf does not fit together: its config says n_layer=2, its weights 1",
    "cut_hf": "cut_hf/model.safetensors cannot be read",
    "text_hf": "cannot read text_hf/config.json",
    "nan_hf": "nan_hf has weights that are not finite: transformer.wpe.weight",
}
TRAIN = MODEL_COMMANDS["train"].format("good.pt")
NINES = 25 * "9"
SCRATCH = "train.py --dataset=tiny --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --max_iters=1"
ROWS = {f"{name} {bad}": (command.format(bad), words)
        for name, command in MODEL_COMMANDS.items() for bad, words in BAD_MODELS.items()}
ROWS |= {command: (command, words) for command, words in {
    # arguments and options
    **{f"{script} --no_such_option=1": "unknown option --no_such_option" for script in SCRIPTS},
    **{f"{script} config/none.py": "no config file config/none.py" for script in ("train.py", "experiments/compare.py", "prune.py")},
    "train.py syntax.py": "syntax.py, line 2: ",
    "train.py raises.py": "raises.py, line 1: ZeroDivisionError",
    "train.py unknown.py": "did you mean --batch_size?",
    "train.py wrong_type.py": "--max_iters takes a whole number, not 'ten' (in wrong_type.py)",
    "train.py latin.py": "latin.py, line 1: ",
    "train.py good_a.py good_b.py --dataset=none": "no data set in data/none",
    "kron_to_gpt.py": "missing argument; usage: kron_to_gpt.py ckpt",
    "perplexity.py": "missing argument",
    "sample.py good.pt extra": "unexpected argument 'extra'",
    "kron_decompose.py 16": "give all three of dim_1 dim_2 n_factors",
    "kron_decompose.py 16 64 one --init_from=good.pt": "whole numbers",
    "kron_decompose.py 5 64 1 --init_from=good.pt": "dim_1=5 does not divide the 16 rows of mlp.c_fc",
    "kron_decompose.py 16 5 1 --init_from=good.pt": "dim_2=5 does not divide",
    "kron_decompose.py -16 64 1 --init_from=good.pt": "dim_1, dim_2 and factors must be at least 1, not -16",
    "kron_decompose.py 0 64 1 --init_from=good.pt": "dim_1, dim_2 and factors must be at least 1, not 0",
    "kron_decompose.py 16 64 0 --init_from=good.pt": "dim_1, dim_2 and factors must be at least 1, not 16, 64, 0",
    "kron_decompose.py 4 8 33 --init_from=good.pt": "a sum of 32 reaches every matrix",
    "kron_decompose.py 16 64 1,1,1 --init_from=good.pt": "mlp.c_fc has 3 shapes for 2 blocks",
    "kron_decompose.py 16 64 1 --init_from=good.pt --out=folder": "folder is a directory",
    "kron_decompose.py 16 64 1 --init_from=good.pt --out=good.pt/made.pt": "good.pt",
    "kron_decompose.py --budget=many": "--budget takes a number of parameters",
    "kron_decompose.py --budget=1K": "no shapes fit 1,000 parameters",
    "prune.py --init_from=good.pt --keep=1": "--keep is at least 2",
    "prune.py --init_from=good.pt --keep=3": "--keep=3 does not divide",
    "prune.py --init_from=good.pt --dim=width": "--dim is embd, hidden or layer",
    "prune.py --init_from=good.pt --out=folder": "folder is a directory",
    "kron_to_gpt.py good.pt good.pt": "good.pt",
    "perplexity.py good.pt tiny many": "n_batches is a whole number",
    "perplexity.py good.pt tiny --batch_size=0": "--batch_size is at least 1",
    "perplexity.py good.pt tiny --stride=0": "--stride is from 1",
    "perplexity.py good.pt tiny --stride=17": "--stride is from 1",
    "perplexity.py good.pt tiny --dtype=float8": "--dtype is float32, bfloat16 or float16",
    "perplexity.py good.pt tiny --device=abacus": "no device 'abacus'",
    "perplexity.py good.pt tiny --json_out=none/a.json": "no folder for --json_out",
    "sample.py good.pt --num_samples=0": "--num_samples",
    "sample.py good.pt --max_new_tokens=0": "--max_new_tokens",
    "sample.py good.pt --temperature=-1": "--temperature",
    "sample.py good.pt --seed=-1": "--seed is from 0",
    "sample.py good.pt --start=FILE:none.txt": "none.txt",
    "sample.py good.pt --start=FILE:latin.txt": "latin.txt is not UTF-8",
    "sample.py good.pt --start=FILE:folder": "folder",
    **{f"{TRAIN} --{option}": f"--{option.split('=')[0]}" for option in (
        "batch_size=0", "batch_size=-1", "max_iters=0", "eval_interval=0", "eval_iters=0", "log_interval=0", "keep=-1",
        "gradient_accumulation_steps=0", "learning_rate=-1", "beta1=1", "beta2=-0.1", "weight_decay=-1", "grad_clip=-1",
        "seed=-1", "checkpoint_minutes=-1", "max_iters=1.5", "compile=perhaps", "block_size=0", "wandb_mode=maybe")},
    f"{TRAIN} --block_size=17": "--block_size=17 is more than the model's context of 16",
    f"{TRAIN} --dropout=2": "dropout must be in [0, 1), not 2",
    f"{TRAIN} --out_dir=text.pt": "--out_dir=text.pt is a file",
    f"{TRAIN} --init_from=resume": "nothing to resume: no out/ckpt.pt",
    f"{TRAIN} --init_from=resume --out_dir=full": "full/ckpt.pt",
    f"{SCRATCH} --dropout=-0.1": "dropout must be in [0, 1), not -0.1",
    f"{SCRATCH} --n_layer=0": "--n_layer is at least 1",
    f"{SCRATCH} --n_head=3": "n_head=3 does not divide n_embd=16",
    f"{SCRATCH} --factors=0": "dim_1, dim_2 and factors must be at least 1",
    f"{SCRATCH} --dim_1=-4": "--dim_1 is at least 1, not -4",
    # data
    **{f"{script} {where}": words for name, words in {
        "none": "no data set in data/none",
        "odd": "train.bin has 9999 bytes, an odd number",
        "big": "token 300 in ",
        "nojson": "data/nojson/meta.json is damaged",
        "listed": "data/listed/meta.json is damaged",
        "liar": "train.bin has 5,000 tokens, and meta.json counts 4,999",
        "words": "gpt2 tokens with a vocabulary of 50257, and the model has a vocabulary of 256",
        "short": "train.bin has 10 tokens, and a block takes 17",
        "dirbin": "train.bin",
    }.items() for script, where in (("train.py", f"{TRAIN.partition(' ')[2]} --dataset={name}"),)},
    "perplexity.py good.pt none": "no data set in data/none",
    "perplexity.py good.pt big": "token 300 in ",
    "perplexity.py good.pt words": "gpt2 tokens",
    "perplexity.py good.pt latin.txt": "latin.txt is not UTF-8 text",
    "perplexity.py good.pt latin.jsonl": "latin.jsonl, line 1 is not UTF-8 JSON",
    "perplexity.py good.pt bad.jsonl": "bad.jsonl, line 2 is not UTF-8 JSON with a string `text`",
    "perplexity.py good.pt empty.txt": "empty.txt has 0 tokens",
    "perplexity.py good.pt none.txt": "no file none.txt",
    "perplexity.py good.pt folder.txt": "folder.txt",
    "perplexity.py good.pt wiki103": "--wikitext=DIRECTORY",
    "perplexity.py good.pt lambada": "--lambada=FILE.jsonl",
    "perplexity.py good.pt wiki103 --wikitext=folder": "folder",
    "perplexity.py odd_vocab.pt empty.txt": "no tokenizer has the model's vocabulary of 300",
    "sample.py odd_vocab.pt": "no tokenizer has the model's vocabulary of 300",
    "prepare_owt.py --data_files=none*.txt": "no files match --data_files=none*.txt",
    "prepare_owt.py --data_files=*": "give files of one kind",
    "prepare_owt.py --val_fraction=2 --data_files=latin.txt": "--val_fraction",
    "prepare_owt.py --threads=0 --data_files=latin.txt": "--threads",
    "prepare_pydocs.py --val_fraction=0": "--val_fraction",
    "prepare_pydocs.py --val_fraction=2": "--val_fraction",
    "compare.py --starts=nonsense": "--starts: a start is",
    "compare.py --seeds=x": "--seeds is a comma list of whole numbers",
    "compare.py --learning_rates=1e-4,0": "--learning_rates is a comma list of numbers above 0",
    "compare.py --starts=": "--starts is empty",
    "bench.py everything": "bench.py takes models, layer, tokenize",
    "bench.py --shapes=1": "expected shapes such as 768,768,1",
    # numbers beyond sense or memory
    **{f"{command} --seed={seed}": "--seed" for seed in ("-1", NINES) for command in (
        "sample.py good.pt", "prepare_owt.py --data_files=latin.txt", "experiments/prepare_pydocs.py", TRAIN)},
    **{f"{command} --device={name}": f"no device '{name}'" for name in ("meta", "cuda:99", "hpu") for command in (
        "sample.py good.pt", "perplexity.py good.pt tiny", "experiments/bench.py", "bench.py layer", TRAIN,
        "prune.py --init_from=good.pt --select=contribution --calibrate=tiny --out=made.pt")},
    "perplexity.py good.pt tiny --batch_size=10**12": "--batch_size takes a whole number",
    "perplexity.py good.pt tiny --batch_size=1000000000000": "--batch_size is at least 1 and at most",
    "perplexity.py good.pt tiny --stride=1000000000000": "--stride is from 1",
    f"perplexity.py good.pt tiny {NINES}": "n_batches is a whole number",
    "perplexity.py good.pt tiny ²": "n_batches is a whole number",
    "sample.py good.pt --max_new_tokens=1000000000000": "--max_new_tokens is at least 1 and at most",
    "sample.py good.pt --num_samples=1000000000": "1,000,000,000 samples of 201 tokens takes",
    f"sample.py good.pt --top_k={NINES}": "--top_k",
    "sample.py good.pt --temperature=1e999": "--temperature is",
    "sample.py good.pt --temperature=1e39": "--temperature is at most",
    "sample.py good.pt --temperature=nan": "--temperature takes a number",
    "sample.py good.pt --temperature=1e-50": "--temperature is 0 or at least 1e-06",
    "prune.py --init_from=good.pt --keep=1000000000000": "--keep is at least 1 and at most",
    "prune.py --init_from=good.pt --offset=-1": "--offset from 0 to keep - 1",
    "prune.py --init_from=good.pt --epsilon=1e999": "--epsilon is at least -1 and at most 1, not inf",
    "prune.py --init_from=good.pt --epsilon=1e39": "--epsilon is at least -1 and at most 1",
    "prune.py --init_from=good.pt --refit=True --calibrate=tiny --calibration_tokens=0": "--calibration_tokens",
    "prepare_pydocs.py --val_fraction=0.9999999": "--val_fraction=0.9999999 leaves none of",
    "prepare_owt.py --data_files=three.jsonl --val_fraction=0.9999999 --tokenizer=byte_level":
        "--val_fraction=0.9999999 leaves none of 3 documents",
    "prepare_owt.py --data_files=latin.txt --sample_by=foo": "--sample_by is line, paragraph or document, not foo",
    "prepare_owt.py --data_files=latin.txt --threads=1000000000000": "--threads",
    "compare.py --seeds=-1": "--seeds is a comma list of whole numbers",
    f"compare.py --seeds=1,{NINES}": "--seeds is a comma list of whole numbers",
    **{f"compare.py --learning_rates=1e-4,{rate}": "--learning_rates is a comma list of numbers above 0"
       for rate in ("inf", "nan", "1" + 400 * "0")},
    "compare.py --steps=1000000000000": "--steps",
    "compare.py --train_config=none.py": "no config file --train_config=none.py",
    "compare.py --train_config=good_a.py --dataset=none": "no data set in data/none",
    "compare.py --train_config=good_a.py --dataset=tiny --out_dir=text.pt": "text.pt",
    **{f"bench.py --shapes={shapes}": "expected shapes such as 768,768,1" for shapes in (
        "768,768,0", "768,768,1000000000000", f"768,768,{NINES}", "768,768,²", "-1,1,1")},
    **{f"bench.py --{option}": f"--{option.split('=')[0]}" for option in (
        "repeats=0", "repeats=-1", "repeats=1000000000000", f"batch_size={NINES}", "n_layer=0", "memory_batch_size=0")},
    "bench.py --n_layer=10000000": "a training step of these sizes takes",
    "bench.py --n_embd=999999960 --shapes=1,1,1": "a training step of these sizes takes",
    "bench.py --batch_size=1000000000": "a training step of these sizes takes",
    "bench.py --out_dir=text.pt": "text.pt",
    "bench.py layer --layer_tokens=999999999": "a layer of 999,999,999 tokens takes",
    # files
    **{f"perplexity.py good.pt {name}": words for name, words in {
        "empty.jsonl": "empty.jsonl has 0 tokens",
        "nested.json": "nested.json, line 1 is not UTF-8 JSON",
        "nested.jsonl": "nested.jsonl, line 1 is not UTF-8 JSON",
        "digits.jsonl": "digits.jsonl, line 1 is not UTF-8 JSON",
        "broken.parquet": "broken.parquet cannot be read as parquet",
        "half.parquet": "half.parquet cannot be read as parquet",
    }.items()},
    **{f"prepare_owt.py --tokenizer=byte_level --data_files={name}": words for name, words in {
        "empty.jsonl": "too few documents to hold one out: 0",
        "nested.json": "nested.json, line 1 is not UTF-8 JSON",
        "broken.parquet": "broken.parquet cannot be read as parquet",
        "half.parquet": "half.parquet cannot be read as parquet",
    }.items()},
    "perplexity.py good.pt tiny --json_out=folder": "folder is a directory",
    "perplexity.py far.pt three.jsonl --json_out=made.json": "the loss on three.jsonl in float32 is",
    "sample.py nonfinite.pt": "the model's logits are not finite",
    "sample.py nonfinite.pt --temperature=0": "the model's logits are not finite",
    "perplexity.py nonfinite.pt tiny --json_out=made.json": "the loss on tiny in float32 is nan",
    "perplexity.py good.pt nothing.pt": "no data set in data/nothing.pt",
    "bench.py score none.txt good.pt good.pt": "none.txt",
    # training and compression
    **{f"{TRAIN} --{option}": f"--{option.split('=')[0]}" for option in (
        "min_lr=-5", "lr_decay_iters=-5", f"batch_size={NINES}", "teacher=", "dataset=", "out_dir=", "learning_rate=nan",
        "learning_rate=1e999", "learning_rate=1" + 400 * "0", "max_iters=" + 5000 * "[", "grad_clip=inf")},
    f"{TRAIN} --batch_size=1000000000000": "GiB",
    f"{TRAIN} --eval_iters=1000000000000": "GiB",
    f"{SCRATCH} --n_embd=1000000000": "GiB",
    f"{SCRATCH} --n_layer=10000000000": "GiB",
    f"{SCRATCH} --block_size=1000000000000": "GiB",
    "kron_decompose.py 16 64 1 --init_from=good.pt --out=": "--out is empty",
    "kron_decompose.py 16 64 1 --init_from=good.pt --calibrate=": "--calibrate is empty",
    f"kron_decompose.py 16 64 {NINES} --init_from=good.pt": "factors",
    "prune.py --init_from=good.pt --refit=True --calibrate=tiny --calibration_tokens=1000000000000":
        "--calibration_tokens is at least 1 and at most",
    "prepare_pydocs.py --out=": "--out is empty",
    "prepare_owt.py --data_files=": "--data_files is empty",
}.items()}


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def write_byte_level_tokenizer(directory):
    """One of Hugging Face's that needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(vocabulary)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>"])
    Path(directory).mkdir()
    made.save(f"{directory}/tokenizer.json")


@pytest.fixture(scope="session")
def world(tmp_path_factory, gpt2_dir):
    """A directory with a good model and data set, and bad ones of every kind."""
    from safetensors.torch import load_file, save_file

    from model import KronyGPT, KronyGPTConfig, mlp_shapes

    root = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(root)
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=1, n_embd=16,
                                    shapes=mlp_shapes(8, 16, [2, 2])))
    checkpoint.save("good.pt", model)
    content = Path("good.pt").read_bytes()
    Path("truncated.pt").write_bytes(content[:len(content) // 2])
    Path("empty.pt").touch()
    Path("text.pt").write_text("no tensors here")
    torch.save([1, 2], "list.pt")
    torch.save({"conv1.weight": torch.zeros(3)}, "other.pt")
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, "evil_zip.pt")
    weights = checkpoint.to_file_names(model.state_dict())
    nan = weights["transformer.h.1.mlp.c_fc_1"].clone()
    nan[0, 0, 0] = float("nan")
    for name, changes in {"shapes": {"transformer.h.1.mlp.c_proj_1": torch.zeros(2, 3, 3)},
                          "huge": {"transformer.h.0.mlp.c_fc_0": torch.zeros(1).expand(10**9, 8, 16)},
                          "nan": {"transformer.h.1.mlp.c_fc_1": nan}, "lacking": {}}.items():
        bad = {key: p for key, p in weights.items() if name != "lacking" or key != "transformer.h.0.ln_1.weight"}
        torch.save({"model": bad | changes}, f"{name}.pt")
    checkpoint.save("odd_vocab.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=16)))
    dense = KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=16))
    for name, size in dict(far=1e4, nonfinite=1e30).items():  # the loss of random weights of this size
        with torch.no_grad():
            dense.transformer.wte.weight.normal_().mul_(size)
        checkpoint.save(f"{name}.pt", dense)
    Path("folder").mkdir()
    Path("folder.txt").mkdir()
    Path("full").mkdir()
    Path("full/ckpt.pt").write_bytes(content[:1000])
    for name in ("bert", "half_hf", "cut_hf", "text_hf", "nan_hf"):
        shutil.copytree(gpt2_dir, name)
    Path("bert/config.json").write_text(json.dumps(dict(model_type="bert")))
    Path("text_hf/config.json").write_text("{")
    stored = load_file("half_hf/model.safetensors")
    save_file({key: p for key, p in stored.items() if ".h.1." not in key}, "half_hf/model.safetensors", {"format": "pt"})
    stored["transformer.wpe.weight"][3, 3] = float("inf")
    save_file(stored, "nan_hf/model.safetensors", {"format": "pt"})
    os.truncate("cut_hf/model.safetensors", 1000)
    for name, (n_train, vocab_size, tokenizer) in {
            "tiny": (5000, 256, "bytes"), "odd": (5000, 256, "bytes"), "big": (5000, 256, "bytes"),
            "nojson": (5000, 256, "bytes"), "listed": (5000, 256, "bytes"), "liar": (5000, 256, "bytes"),
            "words": (5000, 50257, "gpt2"), "short": (10, 256, "bytes"), "dirbin": (5000, 256, "bytes")}.items():
        folder = Path("data", name)
        folder.mkdir(parents=True)
        tokens = np.full(n_train, 300 if name == "big" else 65, dtype=np.uint16)
        tokens.tofile(folder / "train.bin")
        tokens[:500].tofile(folder / "val.bin")
        (folder / "meta.json").write_text(json.dumps(dict(vocab_size=vocab_size, tokenizer=tokenizer)))
    os.truncate("data/odd/train.bin", 9999)
    Path("data/nojson/meta.json").write_text("{")
    Path("data/listed/meta.json").write_text("[1]")
    Path("data/liar/meta.json").write_text(json.dumps(dict(vocab_size=256, tokenizer="bytes", tokens=dict(train=4999))))
    Path("data/dirbin/train.bin").unlink()
    Path("data/dirbin/train.bin").mkdir()
    Path("latin.txt").write_bytes("déjà vu\n\ndéjà".encode("latin-1"))
    Path("latin.jsonl").write_bytes('{"text": "déjà"}'.encode("latin-1"))
    Path("latin.py").write_bytes('out_dir = "déjà"'.encode("latin-1"))
    Path("bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    Path("empty.txt").touch()
    Path("empty.jsonl").touch()
    Path("three.jsonl").write_text('{"text": "good"}\n' * 3)
    Path("nested.json").write_text("[" * 100_000)
    Path("nested.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    Path("digits.jsonl").write_text('{"text": ' + "9" * 10_000 + "}\n")
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(1000)]}), "good.parquet")
    content = Path("good.parquet").read_bytes()
    Path("good.parquet").unlink()
    Path("half.parquet").write_bytes(content[:len(content) // 2])
    Path("broken.parquet").write_bytes(content[:100] + bytes(100) + content[200:])
    write_byte_level_tokenizer("byte_level")
    Path("syntax.py").write_text("seed = 1\nseed = = 2\n")
    Path("raises.py").write_text("seed = 1 // 0\n")
    Path("unknown.py").write_text("bach_size = 1\n")
    Path("wrong_type.py").write_text('max_iters = "ten"\n')
    Path("good_a.py").write_text("seed = 1\n")
    Path("good_b.py").write_text("seed = 2\n")
    os.chdir(before)
    return root


def snapshot(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
            for path in root.rglob("*")}


def is_one_line_with(words, said):
    """Whether a script has failed with one line that has these words; a progress bar may stand before it."""
    _, marker, line = said.stderr.rpartition("error: ")
    return (said.returncode in (1, 2) and "Traceback" not in said.stderr and marker and line.count("\n") == 1
            and words in line)


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_gets_one_line_and_changes_nothing(row, world, monkeypatch):
    monkeypatch.chdir(world)
    command, words = ROWS[row]
    before = snapshot(world)
    said = run_here(*command.split())
    assert is_one_line_with(words, said), said.stderr
    assert snapshot(world) == before


@pytest.mark.slow
def test_bad_input_to_processes(world, run_script):
    before = snapshot(world)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda row: run_script(*row[0].split(), cwd=world), ROWS.values()))
    wrong = {command: said.stderr for (command, words), said in zip(ROWS.values(), results)
             if not is_one_line_with(words, said)}
    assert not wrong
    assert snapshot(world) == before
    print(f"{len(ROWS)} bad inputs, each to a process")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_into_a_closed_pipe_ends_without_a_traceback(script):
    """What `| head -1` does once it has its line."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        said = subprocess.run([sys.executable, str(ROOT / script), "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert said.stderr == "" and said.returncode in (0, 1)


def test_good_input_passes_where_bad_input_does_not(world, workdir):
    shutil.copytree(world, workdir, dirs_exist_ok=True)
    for command in MODEL_COMMANDS.values():
        said = run_here(*command.format("good.pt").split())
        assert said.returncode == 0, said.stderr


def test_of_two_config_files_the_later_one_wins(world, workdir):
    shutil.copytree(world, workdir, dirs_exist_ok=True)
    script, *args = TRAIN.split()
    for files, seed in ((("good_a.py", "good_b.py"), 2), (("good_b.py", "good_a.py"), 1)):
        assert run_here(script, *files, *args, "--overwrite").returncode == 0
        assert torch.load("out/ckpt.pt", weights_only=True)["config"]["seed"] == seed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_files_without_permission_get_one_line(world, workdir):
    shutil.copytree(world, workdir, dirs_exist_ok=True)
    Path("good.pt").chmod(0)
    said = run_here("sample.py", "good.pt")
    assert said.returncode == 1 and "Permission denied: 'good.pt'" in said.stderr and said.stderr.count("\n") == 1
    Path("good.pt").chmod(0o644)
    Path("folder").chmod(0o500)
    said = run_here("kron_decompose.py", 8, 16, 1, "--init_from=good.pt", "--out=folder/made.pt")
    assert said.returncode == 1 and "Permission denied: 'folder/made.pt" in said.stderr
