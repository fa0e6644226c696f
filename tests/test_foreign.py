"""Models as other programs write them: heads of their own, other names, odd containers; and none that runs code."""
import io
import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import load_gpt2, random_tokens, run_here
from safetensors.torch import load_file, save_file
from test_train import write_dataset

from kronygpt import checkpoint
from kronygpt.compress import factorize
from kronygpt.configurator import UserError
from kronygpt.export import to_compressed
from model import mlp_shapes

IDX = random_tokens(2, 32)


@pytest.fixture
def directory(gpt2_dir, tmp_path):
    """A copy of the small GPT-2's directory, to be changed."""
    return shutil.copytree(gpt2_dir, tmp_path / "copy")


@torch.no_grad()
def logits(model):
    output = model.eval()(IDX)
    return getattr(output, "logits", output)


def change(directory, tensors=None, **config):
    """Write other tensors into model.safetensors and other fields into config.json."""
    if tensors:
        weights = directory / "model.safetensors"
        save_file(load_file(weights) | tensors, weights, {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_an_output_matrix_is_the_embedding_up_to_rounding(directory):
    embedding = load_file(directory / "model.safetensors")["transformer.wte.weight"]
    for head in embedding, embedding.bfloat16():
        change(directory, {"lm_head.weight": head.clone()}, tie_word_embeddings=False)
        assert torch.equal(checkpoint.load(str(directory))[0].transformer.wte.weight, embedding)
    change(directory, {"lm_head.weight": embedding * 1.1})
    with pytest.raises(UserError, match=r"an output matrix \(lm_head.weight\) that differs from its embedding"):
        checkpoint.load(str(directory))


def test_weights_named_as_a_file_are_the_model(gpt2_dir, directory, tmp_path):
    """A .safetensors or .bin file by itself, and a state dict of transformers saved with torch.save."""
    theirs = load_gpt2(gpt2_dir)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(theirs.transformer.state_dict(), tmp_path / "base.pt")
    shutil.copy(gpt2_dir / "model.safetensors", tmp_path / "mine.safetensors")
    for name in "pytorch_model.bin", "base.pt", "mine.safetensors":
        with pytest.warns(UserWarning, match="does not say its number of heads: 1 of width 64 taken"):
            model, _ = checkpoint.load(str(tmp_path / name))
        expected = {name: p for name, p in checkpoint.load(str(gpt2_dir))[0].state_dict().items()}
        assert all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())
    model, _ = checkpoint.load(str(directory / "model.safetensors"))  # beside its config.json
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rename", [
    lambda name: f"_orig_mod.module.{name}", lambda name: f"model.{name}", lambda name: f"_forward_module.module.{name}",
    lambda name: name.replace(".h.0.", ".h.0._orig_mod."), lambda name: f"_fsdp_wrapped_module.{name}",
    lambda name: name.replace(".h.1.", ".h.1._checkpoint_wrapped_module.")],
    ids=["DDP and compile", "lightning", "deepspeed", "block compiled", "fsdp", "checkpointed block"])
def test_wrappers_leave_prefixes_anywhere_in_a_name(rename, small_model, tmp_path):
    state_dict = {rename(name): p for name, p in checkpoint.to_file_names(small_model.state_dict()).items()}
    torch.save({"state_dict": state_dict, "hyper_parameters": {"lr": 1e-3}, "epoch": 1}, tmp_path / "a.ckpt")
    model, rest = checkpoint.load(str(tmp_path / "a.ckpt"))
    assert torch.equal(logits(model), logits(small_model)) and rest == checkpoint.DEFAULTS


@pytest.mark.parametrize("wrap", [
    lambda weights: {"model_state_dict": weights, "epoch": 3, "optimizer_state_dict": {"state": {0: {}}}},
    lambda weights: {"model": {"state_dict": weights, "args": {}}}, lambda weights: {"model": weights, "ema": weights},
    lambda weights: {f"policy.pretrained_model.{name}": p for name, p in weights.items()}],
    ids=["model_state_dict", "state_dict in model", "beside a mean", "prefix"])
def test_weights_may_lie_deeper(wrap, small_model, tmp_path):
    torch.save(wrap(checkpoint.to_file_names(small_model.state_dict())), tmp_path / "a.pt")
    assert torch.equal(logits(checkpoint.load(str(tmp_path / "a.pt"))[0]), logits(small_model))


def test_a_file_with_several_models_is_refused(small_model, tmp_path):
    weights = checkpoint.to_file_names(small_model.state_dict())
    prefixed = {f"{name}.{key}": p for name in ("actor", "critic") for key, p in weights.items()}
    for content, names in ({"student": weights, "teacher": weights}, "student., teacher."), (prefixed, "actor., critic."):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=f"it holds several models.*{names}"):
            checkpoint.load(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("head", ["GPT2ForSequenceClassification", "GPT2DoubleHeadsModel"])
def test_heads_of_other_tasks_are_left_out_with_a_warning(head, gpt2_dir, tmp_path):
    import transformers

    getattr(transformers, head).from_pretrained(gpt2_dir).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="left out . tensors that are no part of a GPT-2 language model, such as "):
        model, _ = checkpoint.load(str(tmp_path))
    torch.testing.assert_close(logits(model), logits(load_gpt2(gpt2_dir)), rtol=0, atol=1e-5)


def test_what_a_config_does_not_say_has_the_default_of_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    defaults = GPT2Config().to_dict()
    assert all(defaults.get(name) == values[0] for name, values in checkpoint.FUNCTION.items())
    sizes = dict(n_layer=2, n_embd=96, n_positions=32, vocab_size=256)
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).save_pretrained(tmp_path)
    for config, n_head in (sizes, 12), (dict(sizes, num_attention_heads=6), 6):
        (tmp_path / "config.json").write_text(json.dumps(config))
        model, _ = checkpoint.load(str(tmp_path))
        assert model.config.n_head == n_head
        torch.testing.assert_close(logits(model), logits(load_gpt2(tmp_path)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True), ("quantization_config", {"bits": 4})])
def test_what_a_krony_gpt_does_not_compute_is_refused(name, value, directory):
    change(directory, **{name: value})
    with pytest.raises(UserError, match=f"its config(.json)? says {name}="):
        checkpoint.load(str(directory))


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n")
    with pytest.raises(UserError, match=r"a\.pt is a git-lfs pointer .* `git lfs pull`"):
        checkpoint.load(str(tmp_path / "a.pt"))


def test_a_pruned_gpt2_loads_and_is_compressed(workdir):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=32, vocab_size=256, n_inner=96,
                                        initializer_range=0.2)).eval()
    theirs.save_pretrained("hf")
    torch.testing.assert_close(logits(checkpoint.load("hf")[0]), logits(theirs), rtol=0, atol=1e-5)
    assert run_here("kron_decompose.py", 32, 48, 2, "--init_from=hf", "--out=small.pt").returncode == 0
    assert run_here("kron_to_gpt.py", "small.pt", "exported").returncode == 0
    exported = load_gpt2("exported")
    assert exported.config.n_inner == 96
    torch.testing.assert_close(logits(exported), logits(checkpoint.load("small.pt")[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, value", [("n_layer", 10**7), ("n_embd", 32), ("n_inner", 17)])
def test_a_config_that_contradicts_the_weights_is_one_line(name, value, directory):
    change(directory, **{name: value})
    with pytest.raises(UserError, match=f"does not fit together: its config says [a-z_]*={value}"):
        checkpoint.load(str(directory))


# A model's directory with every place from which transformers would take code; each would leave a mark.

MARK = "import pathlib\npathlib.Path(__file__).with_name('mark').touch()\npathlib.Path({mark!r}).touch()\n" \
       "from transformers import GPT2Config as C, GPT2LMHeadModel as M, GPT2TokenizerFast as T\n"
SCRIPTS = {
    "kron_decompose.py": ["64", "64", "1", "--init_from={}", "--out=made.pt"],
    "prune.py": ["--init_from={}", "--out=made.pt"],
    "kron_to_gpt.py": ["{}", "made"],
    "perplexity.py": ["{}", "tiny"],
    "sample.py": ["{}", "--max_new_tokens=1"],
    "train.py": ["--init_from={}", "--teacher={}", "--dataset=tiny", "--block_size=16", "--max_iters=1", "--eval_iters=1",
                 "--gradient_accumulation_steps=1"],
}


class Pickled:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def save_compressed(directory):
    """Write the model of a directory with factored MLPs, as kron_to_gpt.py --compressed=True does."""
    model, _ = checkpoint.load(str(directory))
    to_compressed(factorize(model, mlp_shapes(32, 64, [2] * model.config.n_layer))).save_pretrained(directory)


def trap(directory, kind):
    """Make a directory one that runs code where it is trusted."""
    mark = directory.parent / "mark"
    (directory / "evil.py").write_text(MARK.format(mark=str(mark)))
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    if kind == "unknown type":
        change(directory, model_type="evil", auto_map=auto_map)
    elif kind == "auto_map":
        change(directory, auto_map=auto_map)
    elif kind == "kernel":
        change(directory, _attn_implementation="evil/kernel", attn_implementation="evil/kernel")
    elif kind == "compressed export":
        save_compressed(directory)
        (directory / "modeling_kronygpt.py").write_text(MARK.format(mark=str(mark)))
    else:
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Pickled(mark)}))
    return mark


@pytest.mark.parametrize("kind", ["unknown type", "auto_map", "kernel", "pickle", "compressed export"])
def test_a_directory_runs_no_code_in_any_script(kind, directory, workdir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))  # to whatever is asked
    write_dataset("tiny", 2000)
    mark = trap(directory, kind)
    for script, arguments in SCRIPTS.items():
        said = run_here(script, *(argument.format(directory) for argument in arguments))
        assert not mark.exists() and not (directory / "mark").exists(), (script, kind)
        if kind in ("unknown type", "pickle"):
            assert said.returncode in (1, 2) and "Traceback" not in said.stderr, (script, said.stderr)
        else:
            assert said.returncode == 0, (script, said.stderr)
        shutil.rmtree("out", ignore_errors=True)


@pytest.mark.parametrize("kind", ["unknown type", "compressed export"])
def test_the_trap_works(kind, directory, monkeypatch):
    """transformers, told to trust it, runs the directory's code."""
    from transformers import AutoConfig, GPT2Config, dynamic_module_utils

    monkeypatch.setattr(GPT2Config, "_auto_class", None)  # which transformers sets for good in what it loads so
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(directory.parent / "modules"))
    mark = trap(directory, kind)
    with suppress(Exception):  # where the class does not fit
        AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert mark.exists()
