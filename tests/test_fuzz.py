"""Every script over damaged files, which end in one line."""
import random
import shutil
from pathlib import Path

import pytest
from conftest import run_here, snapshot, write_dataset
from test_bad_input import is_one_line_with, write_byte_level_tokenizer

from kronygpt import checkpoint
from model import KronyGPT, KronyGPTConfig, mlp_shapes


def damage(content, rng):
    """Bytes with a few changes of the kinds that discs, networks and people make."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content) or 1)
        length = rng.choice((1, 1, 4, 64))
        match rng.randrange(5):
            case 0 if content:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at:at + length] = rng.randbytes(length)
            case 2:
                del content[at:at + length]
            case 3:
                content[at:at] = content[at:at + length]
            case 4:
                del content[at:]
    return bytes(content)


COMMANDS = {  # {script: arguments of a run of milliseconds}
    "train.py": "--dataset=tiny --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=1 "
                "--eval_iters=1 --gradient_accumulation_steps=1",
    "sample.py": "good.pt --max_new_tokens=1",
    "perplexity.py": "good.pt tiny",
    "prune.py": "--init_from=good.pt --out=made.pt",
    "kron_decompose.py": "8 16 1 --init_from=good.pt --out=made.pt",
    "kron_to_gpt.py": "good.pt made",
    "prepare_owt.py": "--data_files=rows.jsonl --tokenizer=byte_level --out=mine",
    "play.py": "good.pt --port=0"}


@pytest.fixture
def tiny_world(workdir, monkeypatch):
    """A directory with all that the commands need, which each command gets a copy of."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workdir / "cache"))
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", lambda self: None)
    Path("world").mkdir()
    monkeypatch.chdir("world")
    write_dataset("tiny", 2000)
    write_byte_level_tokenizer("byte_level")
    shapes = mlp_shapes(8, 16, [2])
    checkpoint.save("good.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=16,
                                                       shapes=shapes)))
    Path("rows.jsonl").write_text('{"text": "a b"}\n' * 5, encoding="utf-8")
    return Path.cwd()


@pytest.mark.parametrize("cases", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", COMMANDS)
def test_damaged_files_end_in_one_line_and_change_nothing(script, cases, tiny_world, monkeypatch):
    refused = 0
    for case in range(-1, cases):
        rng, place = random.Random(f"{script} {case}"), tiny_world.parent / f"case_{case}"
        shutil.copytree(tiny_world, place)
        monkeypatch.chdir(place)
        if case >= 0:  # before them, everything works
            path = rng.choice([path for path in sorted(Path().rglob("*")) if path.is_file()])
            path.write_bytes(damage(path.read_bytes(), rng))
        before = snapshot(place)
        said = run_here(script, *COMMANDS[script].split())
        assert case >= 0 or said.returncode == 0, said.stderr
        if said.returncode:
            refused += 1
            assert is_one_line_with("", said), (case, path, said.stderr)
            assert snapshot(place) == before, (case, path)
        shutil.rmtree(place)
    print(f"{script}: {cases} damaged files, {refused} refused")
