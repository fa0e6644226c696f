"""Every layout of a model loads to the same logits, and everything else is refused in one line."""
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import load_gpt2
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from kronygpt import checkpoint
from kronygpt.checkpoint import load_optimizer_state, to_file_names
from kronygpt.configurator import UserError

FILES = Path(__file__).parent / "files"
IDX = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    output = model.eval()(IDX)
    return getattr(output, "logits", output)


def load_logits(source):
    model, _ = checkpoint.load(str(source))
    return logits(model)


def published(model):
    """A model's state dict as a file has it."""
    return to_file_names(model.state_dict())


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


def refusal(source):
    """The one line that says why a source cannot be loaded."""
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        checkpoint.load(str(source))
    assert getattr(caught.value, "status", 2) == 2
    assert len(str(caught.value).splitlines()) == 1
    assert str(source) in str(caught.value)
    return str(caught.value)


def train_a_step(model):
    """An optimizer that has made a step."""
    optimizer = model.configure_optimizers(1e-3, 0.1, (0.9, 0.95))
    F.cross_entropy(model(IDX).flatten(0, 1), IDX.flatten()).backward()
    optimizer.step()
    return optimizer


@pytest.fixture(params=["small_model", "mixed_model"])
def model(request):
    return request.getfixturevalue(request.param)


# what we write

def test_what_is_saved_is_loaded_bit_for_bit(model, tmp_path):
    optimizer = train_a_step(model)
    path = tmp_path / "new folder" / "a.pt"
    checkpoint.save(path, model, optimizer, iter_num=7, best_val_loss=1.25, config=dict(seed=3, name="a", top_k=None))
    again, rest = checkpoint.load(str(path), dropout=0.25)
    assert again.config.dropout == 0.25
    assert {**again.config.as_plain_types(), "dropout": 0.0} == model.config.as_plain_types()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in again.state_dict().items())
    assert (rest["iter_num"], rest["best_val_loss"], rest["config"]) == (7, 1.25, dict(seed=3, name="a", top_k=None))
    expected = optimizer.state_dict()
    assert rest["optimizer"]["param_groups"] == expected["param_groups"]
    assert rest["optimizer"]["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert all(torch.equal(value, rest["optimizer"]["state"][index][name]) for name, value in state.items())
    assert os.listdir(path.parent) == ["a.pt"]


def test_a_file_has_the_published_names_and_layout(mixed_model, tmp_path):
    checkpoint.save(tmp_path / "a.pt", mixed_model, train_a_step(mixed_model))
    found = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    expected = {"transformer.wte.weight": (256, 128), "transformer.wpe.weight": (32, 128), "lm_head.weight": (256, 128),
                "transformer.ln_f.weight": (128,), "transformer.ln_f.bias": (128,)}
    for layer in range(5):
        block = f"transformer.h.{layer}."
        expected |= {f"{block}{norm}.{part}": (128,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for name, (m, n) in mixed_model.config.sizes(0).items():
            dim_1, dim_2, r = mixed_model.config.shapes[name][layer]
            if "attn" in name and (dim_1, dim_2, r) == (m, n, 1):
                expected |= {f"{block}{name}.weight": (n, m), f"{block}{name}.bias": (n,)}
            else:
                expected |= {f"{block}{name}_0": (r, dim_1, dim_2), f"{block}{name}_1": (r, m // dim_1, n // dim_2),
                             f"{block}{name}_bias": (n,)}
    assert {name: tuple(p.shape) for name, p in found.items()} == expected
    assert sum(name.endswith(("c_attn.weight", "c_proj.weight")) for name in found) == 2
    blocks, dense = mixed_model.transformer.h, {name: shapes.index((m, n, 1)) for (name, (m, n)), shapes in zip(
        mixed_model.config.sizes(0).items(), mixed_model.config.shapes.values())}
    layer = dense["attn.c_attn"]
    assert torch.equal(found[f"transformer.h.{layer}.attn.c_attn.weight"], blocks[layer].attn.c_attn.weight.T)
    assert torch.equal(found["transformer.h.0.attn.c_proj_1"], blocks[0].attn.c_proj.B)
    assert torch.equal(found["transformer.h.3.mlp.c_fc_0"], blocks[3].mlp.c_fc.A)
    assert torch.equal(found["transformer.h.3.mlp.c_fc_bias"], blocks[3].mlp.c_fc.bias)
    assert found["transformer.wte.weight"].data_ptr() == found["lm_head.weight"].data_ptr()  # once in the file


# what others wrote, and we did

def test_published_and_older_layouts_have_the_logits_of_todays(small_model, tmp_path):
    expected = logits(small_model)
    stacked = published(small_model)
    for state_dict in stacked, unstacked(stacked), {"model": unstacked(stacked)}:
        torch.save(state_dict, tmp_path / "a.pt")
        assert torch.equal(load_logits(tmp_path / "a.pt"), expected)
    assert "transformer.h.1.mlp.c_fc_1_0" in unstacked(stacked)


def test_a_bare_state_dict_tells_the_shapes_of_all_four_matrices(mixed_model, tmp_path):
    torch.save(published(mixed_model), tmp_path / "a.pt")
    again, rest = checkpoint.load(str(tmp_path / "a.pt"))
    assert again.config == mixed_model.config
    assert torch.equal(logits(again), logits(mixed_model))
    assert rest == checkpoint.DEFAULTS


def test_a_factor_of_one_number_counts(tmp_path, gpt2_dir):
    """A file may give a dense MLP matrix as W / 2 and [[2]]."""
    model, _ = checkpoint.load(gpt2_dir)
    state_dict = {name: p / 2 if name.endswith("c_fc_0") else p * 2 if name.endswith("c_fc_1") else p
                  for name, p in published(model).items()}
    torch.save(dict(model=state_dict, model_args=dict(n_head=4)), tmp_path / "a.pt")
    assert torch.equal(load_logits(tmp_path / "a.pt"), logits(model))


@pytest.mark.parametrize("source", ["nanogpt_ckpt.pt", "nanogpt_nobias_ckpt.pt", "krony_pt_bare.pt", "transformers_4",
                                    "hub_2019", "n_inner_half"])
def test_files_of_other_programs_have_the_logits_of_those_programs(source, shared, recwarn):
    """n_inner_half has float16 weights. They become float32 exactly, and expected.pt computed with them in float32, so
    that half precision costs nothing more. The GELU of nanoGPT and Krony-PT is the exact one, which is told."""
    foreign = shared / "data" / "foreign"
    expected = torch.load(foreign / "expected.pt", weights_only=True)
    model, _ = checkpoint.load(str(foreign / source))
    with torch.no_grad():
        found = model.eval()(expected["idx"])
    torch.testing.assert_close(found, expected.get(f"{source}:tanh", expected[source]), rtol=0, atol=1e-5)
    is_exact = source.startswith(("nanogpt", "krony"))
    assert any("which compute the exact GELU" in str(warning.message) for warning in recwarn) == is_exact
    assert ((found - expected[source]).abs().max() > 1e-5) == is_exact


def test_a_checkpoint_of_the_first_edition_has_its_logits():
    expected = torch.load(FILES / "first_edition" / "expected.pt", weights_only=True)
    model, rest = checkpoint.load(str(FILES / "first_edition" / "ckpt.pt"))
    assert model.config.n_head == 2
    assert model.config.shapes["mlp.c_fc"] == [(8, 32, 1), (8, 32, 2)]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(expected["idx"]), expected["logits"], rtol=0, atol=1e-5)
    assert rest["iter_num"] == 3 and rest["config"]["factors"] == "1,2" and rest["optimizer"]["param_groups"]


def test_a_run_of_the_first_edition_is_not_resumed_but_started_from(gpt2_dir):
    for path in FILES / "first_edition" / "ckpt.pt", gpt2_dir:
        model, rest = checkpoint.load(path)
        with pytest.raises(UserError, match=f"Start from its weights, --init_from={re.escape(str(path))} with another"):
            load_optimizer_state(model.configure_optimizers(1e-2, 0.1, (0.9, 0.95)), rest["optimizer"], path)


# what a resume needs

def test_a_resumed_run_has_the_moments_of_the_file_and_the_options_of_its_own(small_model, tmp_path):
    """Compared with AdamW's formula."""
    checkpoint.save(tmp_path / "a.pt", small_model, train_a_step(small_model), iter_num=1)
    model, rest = checkpoint.load(tmp_path / "a.pt")
    lr, weight_decay, (beta1, beta2) = 3e-2, 0.9, (0.5, 0.8)
    resumed = model.configure_optimizers(lr, weight_decay, (beta1, beta2), factor_lr_scale=7)
    load_optimizer_state(resumed, rest["optimizer"], "a.pt")
    p, (m, v) = model.transformer.h[1].mlp.c_fc.A, (resumed.state[model.transformer.h[1].mlp.c_fc.A][key].double()
                                                    for key in ("exp_avg", "exp_avg_sq"))
    assert v.any() and resumed.state[p]["step"] == 1
    before = p.detach().double()
    model(IDX, IDX.flip(0)).backward()
    m, v = beta1 * m + (1 - beta1) * p.grad, beta2 * v + (1 - beta2) * p.grad**2
    resumed.step()
    step = m / (1 - beta1**2) / (v.div(1 - beta2**2).sqrt() + 1e-8)
    expected = before * (1 - 7 * lr * weight_decay) - 7 * lr * step
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_moments_of_other_parameters_or_shapes_are_refused(mixed_model):
    optimizer = train_a_step(mixed_model)
    state = optimizer.state_dict()
    groups, moments = state["param_groups"], state["state"]
    swapped = [dict(groups[0], param_names=groups[0]["param_names"][::-1]), *groups[1:]]
    shorter = {**moments, 0: dict(moments[0], exp_avg=torch.zeros(3))}  # the fused step would write beyond it
    for damaged in dict(state, param_groups=swapped), dict(state, state=shorter), dict(state, state={0: moments[0]}), None:
        with pytest.raises(UserError, match=r"^a\.pt cannot be resumed: it holds no optimizer's state of this model"):
            load_optimizer_state(optimizer, damaged, "a.pt")


# other layouts

def test_the_oldest_layout_has_no_mlp_biases(small_model, tmp_path):
    for block in small_model.transformer.h:
        block.mlp.c_fc.bias.data.zero_()
        block.mlp.c_proj.bias.data.zero_()
    without = {name: p for name, p in unstacked(published(small_model)).items()
               if not name.endswith(("c_fc_bias", "c_proj_bias"))}
    torch.save(without, tmp_path / "a.pt")
    assert torch.equal(load_logits(tmp_path / "a.pt"), logits(small_model))


@pytest.mark.parametrize("missing", ["lm_head.weight", "transformer.wte.weight"])
def test_one_of_the_two_tied_matrices_is_enough(missing, small_model, tmp_path):
    torch.save({name: p for name, p in published(small_model).items() if name != missing}, tmp_path / "a.pt")
    assert torch.equal(load_logits(tmp_path / "a.pt"), logits(small_model))


def test_a_dense_nanogpt_checkpoint_has_the_logits_of_transformers(gpt2_dir, tmp_path):
    """Its Linear weights are [out, in], and older ones hold causal masks."""
    hf_model = load_gpt2(gpt2_dir)
    state_dict = {f"_orig_mod.{name}": p.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p
                  for name, p in hf_model.state_dict().items()}
    state_dict["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    torch.save(dict(model=state_dict, model_args=dict(n_head=4, n_embd=64, bias=True), iter_num=5), tmp_path / "a.pt")
    model, rest = checkpoint.load(str(tmp_path / "a.pt"))
    torch.testing.assert_close(logits(model), logits(hf_model), rtol=0, atol=1e-5)
    assert (rest["iter_num"], rest["optimizer"], rest["config"]) == (5, None, {})


def test_heads_are_those_of_model_args_or_64_wide(small_model, tmp_path):
    state_dict = published(small_model)
    with_args = dict(model=state_dict, model_args=dict(n_head=8))
    for content, n_head in (state_dict, 1), (dict(model=state_dict), 1), (with_args, 8):
        torch.save(content, tmp_path / "a.pt")
        assert checkpoint.load(str(tmp_path / "a.pt"))[0].config.n_head == n_head


# Hugging Face

def test_a_hugging_face_directory_has_the_logits_of_transformers(gpt2_dir, workdir):
    expected = logits(load_gpt2(gpt2_dir))
    assert expected.std() > 0.1
    torch.testing.assert_close(load_logits(gpt2_dir), expected, rtol=0, atol=1e-5)
    shutil.copytree(gpt2_dir, workdir / "models" / "mine")
    torch.testing.assert_close(load_logits("mine"), expected, rtol=0, atol=1e-5)


def test_a_sharded_hugging_face_directory_has_the_weights_of_the_whole(gpt2_dir, tmp_path):
    load_gpt2(gpt2_dir).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, shards = (checkpoint.load(str(path))[0].state_dict() for path in (gpt2_dir, tmp_path / "shards"))
    assert whole.keys() == shards.keys()
    assert all(torch.equal(p, shards[name]) for name, p in whole.items())
    (tmp_path / "shards" / "model-00002-of-00007.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00007"):
        checkpoint.load(tmp_path / "shards")


# names and directories

def test_a_directory_with_ckpt_pt_is_a_checkpoint(small_model, workdir):
    checkpoint.save(workdir / "out" / "ckpt.pt", small_model)
    checkpoint.save(workdir / "models" / "mine" / "ckpt.pt", small_model)
    for source in "out", workdir / "out", "mine", "out/ckpt.pt":
        assert torch.equal(load_logits(source), logits(small_model))


# what is refused

def test_what_is_no_checkpoint_is_refused(small_model, tmp_path):
    torch.save({"weights": 3, "epoch": {0: torch.ones(1)}}, tmp_path / "a.pt")
    assert "no weights of a GPT-2 (no ln_f.weight), but epoch.0" in refusal(tmp_path / "a.pt")
    torch.save(torch.ones(3), tmp_path / "a.pt")
    refusal(tmp_path / "a.pt")
    for text in "", "hello", "PK\x03\x04 not really a zip":
        (tmp_path / "a.pt").write_text(text)
        refusal(tmp_path / "a.pt")
    for is_zip in True, False:  # torch's format and its older one
        torch.save(published(small_model), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        os.truncate(tmp_path / "a.pt", 100_000)
        assert "a.pt is truncated or damaged" in refusal(tmp_path / "a.pt")


def test_one_flipped_bit_is_found(small_model, tmp_path):
    """In each record of the archive."""
    checkpoint.save(tmp_path / "whole.pt", small_model, train_a_step(small_model))
    whole, path = (tmp_path / "whole.pt").read_bytes(), tmp_path / "a.pt"
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        records = archive.infolist()
    assert len(records) > 30
    for record in records:
        header = record.header_offset
        begin = header + 30 + sum(struct.unpack("<2H", whole[header + 26:header + 30]))
        damaged = bytearray(whole)
        damaged[begin + record.file_size // 2] ^= 1
        path.write_bytes(damaged)
        assert f"the checksum of {record.filename} is wrong" in refusal(path)


def test_weights_that_do_not_fit_together_are_refused(small_model, tmp_path):
    mlp, attention = "transformer.h.1.mlp.", "transformer.h.0.attn.c_attn"

    def refused(**changes):
        state_dict = dict(published(small_model), **changes)
        torch.save({name: p for name, p in state_dict.items() if p is not None}, tmp_path / "a.pt")
        return refusal(tmp_path / "a.pt")

    wanted = "where the model has (2, 4, 4)"
    assert f"{mlp}c_proj.B is (2, 4, 2), {wanted}" in refused(**{mlp + "c_proj_0": torch.ones(2, 64, 16)})
    assert f"it lacks {mlp}c_fc.B" in refused(**{mlp + "c_fc_1": None})
    assert f"it lacks {mlp}c_fc.A" in refused(**{mlp + "c_fc_0": None})
    assert f"{mlp}c_fc.bias is (4,), where" in refused(**{mlp + "c_fc_bias": torch.ones(4)})
    assert ".bias is (192,), where the model has (100,)" in refused(**{attention + ".weight": torch.ones(100, 64)})
    quantized = (small_model.transformer.wpe.weight * 100).to(torch.int8)  # whose scale nobody knows
    assert "holds no real numbers but torch.int8" in refused(**{"transformer.wpe.weight": quantized})
    assert "it lacks transformer.wte.weight" in refused(**{"transformer.wte.weight": None, "lm_head.weight": None})


def test_a_missing_checkpoint_is_named(workdir):
    for source in "nowhere.pt", "./nowhere", "some/where/else", "models/nothing.pt":
        assert "no checkpoint" in refusal(source)
    for name in "no-such-model", "no-such-org/model":
        assert "is there a network" in refusal(name)


def test_a_damaged_hugging_face_directory_is_refused(gpt2_dir, workdir):
    directory = shutil.copytree(gpt2_dir, workdir / "hf")
    weights, config = directory / "model.safetensors", directory / "config.json"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors is truncated or damaged" in refusal(directory)
    weights.unlink()
    assert "model.safetensors" in refusal(directory)
    save_file({name: p for name, p in load_file(gpt2_dir / weights.name).items() if "c_fc" not in name}, weights)
    assert "lacks transformer.h.0.mlp.c_fc" in refusal(directory)
    config.unlink()
    assert "config.json" in refusal(directory)
