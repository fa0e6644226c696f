"""Mistakes that people make on every command line: one line that names the mistake, an exit status, and nothing changed.

test_fuzz.py adds inputs that nobody has.
"""
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_here
from test_train import write_dataset

from kronygpt import checkpoint
from model import KronyGPT, KronyGPTConfig, mlp_shapes

TRAIN = "train.py --dataset=tiny --block_size=16 --batch_size=2 --gradient_accumulation_steps=1 --max_iters=1 --eval_iters=1"
DECOMPOSE = "kron_decompose.py 16 64 1 --out=made.pt --init_from="
GOOD = {  # {script: a command that succeeds}
    "kron_decompose": f"{DECOMPOSE}good.pt", "prune": "prune.py --init_from=good.pt --out=made.pt",
    "train": f"{TRAIN} --init_from=good.pt", "kron_to_gpt": "kron_to_gpt.py good.pt made",
    "perplexity": "perplexity.py good.pt tiny", "sample": "sample.py good.pt --max_new_tokens=1"}
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
    "kron_decompose.py 16 64 --init_from=good.pt": "dim_1",
    "kron_decompose.py 5 64 1 --init_from=good.pt": "mlp.c_fc",
    "kron_decompose.py --budget=many --init_from=good.pt": "--budget",
    "kron_decompose.py 16 64 1 --init_from=good.pt --out=folder": "folder names a directory",
    "kron_decompose.py 16 32 2 --init_from=good.pt --budget=20K": "a --budget without them",
    "prune.py --init_from=good.pt --keep=3": "--keep",
    "prune.py --init_from=good.pt --out=new/": "new/ names a directory",
    "kron_to_gpt.py good.pt good.pt": "good.pt",
    # data and training
    f"{TRAIN} --dataset=odd": "not a multiple of the data-type size",
    f"{TRAIN} --init_from=good.pt --block_size=17": "block_size=17",
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
    Path("empty.pt").touch()
    Path("folder").mkdir()
    write_byte_level_tokenizer("byte_level")
    os.chdir(before)
    return root


def snapshot(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
            for path in Path(root).rglob("*")}


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
    for command in GOOD.values():
        said = run_here(*command.split())
        assert said.returncode == 0, said.stderr
