"""Every layout of a model loads to the same logits, and everything else is refused in one line."""
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import StandIn
from safetensors.torch import load_file, save_file

import checkpoint
import files
from checkpoint import CheckpointError

IDX = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    output = model.eval()(IDX)
    return getattr(output, "logits", output)


def load_logits(source):
    model, _ = checkpoint.load(str(source))
    return logits(model)


def load_transformers(directory):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(directory).eval()


def unstacked(state_dict):
    """The older layout: c_fc_{factor}_{side} for each c_fc_{side} [factor, :, :]."""
    result = {}
    for name, p in state_dict.items():
        stem, _, side = name.rpartition("_")
        if ".mlp." in name and side in "01":
            result |= {f"{stem}_{f}_{side}": p[f].clone() for f in range(len(p))}
        else:
            result[name] = p
    return result


def nanogpt(hf_model):
    """The state dict of nanoGPT's dense model: transformers' with Linear weights [out, in], and its causal masks."""
    def is_conv1d(name):
        return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))

    state_dict = {name: p.T.contiguous() if is_conv1d(name) else p for name, p in hf_model.state_dict().items()}
    return state_dict | {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}


def refusal(source):
    """The one line that says why a source cannot be loaded."""
    with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
        checkpoint.load(str(source))
    assert len(str(caught.value).splitlines()) == 1
    assert str(source) in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_loaded_bit_for_bit(small_model, tmp_path):
    optimizer = small_model.configure_optimizers(1e-3, 0.1, (0.9, 0.95))
    torch.nn.functional.cross_entropy(small_model(IDX).flatten(0, 1), IDX.flatten()).backward()
    optimizer.step()
    path = tmp_path / "new folder" / "a.pt"
    checkpoint.save(path, small_model, optimizer, iter_num=7, best_val_loss=1.25, config=dict(seed=3, name="a", top_k=None))
    model, rest = checkpoint.load(str(path), dropout=0.25)
    assert model.config.dropout == 0.25
    assert {**model.model_args(), "dropout": 0.0} == small_model.model_args()
    assert model.state_dict().keys() == small_model.state_dict().keys()
    assert all(torch.equal(p, small_model.state_dict()[name]) for name, p in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (rest["iter_num"], rest["best_val_loss"], rest["config"]) == (7, 1.25, dict(seed=3, name="a", top_k=None))
    expected = optimizer.state_dict()
    assert rest["optimizer"]["param_groups"] == expected["param_groups"]
    assert rest["optimizer"]["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert all(torch.equal(value, rest["optimizer"]["state"][index][name]) for name, value in state.items())
    assert os.listdir(path.parent) == ["a.pt"]


def test_a_checkpoint_is_plain_types_and_contiguous_tensors(small_model, tmp_path):
    A = small_model.transformer.h[0].mlp.c_fc_0
    A.data = A.data.mT.contiguous().mT
    assert not A.is_contiguous()
    checkpoint.save(tmp_path / "a.pt", small_model)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.keys() == {"model", "model_args", "optimizer", "iter_num", "best_val_loss", "config"}
    assert all(p.is_contiguous() for p in content["model"].values())
    assert content["model_args"]["factors"] == (1, 2)


def test_published_and_older_layouts_have_the_logits_of_todays(small_model, tmp_path):
    expected = logits(small_model)
    stacked = small_model.state_dict()
    for state_dict in stacked, unstacked(stacked), {"model": unstacked(stacked)}:
        torch.save(state_dict, tmp_path / "a.pt")
        assert torch.equal(load_logits(tmp_path / "a.pt"), expected)
    assert "transformer.h.1.mlp.c_fc_1_0" in unstacked(stacked)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_taken_off(small_model, tmp_path, prefix):
    for state_dict in small_model.state_dict(), unstacked(small_model.state_dict()):
        prefixed = {prefix + name: p for name, p in state_dict.items()}
        for content in prefixed, dict(model=prefixed, model_args=small_model.model_args()):
            torch.save(content, tmp_path / "a.pt")
            assert torch.equal(load_logits(tmp_path / "a.pt"), logits(small_model))


def test_the_oldest_layout_has_no_mlp_biases(small_model, tmp_path):
    for block in small_model.transformer.h:
        block.mlp.c_fc_bias.data.zero_()
        block.mlp.c_proj_bias.data.zero_()
    without = {name: p for name, p in unstacked(small_model.state_dict()).items()
               if not name.endswith(("c_fc_bias", "c_proj_bias"))}
    torch.save(without, tmp_path / "a.pt")
    assert torch.equal(load_logits(tmp_path / "a.pt"), logits(small_model))


def test_a_model_without_the_tied_output_matrix_loads(small_model, tmp_path):
    torch.save({name: p for name, p in small_model.state_dict().items() if name != "lm_head.weight"}, tmp_path / "a.pt")
    assert torch.equal(load_logits(tmp_path / "a.pt"), logits(small_model))


def test_half_precision_weights_load_as_float32(small_model, tmp_path):
    torch.save({name: p.half() for name, p in small_model.state_dict().items()}, tmp_path / "a.pt")
    model, _ = checkpoint.load(str(tmp_path / "a.pt"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.half().float()) for p, q in zip(model.parameters(), small_model.parameters()))


def test_a_dense_nanogpt_checkpoint_has_the_logits_of_transformers(gpt2_dir, tmp_path):
    hf_model = load_transformers(gpt2_dir)
    state_dict = {f"_orig_mod.{name}": p for name, p in nanogpt(hf_model).items()}
    torch.save(dict(model=state_dict, model_args=dict(n_head=4, n_embd=64, bias=True), iter_num=5), tmp_path / "a.pt")
    model, rest = checkpoint.load(str(tmp_path / "a.pt"))
    torch.testing.assert_close(logits(model), logits(hf_model), rtol=0, atol=1e-5)
    assert (rest["iter_num"], rest["optimizer"], rest["config"]) == (5, None, {})


def test_a_dense_nanogpt_checkpoint_may_lack_all_biases(gpt2_dir, tmp_path):
    hf_model = load_transformers(gpt2_dir)
    for name, p in hf_model.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    without = {name: p for name, p in nanogpt(hf_model).items() if not name.endswith("bias")}
    torch.save(dict(model=without, model_args=dict(n_head=4, bias=False)), tmp_path / "a.pt")
    torch.testing.assert_close(load_logits(tmp_path / "a.pt"), logits(hf_model), rtol=0, atol=1e-5)


def test_heads_are_those_of_model_args_or_64_wide(small_model, tmp_path):
    state_dict = small_model.state_dict()
    with_args = dict(model=state_dict, model_args=dict(n_head=8))
    for content, n_head in (state_dict, 1), (dict(model=state_dict), 1), (with_args, 8):
        torch.save(content, tmp_path / "a.pt")
        assert checkpoint.load(str(tmp_path / "a.pt"))[0].config.n_head == n_head


def test_a_hugging_face_directory_has_the_logits_of_transformers(gpt2_dir, workdir):
    expected = logits(load_transformers(gpt2_dir))
    torch.testing.assert_close(load_logits(gpt2_dir), expected, rtol=0, atol=1e-5)
    shutil.copytree(gpt2_dir, workdir / "models" / "mine")
    torch.testing.assert_close(load_logits("mine"), expected, rtol=0, atol=1e-5)


def test_a_sharded_hugging_face_directory_has_the_weights_of_the_whole(gpt2_dir, tmp_path):
    load_transformers(gpt2_dir).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, shards = (checkpoint.load(str(path))[0].state_dict() for path in (gpt2_dir, tmp_path / "shards"))
    assert whole.keys() == shards.keys()
    assert all(torch.equal(p, shards[name]) for name, p in whole.items())


def test_a_directory_with_ckpt_pt_is_a_checkpoint(small_model, workdir):
    checkpoint.save(workdir / "out" / "ckpt.pt", small_model)
    checkpoint.save(workdir / "models" / "mine" / "ckpt.pt", small_model)
    for source in "out", workdir / "out", "mine", "out/ckpt.pt":
        assert torch.equal(load_logits(source), logits(small_model))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    for content in [1, 2], torch.ones(3), "text", {"model": 3}, {"model": {0: torch.ones(1)}}, {}, {"x": torch.ones(2)}:
        torch.save(content, path)
        assert "no checkpoint" in (line := refusal(path)) or "no GPT-2" in line
    for text in "", "hello", "{}", "PK\x03\x04 not really a zip":
        path.write_text(text)
        refusal(path)


def test_a_truncated_checkpoint_is_refused(small_model, tmp_path):
    checkpoint.save(tmp_path / "whole.pt", small_model)
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "a.pt"
    for length in 1, 4, 30, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1:
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole[:len(whole) // 2])
    assert "truncated or damaged" in refusal(path)


def test_a_truncated_file_of_torchs_older_format_is_refused(small_model, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(small_model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_logits(path), logits(small_model))
    whole = path.read_bytes()
    for length in *range(0, 600, 20), *range(2000, len(whole), len(whole) // 10):
        path.write_bytes(whole[:length])
        refusal(path)


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_does_not(small_model, tmp_path):
    trap = Trap(tmp_path / "sprung")
    path = tmp_path / "a.pt"
    for write in torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)):
        write(dict(model=small_model.state_dict(), config=trap), path)
        assert "could run code" in refusal(path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap works


def test_weights_that_do_not_fit_together_are_refused(small_model, tmp_path):
    mlp = "transformer.h.1.mlp."
    wanted = "where the model has (2, 64, 32)"
    attention = "transformer.h.0.attn.c_attn.weight"

    def refused(**changes):
        state_dict = dict(small_model.state_dict(), **changes)
        torch.save({name: p for name, p in state_dict.items() if p is not None}, tmp_path / "a.pt")
        return refusal(tmp_path / "a.pt")

    assert f"{mlp}c_proj_0 is (2, 64, 16), {wanted}" in refused(**{mlp + "c_proj_0": torch.ones(2, 64, 16)})
    assert f"{mlp}c_fc_1 is (3, 2, 4), where" in refused(**{mlp + "c_fc_1": torch.ones(3, 2, 4)})
    assert f"{mlp}c_fc_bias is (4,), where" in refused(**{mlp + "c_fc_bias": torch.ones(4)})
    assert f"{attention} is missing" in refused(**{attention: None})
    assert "transformer.extra is (1,), where the model has none" in refused(**{"transformer.extra": torch.ones(1)})
    assert "transformer.wte.weight" in refused(**{"transformer.wte.weight": None})
    assert f"{mlp}c_fc_0" in refused(**{mlp + "c_fc_0": None})
    assert "dim_1=3 does not divide" in refused(**{f"transformer.h.{i}.mlp.c_fc_0": torch.ones(1, 3, 64) for i in (0, 1)})


def test_a_missing_checkpoint_is_named(workdir):
    for source in "nowhere.pt", "./nowhere", "some/where/else", "models/nothing.pt":
        assert "no checkpoint" in refusal(source)
    for name in "no-such-model", "no-such-org/model":
        assert "is there a network?" in refusal(name)


def test_a_damaged_hugging_face_directory_is_refused(gpt2_dir, workdir):
    directory = shutil.copytree(gpt2_dir, workdir / "hf")
    weights, config = directory / "model.safetensors", directory / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    refusal(directory)
    weights.write_bytes(b"")
    refusal(directory)
    weights.unlink()
    refusal(directory)
    save_file({name: p for name, p in load_file(gpt2_dir / weights.name).items() if "c_fc" not in name}, weights,
              metadata={"format": "pt"})
    assert "lacks the weights transformer.h.0.mlp.c_fc" in refusal(directory)
    for text, message in ('{"model_type": "llama"}', "a llama model"), ("{", "config.json"), ("{}", "config.json"), \
            (config.read_text().replace("gelu_new", "relu"), "activation_function=relu"):
        config.write_text(text)
        assert message in refusal(directory)
    config.unlink()
    assert "neither config.json (Hugging Face) nor ckpt.pt" in refusal(directory)


@pytest.mark.parametrize("error, shown", [(OSError("disk full"), OSError), (RuntimeError("disk full"), OSError),
                                          (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_save_leaves_the_old_checkpoint_alone(small_model, tmp_path, monkeypatch, error, shown):
    path = tmp_path / "a.pt"
    checkpoint.save(path, small_model, iter_num=1)
    before = path.read_bytes()

    def failing_save(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint, "torch", StandIn(torch, save=failing_save))
    with pytest.raises(shown):
        checkpoint.save(path, small_model, iter_num=2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_new_checkpoint_takes_the_name_only_when_it_is_on_disk(small_model, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.save(path, small_model, iter_num=1)
    synced = []

    def checked_replace(new, old):
        assert synced, "renamed before it is on disk"
        assert torch.load(path, weights_only=True)["iter_num"] == 1
        assert torch.load(new, weights_only=True)["iter_num"] == 2
        assert Path(new).parent == path.parent
        os.replace(new, old)

    monkeypatch.setattr(files, "os", StandIn(os, fsync=lambda file: [synced.append(file), os.fsync(file)],
                                             replace=checked_replace))
    checkpoint.save(path, small_model, iter_num=2)
    assert torch.load(path, weights_only=True)["iter_num"] == 2
    assert len(synced) == 2  # the file and its directory
