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
- the directories of kron_to_gpt.py --compressed=True, whose factors are `<name>.A` and `<name>.B`.

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
from kronygpt.kron import column_side, with_identity, without_identity
from kronygpt.tokenizer import check_no_pointer, read_json, tokenizer_record
from model import KINDS, KronyGPT

MODELS_DIR = Path("models")
GPT2_HEAD_DIM = 64  # n_embd / n_head in GPT-2 small, medium, large and xl
GPT2_WIDTHS = (768, 1024, 1280, 1600)
# what a file may hold beside a model
DEFAULTS = dict(optimizer=None, scaler=None, iter_num=0, best_val_loss=float("inf"), config={})
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")  # of several dicts of weights, the first is taken
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MATRIX = r"(transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))"
IN_MEMORY = re.compile(MATRIX + r"\.(A|B|bias|pivots)")
IN_FILE = re.compile(MATRIX + r"(_0|_1|_bias|_pivots|\.weight|\.bias)")
UNSTACKED = re.compile(r"(.*\.mlp\.c_(?:fc|proj))_(\d+)_([01])")
PIVOTS = ("_pivots", ".pivots", ".order")  # places of an identity in a low-rank matrix
INDICES = (*PIVOTS, ".row", ".start", ".columns")  # tensors of whole numbers
EMBEDDINGS = ("transformer.wte.", "transformer.wpe.")
DERIVED = (".attn.bias", ".attn.masked_bias",  # the causal mask, which older files hold
           ".attn.places", ".attn.v_places")  # of heads in a compressed export
LAST_NORM = "ln_f.weight"  # in every GPT-2: where it is, the weights are
EMBEDDING, FACTORED, HEAD = "transformer.wte.weight", "transformer.wte.A", "lm_head.weight"
TIED_RTOL, TIED_ATOL = 2**-8, 1e-6  # the rounding of half precision: an output matrix nearer to the embedding is tied
COMPRESSED_TYPE = "kronygpt"  # model_type of modeling_kronygpt.py: factors that are not expanded
FUNCTION = {  # fields of a GPT-2's config.json that change its function: the default, and what computes the same
    "model_type": ("gpt2", COMPRESSED_TYPE), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,), "quantization_config": (None,)}
GPT2_DEFAULTS = dict({name: values[0] for name, values in FUNCTION.items()}, n_head=12, tie_word_embeddings=True)
ALIASES = {"n_positions": "block_size", "max_position_embeddings": "block_size", "hidden_size": "n_embd",
           "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


def save(path, model, optimizer=None, iter_num=0, best_val_loss=float("inf"), config=None, scaler=None):
    """Write a checkpoint atomically.

    Args:
        path: of the .pt file; its folder is made.
        model: a KronyGPT.
        optimizer: whose state is kept for a resume, or None.
        iter_num: optimizer steps done.
        best_val_loss: in nats per token.
        config: {option: value} of the script that writes it.
        scaler: a GradScaler whose state is kept for a resume, or None.
    """
    state_dict = with_matrices(model.state_dict())
    if not optimizer:
        state_dict = with_identities(state_dict)
    content = dict(model=to_file_names(state_dict), model_args=model.config.as_plain_types(),
                   optimizer=optimizer.state_dict() if optimizer else None, iter_num=iter_num, best_val_loss=best_val_loss,
                   config=config or {}, **({"scaler": scaler.state_dict()} if scaler else {}))
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # where a disk is full; the system's own error is behind it
            raise error.__context__ or error from None


def load(source, dropout=0.0):
    """Load a model from anywhere.

    Args:
        source: a .pt, .bin or .safetensors file, a Hugging Face GPT-2 directory, a directory with a ckpt.pt, a name under
            models/, or a hub name (gpt2, gpt2-medium, ...).
        dropout: of the model; checkpoints keep none.

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
        state_dict = upgrade(tensors)
        model_args = infer(state_dict, content)
        model = KronyGPT.from_state_dict(dict(model_args, dropout=dropout), state_dict)
        check(model)
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
        raise FileNotFoundError(f"no checkpoint {source}: train.py, kron_decompose.py and prune.py make them")
    path = path or download(source)
    is_run = path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists()
    return path / "ckpt.pt" if is_run else path


def looks_like_hub_name(source):
    """gpt2 or org/name: a hub name has at most one slash, and is no path to a file of weights."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and not source.endswith((".pt", ".bin", ".safetensors"))


def read(path):
    """{name: tensor} of a model in a file or a directory, and all that lies beside it."""
    directory = path if path.is_dir() else path.parent
    if path.is_dir() or (path.name in WEIGHTS and (directory / "config.json").exists()):
        config, tensors = read_config(directory), {}
        for file in weight_files(path):
            tensors |= read_file(file)
        tensors = find_weights(tensors)
        if not config["tie_word_embeddings"] and not any(name.endswith((HEAD, FACTORED)) for name in tensors):
            raise ValueError(f"its config.json says tie_word_embeddings=false, and it lacks {HEAD}")
        return tensors, dict(model_args=dict(config, tokenizer=tokenizer_record(directory)))
    content = read_file(path)
    tensors = find_weights(content)
    warn_of_exact_gelu(content, tensors, path)
    return tensors, content


def read_config(directory):
    """The fields of a Hugging Face GPT-2's config.json, defaults included; ValueError where a KronyGPT computes another
    function."""
    if not (directory / "config.json").exists():
        raise ValueError("it holds no model: neither config.json (Hugging Face) nor ckpt.pt")
    config = read_json(directory / "config.json")
    config = GPT2_DEFAULTS | {ALIASES.get(name, name): value for name, value in config.items()}
    for name, values in FUNCTION.items():
        if config[name] not in values:
            raise ValueError(f"its config.json says {name}={config[name]}, where {values[0]} is needed")
    return config


def weight_files(path):
    """The files with the tensors of a Hugging Face model: of a directory, or behind one of WEIGHTS in it."""
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).exists()]
        if not found:
            raise ValueError(f"it has no weights: none of {', '.join(WEIGHTS)}")
        path = found[0]
    if path.suffix != ".json":
        return [path]
    return [path.with_name(shard) for shard in sorted(set(read_json(path)["weight_map"].values()))]


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
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        message = str(error).partition("\n")[0]
        raise ValueError(f"{path.name} is truncated or damaged ({message or type(error).__name__})") from error


def find_weights(content):
    """The dict with the weights of a GPT-2 in the content of a file, at whatever depth."""
    level = {"": content}
    while level:
        found = {key: part for key, part in level.items() if any(str(name).endswith(LAST_NORM) for name in part)}
        if found:
            key = next(key for key in (*MODEL_KEYS, *found) if key in found)
            if len(found) > 1 and key not in MODEL_KEYS:
                raise ValueError(f"it holds several models ({', '.join(map(str, found))}): save one of them by itself")
            return {name: p for name, p in found[key].items() if isinstance(p, torch.Tensor)}
        level = {key: value for part in level.values() for key, value in part.items() if isinstance(value, dict)}
    keys = ", ".join(str(key) for key in list(content)[:20]) or "nothing"
    raise ValueError(f"it holds no weights of a GPT-2 (no {LAST_NORM}), but {keys}")


def warn_of_exact_gelu(content, tensors, path):
    """Warn of a file of nanoGPT or Krony-PT: their GELU is the exact one, where GPT-2's and KronyGPT's is the tanh form."""
    stated = content.get("model_args") or {}
    is_ours = "shapes" in stated or "dim_1" in stated  # dim_1: the first edition
    if not is_ours and any(".mlp.c_fc" in name for name in tensors) and not is_conv1d(tensors):
        warnings.warn(f"{path} is a file of nanoGPT or Krony-PT, which compute the exact GELU; here it is GPT-2's tanh "
                      "form, and logits differ by up to 1e-3", stacklevel=4)


# ----------------------------------------------------------------------------------------------------------------------
# upgrade, infer, check

def upgrade(tensors):
    """Convert the state dict of any file to that of a KronyGPT: stacked factors, all biases, one matrix for embedding and
    output, contiguous float32 in memory of its own."""
    state_dict = plain_names(tensors)
    tie(state_dict)
    state_dict = without_identities(from_export(from_file_names(stack_factors(state_dict))))
    for name, p in list(state_dict.items()):  # biases that an old file lacks were zero
        if name.endswith(".B") and name.startswith("transformer.h."):
            stem, A = name[:-2], state_dict[f"{name[:-1]}A"]
            if p.shape == (1, 1, 1):  # A ⊗ [[b]] is b A
                state_dict |= {f"{stem}.A": A.float() * p, name: torch.ones_like(p)}
            state_dict.setdefault(f"{stem}.bias", p.new_zeros(A.shape[2] * p.shape[2]))
        elif name.endswith((".ln_1.weight", ".ln_2.weight", ".ln_f.weight")):
            state_dict.setdefault(name.replace("weight", "bias"), torch.zeros_like(p))
    return {name: p.to(torch.long if name.endswith(INDICES) else torch.float32, memory_format=torch.contiguous_format,
                       copy=True) for name, p in without_matrices(state_dict).items()}


def plain_names(tensors):
    """Tensors under GPT-2's names, transformer.* and lm_head.weight, without the prefixes of wrappers. What lies outside of
    the model, such as the head of a classifier, is left out with a warning, and so are causal masks without one."""
    named = {".".join(part for part in name.split(".") if part not in WRAPPERS): p for name, p in tensors.items()}
    roots = {name.removesuffix(LAST_NORM).removesuffix("transformer.") for name in named if name.endswith(LAST_NORM)}
    if len(roots) > 1:
        raise ValueError(f"it holds several models, under the prefixes {', '.join(sorted(roots))}")
    root, result, left_out = roots.pop(), {}, []
    for name, p in named.items():
        plain = name.removeprefix(root)
        if plain.partition(".")[0] in ("wte", "wpe", "h", "ln_f"):
            plain = f"transformer.{plain}"
        if not name.startswith(root) or not plain.startswith(("transformer.", "lm_head.")):
            left_out.append(name)
        elif not name.endswith(DERIVED):
            if not p.is_floating_point() and not name.endswith(INDICES):
                raise ValueError(f"{name} holds no real numbers but {p.dtype}")
            result[plain] = p
    if left_out:
        warnings.warn(f"left out {len(left_out)} tensors that are no part of a GPT-2 language model, such as {left_out[0]}",
                      stacklevel=4)
    return result


def tie(state_dict):
    """Make one entry of embedding and output matrix, which may be there twice or under either name; ValueError where they
    differ."""
    if FACTORED in state_dict:
        return
    head = state_dict.pop(HEAD, state_dict.get(EMBEDDING))
    embedding = state_dict.setdefault(EMBEDDING, head)
    if head is None:
        raise KeyError(EMBEDDING)
    if head.data_ptr() == embedding.data_ptr():
        return
    if head.shape != embedding.shape or not torch.allclose(head.float(), embedding.float(), TIED_RTOL, TIED_ATOL, True):
        raise ValueError("it has an output matrix (lm_head.weight) that differs from its embedding, and a KronyGPT has one "
                         "matrix for both: tie them and train further, with the program that made it")


def stack_factors(state_dict):
    """Stack the factors of the oldest files, which have each by itself."""
    result, sides = {}, {}  # sides: {name: {factor: tensor}}
    for name, p in state_dict.items():
        if match := UNSTACKED.fullmatch(name):
            stem, factor, side = match.groups()
            sides.setdefault(f"{stem}_{side}", {})[int(factor)] = p
        else:
            result[name] = p
    return result | {name: torch.stack([factors[f] for f in range(len(factors))]) for name, factors in sides.items()}


def with_matrices(state_dict):
    """A KronyGPT's state dict with embeddings of low rank as low-rank matrices, A [r, rows, 1] and B [r, 1, C]."""
    result = dict(state_dict)
    for stem in EMBEDDINGS:
        if f"{stem}A" in state_dict and f"{stem}row" not in state_dict:
            B = state_dict[f"{stem}B"]
            result |= {f"{stem}A": state_dict[f"{stem}A"].view(-1, len(B)).T.unsqueeze(2), f"{stem}B": B.unsqueeze(1)}
    return result


def without_matrices(state_dict):
    """A KronyGPT's state dict from one that with_matrices() made."""
    result = dict(state_dict)
    for stem in EMBEDDINGS:
        if f"{stem}A" in state_dict and f"{stem}row" not in state_dict:
            A, B = state_dict[f"{stem}A"], state_dict[f"{stem}B"]
            result |= {f"{stem}A": A.squeeze(2).T.reshape(-1), f"{stem}B": B.squeeze(1)}
    return result


def from_export(state_dict):
    """Embeddings as with_identities() has them, from those of a compressed export, modeling_kronygpt.FactoredEmbedding."""
    result = dict(state_dict)
    for stem in EMBEDDINGS:
        if f"{stem}start" in state_dict:
            del result[f"{stem}start"]
            A, B, columns = result[f"{stem}A"], result[f"{stem}B"], result.pop(f"{stem}columns")
            if not columns.min():  # rows of the identity
                result |= {f"{stem}A": A.view(-1, len(B)).T.unsqueeze(2), f"{stem}B": B.unsqueeze(1),
                           f"{stem}pivots": result.pop(f"{stem}row").argsort()[:len(B)]}
    return result


def with_identities(state_dict):
    """A KronyGPT's state dict with low-rank matrices as kron.with_identity makes them: [r, m - r, 1] of the side with the
    columns, and pivots [r]."""
    result = dict(state_dict)
    for stem in [name[:-1] for name in state_dict if name.endswith(".A")]:
        A, B = state_dict[f"{stem}A"], state_dict[f"{stem}B"]
        side = column_side(A.shape, B.shape) if A.dim() == 3 else None  # a staircase has no identity
        column, row = (B, A) if side == "B" else (A, B)
        if side and column.shape[0] < column.shape[1] and row.shape[2] > 1:  # the sides of a column look alike
            pivots, rest, row = with_identity(column.squeeze(2).T, row.squeeze(1))
            column, row = rest.T.unsqueeze(2), row.unsqueeze(1)
            A, B = (row, column) if side == "B" else (column, row)
            result |= {f"{stem}A": A, f"{stem}B": B, f"{stem}pivots": pivots}
    return result


def without_identities(state_dict):
    """The whole matrices, balanced, of a state dict that with_identities() made."""
    result = dict(state_dict)
    for name in [name for name in state_dict if name.endswith(".order")]:  # of a compressed export
        stem = name.removesuffix("order")
        result[f"{stem}pivots"] = result.pop(name)[:len(state_dict[f"{stem}A"])].long()
    state_dict = dict(result)
    for stem in [name.removesuffix("pivots") for name in state_dict if name.endswith(".pivots")]:
        A, B, pivots = (state_dict[f"{stem}{name}"] for name in ("A", "B", "pivots"))
        side = column_side(A.shape, B.shape)
        rest, row = (B, A) if side == "B" else (A, B)
        column, row = without_identity(pivots, rest.squeeze(2).T.float(), row.squeeze(1).float())
        column, row = column.T.unsqueeze(2), row.unsqueeze(1)
        A, B = (row, column) if side == "B" else (column, row)
        result |= {f"{stem}A": A, f"{stem}B": B}
        del result[f"{stem}pivots"]
    return result


def to_file_names(state_dict):
    """A KronyGPT's state dict under the published names, contiguous."""
    renamed = {}
    for name, p in state_dict.items():
        stem, part = match.groups() if (match := IN_MEMORY.fullmatch(name)) else (name, None)
        is_dense_attention = ".attn." in stem and state_dict.get(f"{stem}.B", p).shape == (1, 1, 1)
        if part and not is_dense_attention:
            renamed[stem + {"A": "_0", "B": "_1", "bias": "_bias", "pivots": "_pivots"}[part]] = p
        elif part == "A":
            renamed[f"{stem}.weight"] = p[0].T  # [out, in], as nn.Linear has it
        elif part != "B":
            renamed[name] = p
    if EMBEDDING in renamed:
        renamed[HEAD] = renamed[EMBEDDING]  # the same memory, so once in the file
    return {name: p.contiguous() for name, p in renamed.items()}


def from_file_names(state_dict):
    """A KronyGPT's state dict from one under the published names, or from a dense one of nanoGPT or transformers."""
    renamed, transposed = {}, not is_conv1d(state_dict)
    for name, p in state_dict.items():
        stem, part = match.groups() if (match := IN_FILE.fullmatch(name)) else (name, None)
        if not part:
            new = {name: p}
        elif part == ".weight":
            new = {f"{stem}.A": (p.t() if transposed else p)[None], f"{stem}.B": p.new_ones(1, 1, 1)}
        else:
            new = {stem + {"_0": ".A", "_1": ".B", "_bias": ".bias", "_pivots": ".pivots", ".bias": ".bias"}[part]: p}
        if twice := new.keys() & renamed.keys():
            raise ValueError(f"{min(twice)} is there twice, under different names")
        renamed |= new
    return renamed


def is_conv1d(state_dict):
    """Whether dense weights are [in, out], as in transformers' GPT-2 and our class for it, and not those of an nn.Linear."""
    if any(IN_MEMORY.fullmatch(name) for name in state_dict if name.endswith(".A")):
        return True
    n_embd = next(len(p) for name, p in state_dict.items() if name.endswith(LAST_NORM))
    c_attn = next((p for name, p in state_dict.items() if name.endswith("h.0.attn.c_attn.weight")), None)
    return c_attn is not None and c_attn.dim() == 2 and c_attn.shape[0] == n_embd != c_attn.shape[1]


def infer(state_dict, content):
    """The fields of KronyGPTConfig: sizes as the tensors have them, the number of heads and the tokenizer as the rest of the
    file says, or else heads of width 64, as in GPT-2."""
    n_embd = len(state_dict[f"transformer.{LAST_NORM}"])
    n_layer = len({name.split(".")[2] for name in state_dict if name.startswith("transformer.h.")})
    shapes, rows, columns = {}, {}, {}
    for kind in KINDS:
        A, B = ([state_dict[f"transformer.h.{layer}.{kind}.{side}"].shape for layer in range(n_layer)] for side in "AB")
        shapes[kind] = [(dim_1, dim_2, r) for r, dim_1, dim_2 in A]
        rows[kind], columns[kind] = ([a[side] * b[side] for a, b in zip(A, B)] for side in (1, 2))
    stated = content.get("model_args")
    stated = stated if isinstance(stated, dict) else {}
    stated = stated | (stated.get("widths") or {})  # of a compressed export
    bands = {name: stated[name] if f"transformer.{name}.row" in state_dict else
             [E.shape] if (E := state_dict.get(f"transformer.{name}.weight")) is not None else
             [(state_dict[f"transformer.{name}.A"].numel() // (r := len(state_dict[f"transformer.{name}.B"])), r)]
             for name in ("wte", "wpe")}
    vocab_size, block_size = (sum(n for n, _ in bands[name]) for name in ("wte", "wpe"))
    sizes = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd,
                 n_inner=columns["mlp.c_fc"])
    for name, size in sizes.items():
        if stated.get(name) not in (None, size) and [stated[name]] * n_layer != size:
            raise ValueError(f"it does not fit together: its config says {name}={stated[name]}, its weights {size}")
    options = content.get("config")  # where nanoGPT repeats it, and the second edition kept the record of the tokenizer
    options = options if isinstance(options, dict) else {}
    for name, values in FUNCTION.items():  # where other programs repeat a config.json
        for said in (stated, options):
            if name in said and name != "model_type" and said[name] not in values:
                raise ValueError(f"its config says {name}={said[name]}, where {values[0]} is needed")
    n_head = stated.get("n_head", options.get("n_head"))
    if n_head is None:
        n_head = max(1, n_embd // GPT2_HEAD_DIM)
        if n_embd not in GPT2_WIDTHS:
            warnings.warn(f"the file does not say its number of heads: {n_head} of width {n_embd // n_head} taken",
                          stacklevel=3)
    head_v = stated.get("head_v") or [width // n_head for width in rows["attn.c_proj"]]
    head_qk = stated.get("head_qk") or [(width // n_head - v) // 2 for width, v in zip(columns["attn.c_attn"], head_v)]
    return dict(sizes, **bands, n_head=n_head, head_qk=head_qk, head_v=head_v, head_dim=stated.get("head_dim"),
                shapes=shapes, tokenizer=stated.get("tokenizer", options.get("tokenizer")))


def check(model):
    """Raise ValueError where a weight is not finite."""
    for name, p in model.named_parameters():
        if not torch.stack(p.detach().aminmax()).isfinite().all():  # one pass, and nothing as large as the weights
            raise ValueError(f"its weights are not finite: {name}")


# ----------------------------------------------------------------------------------------------------------------------
# a run that is resumed

def load_optimizer_state(optimizer, state, path):
    """Give an AdamW with named parameters the steps and moments of the state_dict() of another one, by name. The options of
    its groups (learning rates, weight decay, betas) stay, as a run that is resumed may have others than before.

    Raises:
        UserError: moments are missing in the checkpoint `path`, or have another shape: the fused step would write beyond
            them.
    """
    own = optimizer.state_dict()
    try:
        moments = {name: state["state"][i] for group in state["param_groups"]
                   for i, name in zip(group["params"], group["param_names"]) if state["state"]}
        for group, own_group in zip(optimizer.param_groups, own["param_groups"]):
            for i, name, p in zip(own_group["params"], group["param_names"], group["params"]):
                if moments:
                    own["state"][i] = {key: moments[name][key] for key in ("step", "exp_avg", "exp_avg_sq")}
                    if not moments[name]["exp_avg"].shape == moments[name]["exp_avg_sq"].shape == p.shape:
                        raise ValueError(f"the moments of {name} have another shape")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be resumed: it holds no optimizer's state of this model ({error}). Start from its "
                        f"weights, --init_from={path} with another --out_dir") from None
    optimizer.load_state_dict(own)
