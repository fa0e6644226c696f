"""What the tests share. All of them run offline; those that use ../shared skip where it is absent."""
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
# where the machine is busy, two threads wait for each other at every small product
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from kronygpt.configurator import SIGNALS  # noqa: E402
from model import KronyGPT, KronyGPTConfig, mlp_shapes  # noqa: E402


@pytest.fixture
def shared(monkeypatch):
    """The directory ../shared, whose GPT-2 BPE files tiktoken then takes."""
    if not SHARED.is_dir():
        pytest.skip(f"../shared is not here: {SHARED}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "data" / "tiktoken_cache"))
    return SHARED


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """A train.py in this process draws no loss.png, which takes a quarter of a second; test_pictures.py draws."""
    monkeypatch.setattr("kronygpt.run_dir.draw_run", lambda log, path, title: None)


@pytest.fixture(autouse=True)
def as_it_was():
    """Undo what a script may leave in this process."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_dataset(name, n_tokens):
    """A data set of bytes, of which low ones are the more likely, so that a model can learn; returns the training tokens."""
    directory = Path("data", name)
    directory.mkdir(parents=True)
    tokens = np.random.default_rng(0).geometric(0.05, n_tokens + 500).clip(max=255).astype(np.uint16)
    tokens[:n_tokens].tofile(directory / "train.bin")
    tokens[n_tokens:].tofile(directory / "val.bin")
    directory.joinpath("meta.json").write_text(json.dumps(dict(vocab_size=256, tokenizer="bytes")))
    return tokens[:n_tokens].astype(np.int64)


@pytest.fixture
def tokens(workdir):
    """The training tokens of data/tiny."""
    return write_dataset("tiny", 5000)


class StandIn:
    """A module with some of its names replaced: for the name of a module inside the module under test, since a function
    replaced in the module itself is replaced for every library in the process."""

    def __init__(self, module, **replaced):
        self.__dict__.update(replaced, module=module)

    def __getattr__(self, name):
        return getattr(self.module, name)


@torch.no_grad()
def randomize_vectors(model):
    """Move biases from 0 and layer norms from 1, where a lost one would not show."""
    for p in model.parameters():
        if p.dim() == 1:
            p.add_(torch.randn_like(p), alpha=0.1)


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory):
    """A Hugging Face directory with a small random GPT-2: 2 layers, 64 wide, 4 heads, context 32, vocabulary 256."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=32, vocab_size=256,
                                       initializer_range=0.2))  # at 0.02 the logits hardly depend on the context
    randomize_vectors(model)
    directory = tmp_path_factory.mktemp("hf") / "gpt2"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def small_model():
    """A random KronyGPT with factored MLPs, whose numbers of factors differ between its two blocks."""
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=1, n_embd=64,
                                    shapes=mlp_shapes(32, 64, (1, 2))))
    randomize_vectors(model)
    return model.eval()


def kinds_of_shape(m, n):
    """A Kronecker sum, low rank, its mirror image, a pruned matrix and a dense one."""
    return [(m // 4, n // 8, 2), (m, 1, 3), (1, n, 3), (m, n // 4, 1), (m, n, 1)]


@pytest.fixture
def mixed_model():
    """A random KronyGPT of 5 blocks and two heads, in which each of the four matrices has each kind of shape once."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=256, n_layer=5, n_head=2, n_embd=128)
    shapes = {name: [kinds_of_shape(m, n)[(layer + place) % 5] for layer in range(5)]
              for place, (name, (m, n)) in enumerate(KronyGPTConfig(**sizes).sizes(0).items())}
    model = KronyGPT(KronyGPTConfig(**sizes, shapes=shapes))
    randomize_vectors(model)
    with torch.no_grad():  # at 0.02 the logits hardly depend on the blocks
        for _, _, matrix in model.matrices():
            matrix.A.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def run_script():
    """Run a script of the repository, or one of the test's own by its absolute path, and return what it said."""
    def run(script, *args, cwd=None, env=None, timeout=120):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=environment,
                              capture_output=True, text=True, timeout=timeout)

    return run


def run_here(script, *args):
    """Run a script in this process, which has imported torch already, and return what it said, as run_script does."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [script, *map(str, args)]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def succeed(script, *args):
    """run_here for a command that must succeed."""
    said = run_here(script, *args)
    assert said.returncode == 0, said.stderr
    return said


def refused(script, *args, status=(1, 2)):
    """run_here for a command that must fail; returns the one line that it says on stderr."""
    said = run_here(script, *args)
    assert said.returncode in status and said.stderr.count("\n") == 1, (said.returncode, said.stderr)
    return said.stderr


def snapshot(folder="."):
    """{path: content of each file, and None for a directory}."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def kron_sum(A, B):
    whole = dict(memory_format=torch.contiguous_format)  # torch.kron trips over the strides of sides of length 1
    return sum(torch.kron(a.clone(**whole), b.clone(**whole)) for a, b in zip(A, B))


def random_matrix(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def square_root(S):
    """The symmetric one."""
    values, vectors = np.linalg.eigh(np.asarray(S))
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def smallest_error(W, dim_1, dim_2, n_factors):
    """The error of the best sum of n_factors Kronecker products: Eckart and Young's, of the rearranged W."""
    W = W.double().numpy()
    m2, n2 = W.shape[0] // dim_1, W.shape[1] // dim_2
    blocks = [W[i * m2:(i + 1) * m2, j * n2:(j + 1) * n2].ravel() for i in range(dim_1) for j in range(dim_2)]
    return math.sqrt(np.sum(np.linalg.svd(np.array(blocks), compute_uv=False)[n_factors:] ** 2))


def gpt2_weights(model):
    """The state dict of the transformers GPT-2 that a KronyGPT should equal, as a differentiable function of its
    parameters: Conv1D weights are sums of torch.kron."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: p for name, p in tensors.items() if not name.endswith((".A", ".B"))}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights | {name.removesuffix("A") + "weight": kron_sum(A, tensors[name.removesuffix("A") + "B"])
                      for name, A in tensors.items() if name.endswith(".A")}


def to_gpt2(model):
    """The transformers GPT-2 that a KronyGPT should equal."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                                          n_layer=config.n_layer, n_head=config.n_head, n_inner=config.n_inner[0]))
    hf_model.load_state_dict(gpt2_weights(model))
    return hf_model.eval()


def load_gpt2(directory):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(directory).eval()


def named_matrices(model):
    """[(name in the state dict, KronLinear)] of a KronyGPT."""
    return [(f"transformer.h.{layer}.{kind}", matrix) for layer, kind, matrix in model.matrices()]


def continuation(model, idx, *args, **options):
    """idx (B, T) and what a KronyGPT generates behind it."""
    return torch.cat((idx, *model.generate(idx, *args, **options)), dim=1)


def random_tokens(*shape, vocab_size=256):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
