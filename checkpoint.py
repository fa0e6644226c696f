"""Every way a model gets in or out: checkpoints (.pt) of every age, Hugging Face directories and hub names.

A checkpoint that we write is a dict of plain types and tensors: `model` (a state dict), `model_args` (the fields of
KronyGPTConfig), `optimizer` (a state dict or None), `iter_num`, `best_val_loss` and `config` (the script's options).
load() also takes

- the published Krony-PT files: a bare state dict with the same names;
- older ones, with each factor by itself: c_fc_{f}_{k} and c_proj_{f}_{k} for side k of factor f, perhaps no MLP biases;
- nanoGPT's own dense checkpoints;
- any of them with the prefixes that DDP and torch.compile leave (`module.`, `_orig_mod.`).

Every load in the project is torch.load(weights_only=True): a checkpoint is data, and never runs code.
"""
import os
import pickle
import re
import time
import warnings
from pathlib import Path

import torch

from files import replacing
from model import GPT2_HEAD_DIM, KronyGPT, ModelError, kron_weight

MODELS_DIR = Path("models")
PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")
REST = dict(optimizer=(dict, type(None)), iter_num=int, best_val_loss=(int, float), config=dict)  # beside the model
UNSTACKED = re.compile(r"^(.*\.mlp\.c_(?:fc|proj))_(\d+)_([01])$")
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files hold
LAYER_VECTORS = ("ln_1.bias", "ln_2.bias", "attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc_bias", "mlp.c_proj_bias")


class CheckpointError(ValueError):
    """A file or directory that cannot be read as a model; the message is one line for the user."""

    exit_status = 2


def save(path, model, optimizer=None, iter_num=0, best_val_loss=float("inf"), config=None):
    """Write a checkpoint; a reader finds the old file or the new one, whole.

    Args:
        path: of the .pt file; its folder is made.
        model: a KronyGPT.
        optimizer: whose state is kept for a resume, or None.
        iter_num: optimizer steps done.
        best_val_loss: in nats per token.
        config: {option: value} of the script that writes it.
    """
    content = dict(model={name: p.contiguous() for name, p in model.state_dict().items()},
                   model_args=model.model_args(), optimizer=optimizer.state_dict() if optimizer else None,
                   iter_num=iter_num, best_val_loss=best_val_loss, config=config or {})
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's own writer says this where the disk is full
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def check_is_file(path):
    """Raise CheckpointError where a checkpoint cannot be written, before work is done for it."""
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a directory: name a .pt file to write")


def save_refactored(model, dim_1, dim_2, factors, approximate, path, config):
    """Write the checkpoint of a model with other Kronecker factors, show what that costs, and load it again.

    Args:
        model: a KronyGPT, dense or not.
        dim_1, dim_2, factors: the new shape, as in KronyGPTConfig.
        approximate: function (W [m, n], dim_1, dim_2, n_factors) -> A, B of one matrix.
        path: of the .pt file.
        config: the options to keep in it.

    Raises:
        ModelError: the shape does not fit the model.
        CheckpointError: what was read back is not what was written.
    """
    check_is_file(path)
    start = time.perf_counter()
    new = model.refactored(dim_1, dim_2, factors, approximate)
    seconds = time.perf_counter() - start
    print(f"{'layer':>5}  {'matrix':<6}  {'factors':>7}  {'error ‖W - Ŵ‖/‖W‖':>18}  {'energy kept':>11}")
    for layer, (before, after) in enumerate(zip(model.transformer.h, new.transformer.h)):
        for name, old_pair, pair in zip(("c_fc", "c_proj"), before.mlp.factor_pairs(), after.mlp.factor_pairs()):
            W = kron_weight(*old_pair).detach()
            error = ((W - kron_weight(*pair)).norm() / W.norm()).item()
            print(f"{layer:>5}  {name:<6}  {len(pair[0]):>7}  {error:>18.4f}  {1 - error**2:>11.1%}")
    save_compressed(model, new, path, config, f"the factors took {seconds:.1f} s")


def save_compressed(model, new, path, config, remark):
    """Write the checkpoint of a new model made from another, show how much smaller it is, and load it again.

    Raises:
        CheckpointError: what was read back is not what was written.
    """
    old_counts, counts = model.count_parameters(), new.count_parameters()
    for name, what in (("mlp", "in the MLPs"), ("total", "in all")):
        print(f"parameters {what}: {old_counts[name]:,} → {counts[name]:,} ({counts[name] / old_counts[name]:.1%})")
    save(path, new, config=config)
    again, _ = load(str(path))
    if not all(torch.equal(p, q) for p, q in zip(new.state_dict().values(), again.state_dict().values())):
        raise CheckpointError(f"{path} does not hold what was written to it")
    print(f"wrote {path} ({os.path.getsize(path) / 2**20:.0f} MiB), and verified it; {remark}")


def load(source, dropout=0.0):
    """Load a model from anywhere.

    Args:
        source: a .pt file, a Hugging Face GPT-2 directory, a directory with a ckpt.pt, a name under models/, or a hub
            name (gpt2, gpt2-medium, ...).
        dropout: of the model; checkpoints keep none.

    Returns:
        (model, checkpoint): a KronyGPT in float32 on the CPU, and the rest of what the file held: `optimizer`,
        `iter_num`, `best_val_loss` and `config` (None, 0, inf and {} where it held none).

    Raises:
        FileNotFoundError: there is nothing of this name.
        CheckpointError: it could not be read as a model; says what and why.
    """
    path = next((p for p in (Path(source), MODELS_DIR / source) if p.exists()), None)
    if path is not None and path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path is not None and path.is_file():
        checkpoint = read_file(path)
    elif path is not None or looks_like_hub_name(source):
        checkpoint = read_hugging_face(path or source)
    else:
        raise FileNotFoundError(f"no checkpoint {source}")
    checkpoint["model_args"]["dropout"] = dropout
    try:
        model = KronyGPT.from_state_dict(checkpoint.pop("model_args"), checkpoint.pop("model"))
    except ModelError as error:
        raise CheckpointError(f"{source} does not fit together: {error}") from None
    for name, p in model.named_parameters():
        if not torch.stack(p.detach().aminmax()).isfinite().all():  # one pass, and nothing as large as the weights
            raise CheckpointError(f"{source} has weights that are not finite: {name}")
    return model, checkpoint


def looks_like_hub_name(source):
    """gpt2 or org/name: a hub name has at most one slash, and is no path to a .pt file."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith(".") and not source.endswith(".pt")


def read_hugging_face(source):
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    is_directory = isinstance(source, Path)
    if is_directory and not (source / "config.json").exists():
        raise CheckpointError(f"directory {source} holds no model: neither config.json (Hugging Face) nor ckpt.pt")
    try:
        model = KronyGPT.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        if is_directory:
            raise CheckpointError(f"cannot read {source} as a Hugging Face GPT-2: {reason}") from None
        raise FileNotFoundError(f"no file or directory {source}, nor {MODELS_DIR / source}, and no such model could "
                                f"be fetched from the Hugging Face hub (is there a network?)") from None
    except Exception as error:  # safetensors has an error class of its own, that derives from Exception alone
        raise CheckpointError(f"cannot read {source} as a Hugging Face GPT-2: {error}") from None
    return with_defaults(dict(model_args=model.model_args(), model=model.state_dict()))


def read_file(path):
    """The content of a .pt file as a checkpoint of today's layout."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused in any case
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is no checkpoint: it is not a file of torch.save, or it holds more than tensors "
                              "and plain types and is not loaded, because it could run code") from None
    except OSError as error:
        if error.filename:
            raise
        raise CheckpointError(f"{path} cannot be read: it is truncated or damaged ({error})") from None  # torch's seek
    except Exception as error:  # bytes that are no pickle can make the unpickler raise anything
        raise CheckpointError(f"{path} cannot be read: it is truncated or damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    state_dict = content.get("model", content)
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise CheckpointError(f"{path} is no checkpoint: its `model` is no dict of tensors")
    state_dict = {PREFIX.sub("", name): p for name, p in state_dict.items() if isinstance(p, torch.Tensor)}
    for name, p in state_dict.items():
        if p.layout != torch.strided or not (p.is_floating_point() or name.endswith(MASKS)):
            raise CheckpointError(f"{path} is no checkpoint: {name} is no dense tensor of real numbers")
        if p.numel() * p.element_size() > p.untyped_storage().nbytes():  # strides of 0 make any size of a few bytes
            raise CheckpointError(f"{path} claims more numbers than it holds: {name} is {tuple(p.shape)}")
    try:
        state_dict = todays_names(state_dict)
        inferred = infer_model_args(state_dict)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no GPT-2 that we know: {first_line(error)}") from None
    if "model" in content and isinstance(content.get("model_args"), dict):
        n_head = content["model_args"].get("n_head")
        inferred["n_head"] = n_head if isinstance(n_head, int) else inferred["n_head"]
    rest = {name: content[name] for name in REST if "model" in content and name in content}
    for name, value in rest.items():
        if not isinstance(value, REST[name]):
            raise CheckpointError(f"{path} is damaged: its {name} is a {type(value).__name__}")
    return with_defaults(dict(rest, model_args=inferred, model=state_dict))


def first_line(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]


def with_defaults(checkpoint):
    return dict(dict(optimizer=None, iter_num=0, best_val_loss=float("inf"), config={}), **checkpoint)


def todays_names(state_dict):
    """A state dict of any age in today's layout: stacked factors, all biases, contiguous float32."""
    state_dict = {name: p.float().contiguous() for name, p in state_dict.items()
                  if not name.endswith(MASKS)}
    sides = {}  # {(c_fc or c_proj of a layer, side): {factor: tensor}}
    for name in list(state_dict):
        if match := UNSTACKED.match(name):
            stem, factor, side = match.groups()
            sides.setdefault((stem, side), {})[int(factor)] = state_dict.pop(name)
        elif name.endswith((".mlp.c_fc.weight", ".mlp.c_proj.weight")):  # a dense Linear of nanoGPT, [out, in]
            weight = state_dict.pop(name)
            state_dict[name.replace(".weight", "_0")] = weight.t().contiguous()[None]
            state_dict[name.replace(".weight", "_1")] = weight.new_ones(1, 1, 1)
        elif name.endswith((".mlp.c_fc.bias", ".mlp.c_proj.bias")):
            state_dict[name.replace(".bias", "_bias")] = state_dict.pop(name)
    for (stem, side), by_factor in sides.items():
        if sorted(by_factor) != list(range(len(by_factor))):
            raise ValueError(f"{stem} has the factors {sorted(by_factor)}, and some in between are missing")
        state_dict[f"{stem}_{side}"] = torch.stack([by_factor[f] for f in range(len(by_factor))])
    state_dict.setdefault("lm_head.weight", state_dict["transformer.wte.weight"])
    n_embd = state_dict["transformer.wte.weight"].shape[1]
    widths = {"attn.c_attn.bias": 3 * n_embd, "mlp.c_fc_bias": 4 * n_embd}
    for layer in range(count_layers(state_dict)):
        for name in LAYER_VECTORS:  # what an old file lacks was zero
            zeros = torch.zeros(widths.get(name, n_embd))
            state_dict.setdefault(f"transformer.h.{layer}.{name}", zeros)
    state_dict.setdefault("transformer.ln_f.bias", torch.zeros(n_embd))
    return state_dict


def count_layers(state_dict):
    return len({name.split(".")[2] for name in state_dict if name.startswith("transformer.h.")})


def infer_model_args(state_dict):
    """The fields of KronyGPTConfig that the shapes tell, and the number of heads by GPT-2's rule of 64 a head."""
    vocab_size, n_embd = state_dict["transformer.wte.weight"].shape
    n_layer = count_layers(state_dict)
    factors = [state_dict[f"transformer.h.{layer}.mlp.c_fc_0"].shape[0] for layer in range(n_layer)]
    _, dim_1, dim_2 = state_dict["transformer.h.0.mlp.c_fc_0"].shape
    return dict(block_size=len(state_dict["transformer.wpe.weight"]), vocab_size=vocab_size, n_layer=n_layer,
                n_head=max(1, n_embd // GPT2_HEAD_DIM), n_embd=n_embd, dim_1=dim_1, dim_2=dim_2, factors=tuple(factors))
