"""Every file format of a model, in and out: checkpoints (.pt) of every age, Hugging Face files and hub names.

A checkpoint that we write is a dict of plain types and tensors: `model` (a state dict), `model_args` (the fields of
KronyGPTConfig), `optimizer` (a state dict or None), `iter_num`, `best_val_loss` and `config` (the script's options).
Its tensors have the published names of Krony-PT: a factored matrix is `<name>_0` (A), `<name>_1` (B) and `<name>_bias`,
always so in the MLP; a dense attention matrix is `<name>.weight` [out, in] and `<name>.bias`. An embedding of low rank is
`<name>.A` [r, rows, 1] and `<name>.B` [r, 1, C]; a staircase is as in model.Embedding. Each rank is stored once: in a side
[m, r] of low rank, r rows are an identity, `<name>_pivots` [r] tells which, and the file holds the others. Beside an
optimizer's state, both sides are whole. load() also takes

- the published Krony-PT files: a bare state dict with the same names;
- older ones, with each factor by itself: c_fc_{f}_{k} and c_proj_{f}_{k} for side k of factor f, perhaps no MLP biases;
- dense checkpoints of nanoGPT and other programs, whose weights may lie deeper in the file, under prefixes of wrappers;
- transformers' GPT-2: a directory, or a .safetensors or .bin file of it;
- the directories of kron_to_gpt.py --compressed=True, whose low-rank matrices are nn.Linear, `<name>.down` and `<name>.up`,
  or `<name>.A` and `<name>.B` in older ones, and whose Kronecker shapes are `<name>.A` and `<name>.B`. Weights in int8 have
  their scales in `<name>_scale`.

A model is data, and loading it never runs code: .pt and .bin files are read with torch.load(weights_only=True), and
config.json and safetensors directly, without transformers.
"""
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from kronygpt.configurator import UserError
from kronygpt.files import atomic_write
from kronygpt.hub import WEIGHTS, download
from kronygpt.kron import column_side, others, whole_column, with_identity, without_identity
from kronygpt.tokenizer import check_no_pointer, read_json, tokenizer_record
from model import KINDS, KronyGPT

MODELS_DIR = Path("models")
GPT2_HEAD_DIM = 64  # n_embd / n_head in GPT-2 small, medium, large and xl
# what a file may hold beside a model
DEFAULTS = dict(optimizer=None, scaler=None, iter_num=0, best_val_loss=float("inf"), config={})
MODEL_KEYS = ("", "model", "state_dict", "model_state_dict", "net")  # of several models in a file, the one there is taken
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LAST_NORM = "ln_f.weight"  # in every GPT-2: what stands before it is the prefix of all weights
DERIVED = (".attn.bias", ".attn.masked_bias",  # the causal mask, which older files hold
           ".attn.places", ".attn.v_places")  # of heads in a compressed export
# the module and the part that the name of a tensor joins: transformer.h.0.mlp.c_fc and 0, or up.weight, or bias
MODULE = re.compile(rf"(transformer\.(?:wte|wpe|ln_f|h\.\d+\.(?:ln_1|ln_2|{'|'.join(KINDS)}))|lm_head)[._](.+)")
PUBLISHED = {"A": "_0", "B": "_1", "bias": "_bias", "pivots": "_pivots"}  # the endings of a factored matrix in a file
IN_MEMORY = {"0": "A", "1": "B", "up.bias": "bias"}  # other parts of a matrix keep their names, or become A and B
INDICES = ("pivots", "order", "row", "start", "columns")  # parts that are whole numbers
TIED_RTOL, TIED_ATOL = 2**-8, 1e-6  # the rounding of half precision: an output matrix nearer to the embedding is tied
COMPRESSED_TYPE = "kronygpt"  # model_type of modeling_kronygpt.py: factors that are not expanded
FUNCTION = {  # fields of a GPT-2's config.json that change its function: the default, and what computes the same
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "quantization_config": (None,)}


def save(path, model, optimizer=None, iter_num=0, best_val_loss=float("inf"), config=None, scaler=None):
    """Write a checkpoint of a KronyGPT atomically. An optimizer and a GradScaler are there for a resume, best_val_loss is in
    nats per token, and config is {option: value} of the script that writes it."""
    state_dict = to_file_names(model.state_dict(), ranks_once=not optimizer)
    content = dict(model=state_dict, model_args=model.config.as_plain_types(),
                   optimizer=optimizer.state_dict() if optimizer else None, iter_num=iter_num, best_val_loss=best_val_loss,
                   config=config or {}, **({"scaler": scaler.state_dict()} if scaler else {}))
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # where a disk is full; the system's own error is behind it
            raise error.__context__ or error from None


def load(source, dropout=0.0, as_stored=False):
    """Load a model from anywhere.

    Args:
        source: a .pt, .bin or .safetensors file, a Hugging Face GPT-2 directory, a directory with a ckpt.pt, a name under
            models/, or a hub name (gpt2, gpt2-medium, ...).
        dropout: of the model; checkpoints keep none.
        as_stored: leave low rank as the file has it, without an identity: loaded and run faster, but not for training.
            Otherwise its two sides are balanced.

    Returns:
        (model, rest): a KronyGPT in float32 on the CPU, and what else the file held, as it is there: `optimizer`,
        `scaler`, `iter_num`, `best_val_loss` and `config` (None, None, 0, inf and {} where it held none).

    Raises:
        FileNotFoundError: there is nothing of this name.
        UserError: it could not be read as a model; says what and why.
    """
    path = locate(str(source))
    try:
        tensors, content = read(path)
        stated = stated_fields(content)
        modules = by_module(plain_names(tensors))
        if not ("shapes" in stated or "dim_1" in stated or is_conv1d(modules)):  # dim_1: the first edition
            warnings.warn(f"{path} is a file of nanoGPT or Krony-PT, which compute the exact GELU; here it is GPT-2's tanh "
                          "form, and logits differ by up to 1e-3", stacklevel=2)
        state_dict = upgrade(modules, as_stored)
        model = KronyGPT.from_state_dict(dict(infer(state_dict, stated), dropout=dropout), state_dict)
        for name, p in model.named_parameters():
            if not torch.stack(p.detach().aminmax()).isfinite().all():  # one pass, and nothing as large as the weights
                raise ValueError(f"its weights are not finite: {name}")
    except (OSError, MemoryError, UserError):
        raise
    except Exception as error:  # bytes of other programs can make torch raise anything
        reason = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be loaded: {reason or type(error).__name__}") from error
    return model, {name: content.get(name, default) for name, default in DEFAULTS.items()}


# ----------------------------------------------------------------------------------------------------------------------
# locate and read

def locate(source):
    """The path of a file or a Hugging Face directory for what load() takes."""
    path = next((p for p in (Path(source), MODELS_DIR / source) if p.exists()), None)
    if path is None and not looks_like_hub_name(source):
        raise FileNotFoundError(f"no checkpoint or export {source}: train.py, kron_decompose.py, prune.py and "
                                "kron_to_gpt.py make them")
    path = path or download(source)
    is_run = path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists()
    return path / "ckpt.pt" if is_run else path


def looks_like_hub_name(source):
    """gpt2 or org/name: a hub name has at most one slash, and is no path to a file of weights."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and not source.endswith((".pt", ".bin", ".safetensors"))


def read(path):
    """{name: tensor} of all that lies in a file or a directory, and what a file says beside it."""
    directory = path if path.is_dir() else path.parent
    if not path.is_dir() and not (path.name in WEIGHTS and (directory / "config.json").exists()):
        content = read_file(path)
        return flatten(content), content
    config = read_json(directory / "config.json")
    if config.get("model_type", "gpt2") not in ("gpt2", COMPRESSED_TYPE):
        raise ValueError(f"its config.json says model_type={config['model_type']}, where gpt2 is needed")
    n_head = config.get("num_attention_heads", 12)  # the default of transformers
    if path.is_dir():
        path = next((path / name for name in WEIGHTS if (path / name).exists()), path / WEIGHTS[0])
    files, tensors = [path], {}
    if path.suffix == ".json":
        files = [path.with_name(shard) for shard in sorted(set(read_json(path)["weight_map"].values()))]
    for file in files:
        tensors |= read_file(file)
    return flatten(tensors), dict(model_args={"n_head": n_head, **config, "tokenizer": tokenizer_record(directory)})


def read_file(path):
    """The content of a file of torch.save or safetensors, which runs no code; checksums of a .pt file are compared."""
    check_no_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):  # of pickles that are refused in any case
            is_zip = zipfile.is_zipfile(file)
            if is_zip and (record := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"the checksum of {record} is wrong")
            file.seek(0)
            # torch opens a file by its name to map it, and a run may have replaced it by then: this name is of the open file
            name = f"/proc/self/fd/{file.fileno()}"
            mmap = is_zip and os.path.exists(name)
            return torch.load(name if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError("it is not a file of torch.save, or it holds more than tensors and plain types and is not "
                         "loaded, because it could run code") from error
    except (MemoryError, FileNotFoundError, PermissionError, ValueError):
        raise
    except Exception as error:  # torch's own words are as far off as "Invalid argument"
        raise ValueError(f"{path.name} is truncated or damaged: {error}") from error


def flatten(content, prefix=""):
    """{name: tensor} of the tensors in nested dicts: keys are joined by dots."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
    return tensors


def stated_fields(content):
    """What a file says about its model: `model_args`, and the widths of a compressed export in it. The number of heads and
    the tokenizer may be in `config`: nanoGPT repeats the one there, and the second edition kept the other. ValueError where
    a KronyGPT computes another function."""
    stated, config = (value if isinstance(value := content.get(key), dict) else {} for key in ("model_args", "config"))
    for name, values in FUNCTION.items():
        said = stated.get(name, config.get(name, values[0]))
        if said not in values:
            raise ValueError(f"its config says {name}={said}, where {values[0]} is needed")
    return {"n_head": config.get("n_head"), "tokenizer": config.get("tokenizer"), **stated, **(stated.get("widths") or {})}


# ----------------------------------------------------------------------------------------------------------------------
# from a file's tensors to a KronyGPT's

def plain_names(tensors):
    """Tensors of the model in a file under GPT-2's names, transformer.* and lm_head.weight, without prefixes. What else has
    the model's prefix, such as the head of a classifier, is left out with a warning. Causal masks, and what has another
    prefix, such as an optimizer's state, are left out."""
    named = {".".join(part for part in name.split(".") if part not in WRAPPERS): p for name, p in tensors.items()}
    roots = sorted({name.removesuffix(LAST_NORM).removesuffix("transformer.") for name in named if name.endswith(LAST_NORM)})
    usual = [root for root in roots if root.partition(".")[0] in MODEL_KEYS]
    if not roots:
        raise ValueError(f"it holds no weights of a GPT-2 (no {LAST_NORM}), but {', '.join([*named][:20]) or 'nothing'}")
    if len(roots) > 1 and len(usual) != 1:
        raise ValueError(f"it holds several models ({', '.join(roots)}): save one of them by itself")
    root, result, left_out = (usual or roots)[0], {}, []
    for name, p in named.items():
        if not name.startswith(root):
            continue
        plain = name.removeprefix(root)
        if plain.partition(".")[0] in ("wte", "wpe", "h", "ln_f"):
            plain = f"transformer.{plain}"
        if not plain.startswith(("transformer.", "lm_head.")):
            left_out.append(name)
        elif not name.endswith(DERIVED):
            result[plain] = p
    if left_out:
        warnings.warn(f"left out {len(left_out)} tensors that are no part of a GPT-2 language model, such as {left_out[0]}",
                      stacklevel=3)
    return result


def by_module(tensors):
    """{module: {part: tensor}} of tensors under GPT-2's names."""
    modules = {}
    for name, p in tensors.items():
        module, part = match.groups() if (match := MODULE.fullmatch(name)) else name.rsplit(".", 1)
        modules.setdefault(module, {})[part] = p
    return modules


def is_conv1d(modules):
    """Whether dense weights are [in, out], as in transformers' GPT-2 and older exports, and not those of an nn.Linear."""
    if any("A" in parts for module, parts in modules.items() if module.endswith(KINDS)):
        return True
    n_embd = len(modules["transformer.ln_f"]["weight"])
    weight = modules.get("transformer.h.0.attn.c_attn", {}).get("weight")
    return weight is not None and len(weight) == n_embd != weight.shape[1]


def upgrade(modules, as_stored=False):
    """The state dict of a KronyGPT, contiguous float32 in memory of its own, from the {module: {part: tensor}} of any file.
    Parts that are not known stay, and no KronyGPT takes them."""
    tie(modules)
    transposed, state_dict = not is_conv1d(modules), {}
    for module, parts in modules.items():
        dequantize(module, parts)
        if module.endswith(KINDS):
            parts = read_matrix(parts, transposed, as_stored)
        elif "A" in parts:
            parts = read_embedding(parts, as_stored)
        elif ".ln_" in module:
            parts.setdefault("bias", torch.zeros_like(parts["weight"]))  # which an old file lacks
        for part, p in parts.items():
            state_dict[f"{module}.{part}"] = p.to(torch.float32 if p.is_floating_point() else torch.long, copy=True,
                                                  memory_format=torch.contiguous_format)
    return state_dict


def tie(modules):
    """Make one entry of embedding and output matrix, which may be there twice or under either name; ValueError where they
    differ."""
    embedding = modules.setdefault("transformer.wte", {})
    if "A" in embedding or "weight" not in modules.get("lm_head", {}):
        return
    head = modules["lm_head"].pop("weight")
    weight = embedding.setdefault("weight", head)
    if head.data_ptr() != weight.data_ptr() and not (head.shape == weight.shape and torch.allclose(
            head.float(), weight.float(), TIED_RTOL, TIED_ATOL, equal_nan=True)):
        raise ValueError("it has an output matrix (lm_head.weight) that differs from its embedding, and a KronyGPT has one "
                         "matrix for both: tie them and train further, with the program that made it")


def dequantize(module, parts):
    """Multiply the parts of a module that are int8 by their scales; ValueError where numbers are not real ones."""
    for part in [part for part in parts if f"{part}_scale" in parts]:
        scale = parts.pop(f"{part}_scale")
        parts[part] = parts[part] * (scale if parts[part].dim() > 1 else scale[owners(parts["row"], parts["columns"]), 0])
    for part, p in parts.items():
        if not p.is_floating_point() and part not in INDICES:
            raise ValueError(f"{module}.{part} holds no real numbers but {p.dtype}")


def owners(row, columns):
    """The token to which each number of A belongs in a modeling_kronygpt.FactoredEmbedding."""
    tokens = row.argsort()
    return tokens.repeat_interleave(columns[tokens])


def read_matrix(parts, transposed, as_stored):
    """A [r, m1, n1], B [r, m2, n2], bias [n1 n2] and perhaps order of a KronLinear from the parts of a matrix in a file.
    With transposed, a dense weight is [out, in]. With pivots or order, one side of low rank lacks an identity."""
    parts = {IN_MEMORY.get(part, part): p for part, p in parts.items()}
    if "0_0" in parts:  # of the oldest files
        factors = range(sum(part.endswith("_0") for part in parts))
        for side, name in enumerate("AB"):
            parts[name] = torch.stack([parts.pop(f"{f}_{side}") for f in factors])
    elif "down.weight" in parts:
        parts |= dict(A=parts.pop("down.weight")[:, :, None], B=parts.pop("up.weight").T[:, None])
    elif "up.weight" in parts:
        parts |= dict(A=parts.pop("up.weight").T[None], B=torch.ones(1, 1, 1))
    elif "weight" in parts:
        W = parts.pop("weight")
        parts |= dict(A=(W.T if transposed else W)[None], B=torch.ones(1, 1, 1))
    if "A" not in parts or "B" not in parts:
        return parts  # infer() says what is missing
    A, B = parts["A"].float(), parts["B"].float()
    if "order" in parts:
        parts["pivots"] = parts.pop("order")[:len(A)].long()
    if "pivots" in parts:
        pivots = parts.pop("pivots")
        if as_stored:
            m = len(pivots) + (A if column_side(A.shape, B.shape) == "A" else B).shape[1]
            parts["order"] = torch.cat((pivots, others(pivots, m)))
        else:
            A, B = without_identity(A, B, pivots)
    if B.shape == (1, 1, 1):  # A ⊗ [[b]] is b A
        A, B = A * B, torch.ones_like(B)
    return {"bias": B.new_zeros(A.shape[2] * B.shape[2]), **parts, "A": A, "B": B}


def read_embedding(parts, as_stored):
    """A, B and perhaps row of a factored model.Embedding. A low-rank one in a file is A [r, rows, 1] and B [r, 1, C], which
    with pivots [r] lacks an identity. In an export, A is flat, and `row`, `start` and `columns` tell where each token is."""
    A, B = parts.pop("A").float(), parts.pop("B").float()
    if "columns" in parts:
        columns, _ = parts.pop("columns"), parts.pop("start")
        if not columns.min():  # of the tokens whose vectors are a row of B each
            parts["pivots"] = parts.pop("row").argsort()[:len(B)]
            A, B = A.view(-1, len(B)).T[:, :, None], B[:, None]
    if "pivots" in parts and as_stored:
        A, B = whole_column(A, parts.pop("pivots")).flatten(), B[:, 0]
    elif "pivots" in parts:
        A, B = without_identity(A, B, parts.pop("pivots"))
    if A.dim() == 3:
        A, B = A[:, :, 0].T.flatten(), B[:, 0]
    return dict(parts, A=A, B=B)


def infer(state_dict, stated):
    """The fields of KronyGPTConfig: sizes as the tensors have them, the number of heads and the tokenizer as the file says,
    or else heads of width 64, as in GPT-2."""
    n_embd = len(state_dict[f"transformer.{LAST_NORM}"])
    n_layer = len({name.split(".")[2] for name in state_dict if name.startswith("transformer.h.")})
    shapes, rows, columns = {}, {}, {}
    for kind in KINDS:
        A, B = zip(*(whole_shapes(state_dict, f"transformer.h.{layer}.{kind}") for layer in range(n_layer)))
        shapes[kind] = [(dim_1, dim_2, r) for r, dim_1, dim_2 in A]
        rows[kind], columns[kind] = ([a[side] * b[side] for a, b in zip(A, B)] for side in (1, 2))
    bands = {name: stated.get(name) or [state_dict[f"transformer.{name}.weight"].shape] for name in ("wte", "wpe")}
    vocab_size, block_size = (sum(n for n, _ in bands[name]) for name in ("wte", "wpe"))
    sizes = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd,
                 n_inner=columns["mlp.c_fc"])
    for name, size in sizes.items():
        if stated.get(name) not in (None, size) and [stated[name]] * n_layer != size:
            raise ValueError(f"it does not fit together: its config says {name}={stated[name]}, its weights {size}")
    n_head = stated["n_head"]
    if n_head is None:
        n_head = max(1, n_embd // GPT2_HEAD_DIM)
        warnings.warn(f"the file does not say its number of heads: {n_head} of width {n_embd // n_head} taken", stacklevel=3)
    head_v = stated.get("head_v") or [width // n_head for width in rows["attn.c_proj"]]
    head_qk = stated.get("head_qk") or [(width // n_head - v) // 2 for width, v in zip(columns["attn.c_attn"], head_v)]
    return dict(sizes, **bands, n_head=n_head, head_qk=head_qk, head_v=head_v, head_dim=stated.get("head_dim"),
                shapes=shapes, tokenizer=stated["tokenizer"])


def whole_shapes(state_dict, name):
    """The shapes of both sides of a KronLinear, which may lack an identity in its column."""
    A, B = (state_dict[f"{name}.{side}"].shape for side in "AB")
    if f"{name}.order" in state_dict:
        m = len(state_dict[f"{name}.order"])
        A, B = ((A[0], m, 1), B) if column_side(A, B) == "A" else (A, (B[0], m, 1))
    return A, B


# ----------------------------------------------------------------------------------------------------------------------
# from a KronyGPT's tensors to a file's

def stored_parts(state_dict, ranks_once):
    """{module: {part: tensor}} of a KronyGPT's state dict. With ranks_once, low-rank sides lack an identity, which `pivots`
    places, and an embedding of low rank is A [r, rows - r, 1] and B [r, 1, C]; without, A is [r, rows, 1]."""
    modules = by_module(state_dict)
    for module, parts in modules.items():
        if "A" in parts and "row" not in parts:  # a staircase has neither of these forms
            if "order" in parts:
                parts["pivots"] = parts.pop("order")[:len(parts["A"])]
                continue
            A, B = parts["A"], parts["B"]
            if not module.endswith(KINDS):
                A, B = A.view(-1, len(B)).T[:, :, None], B[:, None]
            A, B, pivots = with_identity(A, B) if ranks_once else (A, B, None)
            parts |= dict(A=A, B=B) if pivots is None else dict(A=A, B=B, pivots=pivots)
    return modules


def to_file_names(state_dict, ranks_once=False):
    """A KronyGPT's state dict under the published names, contiguous; with ranks_once, each rank is there once."""
    result = {}
    for module, parts in stored_parts(state_dict, ranks_once).items():
        is_matrix, names = module.endswith(KINDS), {}
        if is_matrix and ".attn." in module and parts["B"].shape == (1, 1, 1):
            parts = dict(weight=parts["A"][0].T, bias=parts["bias"])  # [out, in], as nn.Linear has it
        elif is_matrix:
            names = PUBLISHED
        for part, p in parts.items():
            result[module + names.get(part, f".{part}")] = p.contiguous()
    if "transformer.wte.weight" in result:
        result["lm_head.weight"] = result["transformer.wte.weight"]  # the same memory, so once in the file
    return result


# ----------------------------------------------------------------------------------------------------------------------
# a run that is resumed

def load_optimizer_state(optimizer, state, path):
    """Give an AdamW with named parameters the steps and moments in the state_dict() of another one. The options of its
    groups (learning rates, weight decay, betas) stay, as a run that is resumed may have others than before.

    Raises:
        UserError: the checkpoint `path` has no moments, those of other parameters, or some of another shape: the fused step
            would write beyond them.
    """
    own, state = optimizer.state_dict(), state or {"param_groups": [], "state": {}}
    names, found_names = ([group.get("param_names") for group in s["param_groups"]] for s in (own, state))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {i: [p.shape, p.shape] for i, p in enumerate(parameters)}
    found = {i: [moments[key].shape for key in ("exp_avg", "exp_avg_sq")] for i, moments in state["state"].items()}
    if names != found_names or found not in ({}, shapes):  # a run that has made no step has none
        raise UserError(f"{path} cannot be resumed: it holds no optimizer's state of this model. Start from its weights, "
                        f"--init_from={path} with another --out_dir")
    optimizer.load_state_dict(dict(own, state=state["state"]))
