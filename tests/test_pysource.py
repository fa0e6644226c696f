"""prepare_pysource.py on a few files."""
import json
from pathlib import Path

import numpy as np
from conftest import run_here

from experiments import prepare_pysource
from kronygpt.tokenizer import read_tokenizer


def test_copies_tests_and_tables_are_left_out(tmp_path, monkeypatch):
    def lines(words, n=40):
        return "\n".join(f"value_of_the_{word}_{i} = compute({i}, {word!r})" for i in range(n) for word in [words])

    for name, text in {"a.py": lines("first"), "b.py": lines("second"), "copy.py": lines("first", 39) + "\nx = 1",
                       "half.py": lines("first", 15) + "\n" + lines("third", 30), "table.py": "X = [" + "1, " * 400 + "]",
                       "short.py": "x = 1", "tests/c.py": lines("fourth")}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", lambda package: [])
    texts = prepare_pysource.documents()
    assert [text.split("_")[3] for text in texts] == ["first", "second", "first"] and "third" in texts[2]


def test_the_data_set_has_its_own_tokens_and_whole_files(workdir, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(Path(json.__file__).parent.parent / "asyncio"))
    monkeypatch.setattr("importlib.metadata.files", lambda package: [])
    done = run_here("experiments/prepare_pysource.py", "--max_files=30", "--vocab_size=400", "--val_fraction=0.1")
    assert done.returncode == 0, done.stderr
    meta = json.loads(Path("data/pysource/meta.json").read_text(encoding="utf-8"))
    assert meta["vocab_size"] == 400 and meta["documents"] == {"train": 27, "val": 3}
    tokenizer, texts = read_tokenizer("data/pysource/tokenizer"), prepare_pysource.documents()
    for split, n in meta["documents"].items():
        tokens = np.fromfile(f"data/pysource/{split}.bin", np.uint16)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)
        assert len(parts) == n + 1 and not len(parts[-1]) and len(tokens) == meta["tokens"][split]
        assert all(tokenizer.decode(part[:-1]) in texts for part in parts[:-1])
