"""Every file format of a model, in and out: checkpoints (.pt) of every age, Hugging Face directories and hub names.

A checkpoint that we write is a dict of plain types and tensors: `model` (a state dict), `model_args` (the fields of
KronyGPTConfig), `optimizer` (a state dict or None), `iter_num`, `best_val_loss` and `config` (the script's options).
Its tensors have the published names of Krony-PT: a factored matrix is `<name>_0` (A), `<name>_1` (B) and `<name>_bias`,
always so in the MLP; a dense attention matrix is `<name>.weight` [out, in] and `<name>.bias`. load() also takes

- the published Krony-PT files: a bare state dict with the same names;
- older ones, with each factor by itself: c_fc_{f}_{k} and c_proj_{f}_{k} for side k of factor f, perhaps no MLP biases;
- nanoGPT's own dense checkpoints;
- any of them with the prefixes that DDP and torch.compile leave (`module.`, `_orig_mod.`).

Every load in the project is torch.load(weights_only=True): a checkpoint is data, and never runs code.
"""
import pickle
import re
import warnings
from pathlib import Path

import torch

from configurator import UserError
from files import atomic_write
from model import KronyGPT

MODELS_DIR = Path("models")
GPT2_HEAD_DIM = 64  # n_embd / n_head in GPT-2 small, medium, large and xl
DEFAULTS = dict(optimizer=None, iter_num=0, best_val_loss=float("inf"), config={})  # what a file may hold beside a model
RESUME_TYPES = dict(optimizer=dict, iter_num=int, best_val_loss=(int, float), config=dict)
PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")
MATRIX = r"(transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))"
IN_MEMORY = re.compile(MATRIX + r"\.(A|B|bias)")
IN_FILE = re.compile(MATRIX + r"(_0|_1|_bias|\.weight|\.bias)")
UNSTACKED = re.compile(r"(.*\.mlp\.c_(?:fc|proj))_(\d+)_([01])")
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files hold


def save(path, model, optimizer=None, iter_num=0, best_val_loss=float("inf"), config=None):
    """Write a checkpoint atomically.

    Args:
        path: of the .pt file; its folder is made.
        model: a KronyGPT.
        optimizer: whose state is kept for a resume, or None.
        iter_num: optimizer steps done.
        best_val_loss: in nats per token.
        config: {option: value} of the script that writes it.
    """
    content = dict(model=to_file_names(model.state_dict()), model_args=model.config.as_plain_types(),
                   optimizer=optimizer.state_dict() if optimizer else None, iter_num=iter_num, best_val_loss=best_val_loss,
                   config=config or {})
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's own writer says this where the disk is full
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def check_is_file(path):
    """Raise UserError where a checkpoint cannot be written, before work is done for it."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a directory: name a .pt file to write")


def load(source, dropout=0.0):
    """Load a model from anywhere.

    Args:
        source: a .pt file, a Hugging Face GPT-2 directory, a directory with a ckpt.pt, a name under models/, or a hub
            name (gpt2, gpt2-medium, ...).
        dropout: of the model; checkpoints keep none.

    Returns:
        (model, rest): a KronyGPT in float32 on the CPU, and what else the file held: `optimizer`, `iter_num`,
        `best_val_loss` and `config`, as they are in the file (None, 0, inf and {} where it held none).

    Raises:
        FileNotFoundError: there is nothing of this name.
        UserError: it could not be read as a model; says what and why.
    """
    path = next((p for p in (Path(source), MODELS_DIR / source) if p.exists()), None)
    if path is not None and path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path is not None and path.is_file():
        model_args, state_dict, rest = read_file(path)
    elif path is not None or looks_like_hub_name(source):
        model_args, state_dict, rest = read_hugging_face(path or source)
    else:
        raise FileNotFoundError(f"no checkpoint {source}")
    try:
        model = KronyGPT.from_state_dict(dict(model_args, dropout=dropout), state_dict)
    except UserError as error:
        raise UserError(f"{source} does not fit together: {error}") from None
    for name, p in model.named_parameters():
        if not torch.stack(p.detach().aminmax()).isfinite().all():  # one pass, and nothing as large as the weights
            raise UserError(f"{source} has weights that are not finite: {name}")
    return model, rest


def looks_like_hub_name(source):
    """gpt2 or org/name: a hub name has at most one slash, and is no path to a .pt file."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith(".") and not source.endswith(".pt")


def read_hugging_face(source):
    """(model_args, state dict, rest) of a Hugging Face GPT-2: a directory (a Path) or a hub name."""
    from transformers import AutoConfig, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    is_directory = isinstance(source, Path)
    if is_directory and not (source / "config.json").exists():
        raise UserError(f"directory {source} holds no model: neither config.json (Hugging Face) nor ckpt.pt")
    try:
        hf_config = AutoConfig.from_pretrained(source)
        check_is_gpt2(hf_config, source)
        hf_model, report = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        if is_directory:
            raise UserError(f"cannot read {source} as a Hugging Face GPT-2: {' '.join(str(error).split())}") from None
        raise FileNotFoundError(f"no file or directory {source}, nor {MODELS_DIR / source}, and no such model could "
                                f"be fetched from the Hugging Face hub (is there a network?)") from None
    except Exception as error:  # safetensors has an error class of its own, that derives from Exception alone
        raise UserError(f"cannot read {source} as a Hugging Face GPT-2: {error}") from None
    if report["missing_keys"]:
        raise UserError(f"{source} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}, ...")
    args = dict(block_size=hf_config.n_positions, vocab_size=hf_config.vocab_size, n_layer=hf_config.n_layer,
                n_head=hf_config.n_head, n_embd=hf_config.n_embd, n_inner=hf_config.n_inner)
    return args, from_transformers_names(hf_model.state_dict()), dict(DEFAULTS)


def check_is_gpt2(hf_config, source):
    """Raise UserError unless a transformers config describes the function that KronyGPT computes."""
    if hf_config.model_type != "gpt2":
        raise UserError(f"{source} is a {hf_config.model_type} model, not a GPT-2")
    wanted = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                  scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)
    for name, value in wanted.items():
        if getattr(hf_config, name) != value:
            raise UserError(f"{source} is a GPT-2 with {name}={getattr(hf_config, name)}, where {value} is needed")


def read_file(path):
    """(model_args, state dict, rest) of a .pt file of any layout."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused in any case
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint: it is not a file of torch.save, or it holds more than tensors "
                        "and plain types and is not loaded, because it could run code") from None
    except OSError as error:
        if error.filename:
            raise
        raise UserError(f"{path} cannot be read: it is truncated or damaged ({error})") from None  # torch's seek
    except Exception as error:  # bytes that are no pickle can make the unpickler raise anything
        raise UserError(f"{path} cannot be read: it is truncated or damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    state_dict = content.get("model", content)
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise UserError(f"{path} is no checkpoint: its `model` is no dict of tensors")
    state_dict = {PREFIX.sub("", name): p for name, p in state_dict.items() if isinstance(p, torch.Tensor)}
    for name, p in state_dict.items():
        if p.layout != torch.strided or not (p.is_floating_point() or name.endswith(MASKS)):
            raise UserError(f"{path} is no checkpoint: {name} is no dense tensor of real numbers")
        if p.numel() * p.element_size() > p.untyped_storage().nbytes():  # strides of 0 make any size of a few bytes
            raise UserError(f"{path} claims more numbers than it holds: {name} is {tuple(p.shape)}")
    try:
        state_dict = upgrade_state_dict(state_dict)
        model_args = infer_model_args(state_dict)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} holds no GPT-2 that we know: {first_line(error)}") from None
    rest = {name: content.get(name, default) if "model" in content else default for name, default in DEFAULTS.items()}
    if "model" in content and isinstance(content.get("model_args"), dict):
        n_head = content["model_args"].get("n_head")
        model_args["n_head"] = n_head if isinstance(n_head, int) else model_args["n_head"]
    return model_args, state_dict, rest


def first_line(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]


def load_to_resume(path, dropout=0.0):
    """Load a checkpoint of train.py, with what a resume needs.

    Returns:
        (model, rest), as load() does.

    Raises:
        UserError: also where that is missing or damaged.
    """
    model, rest = load(str(path), dropout)
    for name, wanted in RESUME_TYPES.items():
        if not isinstance(rest[name], wanted):
            raise UserError(f"{path} cannot be resumed: its {name} is a {type(rest[name]).__name__}. Start from its "
                            f"weights, --init_from={path} with another --out_dir")
    return model, rest


def check_optimizer_state(optimizer, state, path):
    """Raise UserError unless the state of an optimizer, from a checkpoint, is laid out as an optimizer's own.

    Earlier versions stored the factors in another order, under other names.
    """
    names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    groups = state.get("param_groups")
    is_state = isinstance(groups, list) and isinstance(state.get("state"), dict)
    if not is_state or [isinstance(g, dict) and g.get("param_names") for g in groups] != names:
        raise UserError(f"the optimizer's state in {path} is not that of these options, or of an earlier version: resume "
                        f"with the options that the run was started with, or start from its weights, --init_from={path} "
                        "with another --out_dir")


def to_file_names(state_dict):
    """A KronyGPT's state dict under the published names, contiguous."""
    renamed = {}
    for name, p in state_dict.items():
        stem, part = match.groups() if (match := IN_MEMORY.fullmatch(name)) else (name, None)
        is_dense_attention = ".attn." in stem and state_dict.get(f"{stem}.B", p).shape == (1, 1, 1)
        if part and not is_dense_attention:
            renamed[stem + {"A": "_0", "B": "_1", "bias": "_bias"}[part]] = p
        elif part == "A":
            renamed[f"{stem}.weight"] = p[0].T  # [out, in], as nn.Linear has it
        elif part != "B":
            renamed[name] = p
    return {name: p.contiguous() for name, p in renamed.items()}


def from_file_names(state_dict):
    """A KronyGPT's state dict from one under the published names, or from nanoGPT's dense one."""
    renamed = {}
    for name, p in state_dict.items():
        stem, part = match.groups() if (match := IN_FILE.fullmatch(name)) else (name, None)
        if not part:
            renamed[name] = p
        elif part == ".weight":  # a dense nn.Linear, [out, in]
            renamed |= dense_matrix(stem, p.t())
        else:
            renamed[stem + {"_0": ".A", "_1": ".B", "_bias": ".bias", ".bias": ".bias"}[part]] = p
    return renamed


def from_transformers_names(state_dict):
    """A KronyGPT's state dict from that of transformers' GPT-2, whose Conv1D weights are [in, out]."""
    renamed = {}
    for name, p in state_dict.items():
        match = IN_FILE.fullmatch(name)
        if not name.endswith(MASKS):
            renamed |= dense_matrix(match[1], p) if match and match[2] == ".weight" else {name: p}
    return renamed


def dense_matrix(stem, W):
    return {f"{stem}.A": W.contiguous()[None], f"{stem}.B": W.new_ones(1, 1, 1)}


def upgrade_state_dict(state_dict):
    """Convert the state dict of any file to that of a KronyGPT: stacked factors, all biases, contiguous float32."""
    state_dict = {name: p.float() for name, p in state_dict.items() if not name.endswith(MASKS)}
    sides = {}  # {(c_fc or c_proj of a layer, side): {factor: tensor}}
    for name in list(state_dict):
        if match := UNSTACKED.fullmatch(name):
            stem, factor, side = match.groups()
            sides.setdefault((stem, side), {})[int(factor)] = state_dict.pop(name)
    for (stem, side), by_factor in sides.items():
        if sorted(by_factor) != list(range(len(by_factor))):
            raise ValueError(f"{stem} has the factors {sorted(by_factor)}, and some in between are missing")
        state_dict[f"{stem}_{side}"] = torch.stack([by_factor[f] for f in range(len(by_factor))])
    state_dict = {name: p.contiguous() for name, p in from_file_names(state_dict).items()}

    wte = state_dict["transformer.wte.weight"]
    state_dict.setdefault("lm_head.weight", wte)
    for name, p in list(state_dict.items()):  # biases that an old file lacks were zero
        if name.endswith(".B") and (A := state_dict.get(f"{name[:-1]}A")) is not None:
            if p.shape == (1, 1, 1):  # A ⊗ [[b]] is b A
                state_dict |= {f"{name[:-1]}A": A * p, name: torch.ones_like(p)}
            state_dict.setdefault(f"{name[:-1]}bias", wte.new_zeros(A.shape[2] * p.shape[2]))
        elif name.endswith((".ln_1.weight", ".ln_2.weight", ".ln_f.weight")):
            state_dict.setdefault(name.replace("weight", "bias"), torch.zeros_like(p))
    return state_dict


def infer_model_args(state_dict):
    """The fields of KronyGPTConfig that the shapes of a KronyGPT's state dict tell; heads are 64 wide, as GPT-2's."""
    vocab_size, n_embd = state_dict["transformer.wte.weight"].shape
    n_layer = len({name.split(".")[2] for name in state_dict if name.startswith("transformer.h.")})
    shapes = {}
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        factors = [state_dict[f"transformer.h.{layer}.{name}.A"] for layer in range(n_layer)]
        shapes[name] = [(dim_1, dim_2, r) for r, dim_1, dim_2 in (A.shape for A in factors)]
    n_inner = shapes["mlp.c_fc"][0][1] * state_dict["transformer.h.0.mlp.c_fc.B"].shape[2]
    return dict(block_size=len(state_dict["transformer.wpe.weight"]), vocab_size=vocab_size, n_layer=n_layer,
                n_head=max(1, n_embd // GPT2_HEAD_DIM), n_embd=n_embd, n_inner=n_inner, shapes=shapes)
