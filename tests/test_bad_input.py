"""Mistakes that people make on every command line: one line that names the mistake, an exit status, and nothing changed.

test_fuzz.py adds inputs that nobody has.
"""
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_here, snapshot, succeed, write_dataset

from kronygpt import checkpoint
from model import KronyGPT, KronyGPTConfig, mlp_shapes

TRAIN = "train.py --dataset=tiny --block_size=16 --batch_size=2 --gradient_accumulation_steps=1 --max_iters=1 --eval_iters=1"
DECOMPOSE = "kron_decompose.py 16 64 1 --out=made.pt --init_from="
CALIBRATE = "kron_decompose.py --init_from=good.pt --calibrate="
PRUNE = "prune.py --init_from=good.pt"
GOOD = [f"{DECOMPOSE}good.pt", f"{PRUNE} --out=made.pt", f"{TRAIN} --init_from=good.pt", "kron_to_gpt.py good.pt made",
        "perplexity.py good.pt tiny", "sample.py good.pt --max_new_tokens=1"]
BAD = {  # {command: what its line says}
    # models
    "sample.py missing.pt": "missing.pt",
    "kron_to_gpt.py no-such-gpt2 made": "no-such-gpt2",
    f"{DECOMPOSE}empty.pt": "empty.pt",
    "prune.py --init_from=truncated.pt --out=made.pt": "truncated.pt",
    "sample.py other.pt": "other.pt",
    "sample.py evil.pt": "evil.pt",
    f"{TRAIN} --init_from=evil_zip.pt": "evil_zip.pt",
    "kron_to_gpt.py shapes.pt made": "mlp.c_fc",
    f"{DECOMPOSE}nan.pt": "nan.pt",
    "perplexity.py bert tiny": "bert",
    "kron_to_gpt.py cut_hf made": "cut_hf",
    # compression and outputs
    "kron_decompose.py 16 64 --init_from=good.pt": "all three of dim_1 dim_2 n_factors",
    "kron_decompose.py 5 64 1 --init_from=good.pt": "mlp.c_fc [16, 64] cannot have the shape (5, 64, 1)",
    "kron_decompose.py 16 16 5 --init_from=good.pt": "5 factors of (16, 16), where a sum of 4 reaches every matrix",
    "kron_decompose.py 16 16 1,2,3 --init_from=good.pt": "mlp.c_fc has 3 shapes for 2 blocks",
    "kron_decompose.py 16 16 many --init_from=good.pt": "invalid literal",
    "kron_decompose.py --matrices=attn": "matrices is all or mlp",
    "kron_decompose.py --budget=many --init_from=good.pt": "82M",
    "kron_decompose.py --budget=-82M --init_from=good.pt": "not -82M",
    "kron_decompose.py --budget=1K --init_from=good.pt": "no shape of the MLPs makes a model of 1,000 parameters: with",
    f"{CALIBRATE}tiny --budget=1K": "1,000 parameters is not between",
    f"{CALIBRATE}tiny --budget=10K --keep=heads,wings": "--keep is a comma list of embedding, heads, hidden, not wings",
    f"{CALIBRATE}tiny --budget=10K --calibration_tokens=5": "too few",
    f"{CALIBRATE}nothing --budget=10K": "data/nothing",
    "kron_decompose.py 16 64 1 --init_from=good.pt --out=folder": "folder names a directory",
    "kron_decompose.py 16 32 2 --init_from=good.pt --budget=20K": "a --budget without them",
    f"{PRUNE} --keep=3": "--keep=3 must divide the 16 units of --dim=embd",
    f"{PRUNE} --keep=0": "--keep is at least 2",
    f"{PRUNE} --offset=2": "--offset from 0 to keep - 1",
    f"{PRUNE} --dim=heads": "--dim is embd or hidden",
    f"{PRUNE} --dim=hidden --select=contribution --offset=1": "goes with --dim=hidden, without --offset",
    f"{PRUNE} --dim=hidden --select=contribution": "go with --calibrate",
    f"{PRUNE} --calibrate=tiny": "go with --calibrate",
    f"{PRUNE} --refit=True --calibrate=nothing": "data/nothing",
    f"{PRUNE} --out=new/": "new/ names a directory",
    "kron_to_gpt.py good.pt good.pt": "good.pt",
    # scores
    "perplexity.py good.pt tiny --stride=17": "--stride is from 1 to the model's context of 16, not 17",
    "perplexity.py good.pt nothing.txt": "cannot read nothing.txt: FileNotFoundError",
    "perplexity.py good.pt empty.txt 2": "for a data set under data/ only, not for empty.txt",
    "perplexity.py good.pt empty.txt --json_out=made.json": "empty.txt has 0 tokens",
    # data and training
    f"{TRAIN} --dataset=odd": "not a multiple of the data-type size",
    f"{TRAIN} --init_from=good.pt --block_size=17": "block_size=17",
    f"{TRAIN} --n_layer=1 --n_head=1 --n_embd=16 --block_size=5000": "train.bin has 5000 tokens, and a block takes 5001",
    f"{TRAIN} --init_from=resume": "nothing to resume: no out/ckpt.pt",
    f"{TRAIN} --dtype=float8": "--dtype is float32, bfloat16 or float16",
    f"{TRAIN} --decay=exponential": "--decay is cosine or linear",
    f"{TRAIN} --distill=50": "--distill is a share",
    f"{TRAIN} --features=4": "--features compares with a --teacher",
    f"{TRAIN} --eval_iters=0": "--eval_iters is at least 1",
    f"{TRAIN} --n_layer=1 --n_head=1 --n_embd=16 --dim_1=16 --dim_2=64 --factors_only": "empty parameter list",
    "experiments/compare.py --seeds=x": "'x'",
}


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
    root, before = tmp_path_factory.mktemp("world"), os.getcwd()
    os.chdir(root)
    torch.manual_seed(0)
    sizes = dict(block_size=16, n_head=1, n_embd=16)
    model = KronyGPT(KronyGPTConfig(vocab_size=256, n_layer=2, **sizes, shapes=mlp_shapes(8, 16, [2, 2])))
    checkpoint.save("good.pt", model)
    content = Path("good.pt").read_bytes()
    Path("truncated.pt").write_bytes(content[:len(content) // 2])
    torch.save({"conv1.weight": torch.zeros(3)}, "other.pt")
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, "evil_zip.pt")
    weights = checkpoint.to_file_names(model.state_dict())
    for name, bad in dict(shapes=torch.zeros(2, 3, 3), nan=torch.full((2, 2, 4), float("nan"))).items():
        torch.save({"model": weights | {"transformer.h.1.mlp.c_fc_1": bad}}, f"{name}.pt")
    for name in "bert", "cut_hf":
        shutil.copytree(gpt2_dir, name)
    Path("bert/config.json").write_text(json.dumps(dict(model_type="bert")), encoding="utf-8")
    os.truncate("cut_hf/model.safetensors", 1000)
    for name in "tiny", "odd":
        write_dataset(name, 5000)
    os.truncate("data/odd/train.bin", 9999)
    for name in "empty.pt", "empty.txt":
        Path(name).touch()
    Path("folder").mkdir()
    write_byte_level_tokenizer("byte_level")
    os.chdir(before)
    return root


def is_one_line_with(words, said):
    """Whether a script has failed with one line that has these words; warnings and a progress bar may stand before it."""
    _, marker, line = said.stderr.rpartition("error: ")
    return (said.returncode in (1, 2) and "Traceback" not in said.stderr and marker and line.count("\n") == 1
            and words in line)


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_one_line_and_changes_nothing(command, world, monkeypatch):
    monkeypatch.chdir(world)
    before = snapshot(world)
    said = run_here(*command.split())
    assert is_one_line_with(BAD[command], said), said.stderr
    assert snapshot(world) == before


def test_good_input_passes_where_bad_input_does_not(world, workdir):
    shutil.copytree(world, workdir, dirs_exist_ok=True)
    for command in GOOD:
        succeed(*command.split())
