"""Every file format of a model, in and out: checkpoints (.pt) of every age, Hugging Face files and hub names.

A checkpoint that we write is a dict of plain types and tensors: `model` (a state dict), `model_args` (the fields of
KronyGPTConfig), `optimizer` (a state dict or None), `iter_num`, `best_val_loss` and `config` (the script's options).
Its tensors have the published names of Krony-PT: a factored matrix is `<name>_0` (A), `<name>_1` (B) and `<name>_bias`,
always so in the MLP; a dense attention matrix is `<name>.weight` [out, in] and `<name>.bias`. load() also takes

- the published Krony-PT files: a bare state dict with the same names;
- older ones, with each factor by itself: c_fc_{f}_{k} and c_proj_{f}_{k} for side k of factor f, perhaps no MLP biases;
- nanoGPT's own dense checkpoints, and Lightning's;
- transformers' GPT-2: a directory, or a .safetensors or .bin file of it;
- the directories of kron_to_gpt.py --compressed=True, whose factors are `<name>.A` and `<name>.B`;
- any of them with the prefixes of DDP, FSDP, torch.compile or another wrapper.

A model is data, and loading it never runs code: .pt and .bin files are read with torch.load(weights_only=True), and
config.json and safetensors directly, without transformers.
"""
import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kronygpt.configurator import UserError
from kronygpt.files import atomic_write, link_or_copy
from kronygpt.hub import WEIGHTS, download
from kronygpt.tokenizer import read_json, tokenizer_record
from model import KronyGPT

MODELS_DIR = Path("models")
GPT2_HEAD_DIM = 64  # n_embd / n_head in GPT-2 small, medium, large and xl
GPT2_WIDTHS = (768, 1024, 1280, 1600)
# what a file may hold beside a model
DEFAULTS = dict(optimizer=None, scaler=None, iter_num=0, best_val_loss=float("inf"), config={})
PLAIN_TYPES = (bool, int, float, str, dict, type(None))  # of the options in a config, and of its tokenizer's record
RESUME_TYPES = dict(optimizer=(dict,), iter_num=(int,), best_val_loss=(int, float), config=(dict,))
WRAPPERS = {"module", "model", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MATRIX = r"(transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))"
IN_MEMORY = re.compile(MATRIX + r"\.(A|B|bias)")
IN_FILE = re.compile(MATRIX + r"(_0|_1|_bias|\.weight|\.bias)")
UNSTACKED = re.compile(r"(.*\.mlp\.c_(?:fc|proj))_(\d+)_([01])")
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files hold
TIED_RTOL, TIED_ATOL = 2**-8, 1e-6  # the rounding of half precision: an output matrix nearer to the embedding is tied
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_embd": "n_embd", "n_layer": "n_layer",
         "n_inner": "n_inner"}
COMPRESSED_TYPE = "kronygpt"  # model_type of modeling_kronygpt.py: factors that are not expanded
FUNCTION = {  # fields of a GPT-2's config.json that change its function, with the values of the one computed here
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "quantization_config": (None,),
}


class ErrorKeeper:
    """A file for torch.save, whose own errors do not say what the system said."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def save(path, model, optimizer=None, iter_num=0, best_val_loss=float("inf"), config=None, scaler=None, keep_as=None):
    """Write a checkpoint atomically.

    Args:
        path: of the .pt file; its folder is made.
        model: a KronyGPT.
        optimizer: whose state is kept for a resume, or None.
        iter_num: optimizer steps done.
        best_val_loss: in nats per token.
        config: {option: value} of the script that writes it.
        scaler: a GradScaler whose state is kept for a resume, or None.
        keep_as: path of a second name for the checkpoint that it replaces, or None.
    """
    content = dict(model=to_file_names(model.state_dict()), model_args=model.config.as_plain_types(),
                   optimizer=optimizer.state_dict() if optimizer else None, iter_num=iter_num, best_val_loss=best_val_loss,
                   config=config or {}, **({"scaler": scaler.state_dict()} if scaler else {}))
    if keep_as and Path(path).exists():
        link_or_copy(path, keep_as)
    with atomic_write(path) as file:
        keeper = ErrorKeeper(file)
        try:
            torch.save(content, keeper)
        except RuntimeError as error:
            raise keeper.error or error from None


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
    path = next((p for p in (Path(source), MODELS_DIR / source) if p.exists()), None)
    if path is None and not looks_like_hub_name(source):
        raise FileNotFoundError(f"no checkpoint {source}: train.py, kron_decompose.py and prune.py make them")
    path = path or download(source)
    if path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_dir() or (path.name in WEIGHTS and (path.parent / "config.json").exists()):
        directory, weights = (path, None) if path.is_dir() else (path.parent, path)
        config, files = open_directory(directory, weights)
        content = dict(model_args=config, tokenizer=tokenizer_record(directory))
        tensors = {name: p for file in files for name, p in read_file(file)[0].items()}
        if not config.get("tie_word_embeddings", True) and "lm_head.weight" not in tensors:
            raise UserError(f"{path} says tie_word_embeddings=false and lacks lm_head.weight")
    else:
        tensors, content = read_file(path)
        warn_of_exact_gelu(content, tensors, path)
    check_tensors(tensors, path)
    try:
        state_dict = upgrade_state_dict(tensors)
        model_args = infer_model_args(state_dict)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} holds no GPT-2 that we know: {first_line(error)}") from None
    check_tied(state_dict, path)
    model_args["n_head"] = number_of_heads(content, model_args, path)
    check_shapes(content, model_args, path)
    try:
        model = KronyGPT.from_state_dict(dict(model_args, dropout=dropout), state_dict)
    except UserError as error:
        raise UserError(f"{source} does not fit together: {error}") from None
    for name, p in model.named_parameters():
        if not torch.stack(p.detach().aminmax()).isfinite().all():  # one pass, and nothing as large as the weights
            raise UserError(f"{source} has weights that are not finite: {name}")
    rest = {name: content.get(name, default) for name, default in DEFAULTS.items()}
    if isinstance(rest["best_val_loss"], torch.Tensor) and rest["best_val_loss"].numel() == 1:  # as nanoGPT keeps it
        rest["best_val_loss"] = rest["best_val_loss"].item()
    model.config.tokenizer = find_record(content)
    return model, rest


def find_record(content):
    """The record of a model's tokenizer: beside it in a directory, in its model_args, or where the second edition kept it."""
    model_args, config = (content.get(key) if isinstance(content.get(key), dict) else {} for key in ("model_args", "config"))
    return content.get("tokenizer") or model_args.get("tokenizer") or config.get("tokenizer")


def looks_like_hub_name(source):
    """gpt2 or org/name: a hub name has at most one slash, and is no path to a file of weights."""
    is_file_name = source.startswith(".") or source.endswith((".pt", ".bin", ".safetensors"))
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not is_file_name


def read_file(path):
    """Read a file of torch.save or safetensors.

    Returns:
        ({name: tensor}, content): content is the rest of what the file holds.
    """
    if not path.is_file():
        raise UserError(f"{path} is no checkpoint: it is no regular file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), {}
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused in any case
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint: it is not a file of torch.save, or it holds more than tensors "
                        "and plain types and is not loaded, because it could run code") from None
    except OSError as error:
        if error.filename:
            raise
        raise UserError(f"{path} cannot be read: it is truncated or damaged ({error})") from None  # torch's seek
    except (SafetensorError, Exception) as error:  # bytes that are no pickle can make the unpickler raise anything
        raise UserError(f"{path} cannot be read: it is truncated or damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    key = next((key for key in ("model", "state_dict") if key in content), None)
    tensors = content.pop(key) if key else content
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} is no checkpoint: its `{key}` is no dict of tensors")
    return {name: p for name, p in tensors.items() if isinstance(p, torch.Tensor)}, content if key else {}


def open_directory(path, weights=None):
    """Look into a Hugging Face GPT-2 directory.

    Args:
        path: of the directory.
        weights: path of the file in it to read; default: the first of WEIGHTS that is there.

    Returns:
        config, the fields of config.json, and the paths of the files with the tensors.

    Raises:
        UserError: it holds no GPT-2 that a KronyGPT can be equal to.
    """
    if not (path / "config.json").exists():
        raise UserError(f"directory {path} holds no model: neither config.json (Hugging Face) nor ckpt.pt")
    config = read_json(path / "config.json")
    check_is_gpt2(config, path)
    weights = weights or next((path / name for name in WEIGHTS if (path / name).exists()), None)
    if weights is None:
        raise UserError(f"directory {path} has no weights: none of {', '.join(WEIGHTS)}")
    shards = [weights.name]
    if weights.suffix == ".json":
        index = read_json(weights).get("weight_map")
        shards = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):  # which could lead out of the directory
            raise UserError(f"{weights} is damaged: its weight_map does not name files of {path}")
    return config, [path / shard for shard in shards]


def check_is_gpt2(config, source):
    """Raise UserError unless the content of a config.json describes the function that KronyGPT computes."""
    if config.get("model_type") not in ("gpt2", COMPRESSED_TYPE):
        raise UserError(f"{source} is a {config.get('model_type', 'nameless')} model, not a GPT-2")
    for name, values in FUNCTION.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{source} is a GPT-2 with {name}={config[name]}, where {values[0]} is needed")


def check_tensors(tensors, path):
    """Raise UserError unless tensors are dense, hold real numbers, and as many as they claim."""
    for name, p in tensors.items():
        if p.layout != torch.strided or p.is_meta or not (p.is_floating_point() or name.endswith(MASKS)):
            raise UserError(f"{path} is no checkpoint: {name} is no dense tensor of real numbers")
        if p.numel() * p.element_size() > p.untyped_storage().nbytes():  # strides of 0 make any size of a few bytes
            raise UserError(f"{path} claims more numbers than it holds: {name} is {tuple(p.shape)}")


def warn_of_exact_gelu(content, tensors, path):
    """Warn of a file of nanoGPT or Krony-PT: their GELU is the exact one, where GPT-2's and KronyGPT's is the tanh form."""
    stated = content.get("model_args")
    is_ours = isinstance(stated, dict) and ("shapes" in stated or "dim_1" in stated)  # dim_1: the first edition
    if not is_ours and any(".mlp.c_fc" in name for name in tensors) and not is_conv1d(tensors):
        warnings.warn(f"{path} is a file of nanoGPT or Krony-PT, which compute the exact GELU; here it is GPT-2's tanh "
                      "form, and logits differ by up to 1e-3", stacklevel=3)


def check_tied(state_dict, path):
    """Raise UserError where the output matrix is not the embedding, then make them one tensor."""
    head, embedding = state_dict["lm_head.weight"], state_dict["transformer.wte.weight"]
    if head.shape != embedding.shape or not torch.allclose(head, embedding, TIED_RTOL, TIED_ATOL, True):
        raise UserError(f"{path} has an output matrix (lm_head.weight) that differs from its embedding, and a KronyGPT has "
                        "one matrix for both: tie them and train further, with the program that made it")
    state_dict["lm_head.weight"] = embedding


def number_of_heads(content, model_args, path):
    """The number of heads, from model_args or config.json, whose sizes must be those of the tensors; else of width 64."""
    stated = content.get("model_args")
    stated = stated if isinstance(stated, dict) else {}
    for name, ours in SIZES.items():
        if type(stated.get(name)) is int and stated[name] != model_args[ours]:
            raise UserError(f"{path} does not fit together: its config says {name}={stated[name]}, its weights "
                            f"{model_args[ours]}")
    n_head = stated.get("n_head", stated.get("num_attention_heads"))
    if type(n_head) is int:
        return n_head
    if model_args["n_embd"] not in GPT2_WIDTHS:
        warnings.warn(f"{path} does not say its number of heads: {model_args['n_head']} of width "
                      f"{model_args['n_embd'] // model_args['n_head']} taken", stacklevel=2)
    return model_args["n_head"]


def check_shapes(content, model_args, path):
    """Raise UserError unless the shapes that the config.json of a compressed export states are those of its tensors."""
    config = content.get("model_args")
    if not isinstance(config, dict) or config.get("model_type") != COMPRESSED_TYPE:
        return
    stated = config.get("shapes")
    for name, shapes in model_args["shapes"].items():
        found = [list(shape) for shape in shapes]
        if not isinstance(stated, dict) or stated.get(name) != found:
            raise UserError(f"{path} does not fit together: the shapes of {name} in its config.json are not those of its "
                            f"weights, {found[0]} in the first block")


def first_line(error):
    if isinstance(error, KeyError):
        return f"it lacks {str(error.args[0]).removesuffix('.A')}"
    return f"{type(error).__name__}: {error}".split("\n")[0]


def load_to_resume(path, dropout=0.0):
    """Load a checkpoint of train.py, with what a resume needs.

    Returns what load() returns, and raises UserError also where that is missing or damaged.
    """
    model, rest = load(str(path), dropout)
    wrong = [name for name, types in RESUME_TYPES.items() if type(rest[name]) not in types]
    if not wrong and (rest["iter_num"] < 0 or (rest["iter_num"] and not rest["optimizer"].get("state"))):
        wrong = ["iter_num"]
    if not wrong and any(type(value) not in PLAIN_TYPES for item in rest["config"].items() for value in item):
        wrong = ["config"]
    if wrong:
        raise UserError(f"{path} cannot be resumed: its {wrong[0]} is no {wrong[0]} of a run. Start from its weights, "
                        f"--init_from={path} with another --out_dir")
    return model, rest


def load_optimizer_state(optimizer, state, path):
    """Load an AdamW's state from a checkpoint; UserError unless it has the optimizer's own layout: all names, types and
    shapes, since the fused step writes to the moments unchecked. (The first edition named and ordered parameters otherwise.)
    """
    def layout(state):
        return [({key: type(value) for key, value in group.items()}, group["params"], group["param_names"])
                for group in state["param_groups"]]

    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    wanted = {i: dict(step=(), exp_avg=shape, exp_avg_sq=shape) for i, shape in enumerate(shapes)}
    try:
        found = {i: {key: t.shape for key, t in moments.items() if t.is_contiguous() and t.dtype == torch.float32}
                 for i, moments in state["state"].items()}
        fits = layout(state) == layout(optimizer.state_dict()) and found in ({}, wanted)
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"the optimizer's state in {path} is not that of these options, or of an earlier version: resume "
                        f"with the options that the run was started with, or start from its weights, --init_from={path} "
                        "with another --out_dir")
    optimizer.load_state_dict(dict(state, param_groups=optimizer.state_dict()["param_groups"]))


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
    """A KronyGPT's state dict from one under the published names, or from a dense one of nanoGPT or transformers."""
    renamed, transposed = {}, not is_conv1d(state_dict)
    for name, p in state_dict.items():
        stem, part = match.groups() if (match := IN_FILE.fullmatch(name)) else (name, None)
        if not part:
            new = {name: p}
        elif part == ".weight":
            new = dense_matrix(stem, p.t() if transposed else p)
        else:
            new = {stem + {"_0": ".A", "_1": ".B", "_bias": ".bias", ".bias": ".bias"}[part]: p}
        if twice := new.keys() & renamed.keys():
            raise ValueError(f"{min(twice)} is there twice, under different names")
        renamed |= new
    return renamed


def is_conv1d(state_dict):
    """Whether dense weights are [in, out], as in transformers' GPT-2 and our class for it, and not those of an nn.Linear."""
    if any(name.endswith(".A") for name in state_dict):
        return True
    c_attn = next((p for name, p in state_dict.items() if name.endswith("h.0.attn.c_attn.weight")), None)
    return c_attn is not None and c_attn.dim() == 2 and c_attn.shape[1] == 3 * c_attn.shape[0]


def dense_matrix(stem, W):
    return {f"{stem}.A": W.contiguous()[None], f"{stem}.B": W.new_ones(1, 1, 1)}


def plain_name(name):
    """The name of a tensor without the prefixes of wrappers, and with transformers' prefix of the whole model."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(["transformer", *parts] if parts[0] in ("wte", "wpe", "h", "ln_f") else parts)


def upgrade_state_dict(state_dict):
    """Convert the state dict of any file to that of a KronyGPT: stacked factors, all biases, contiguous float32."""
    state_dict = {plain_name(name): p.float() for name, p in state_dict.items() if not name.endswith(MASKS)}
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
    """The fields of KronyGPTConfig that the shapes of a KronyGPT's state dict tell; heads of width 64, as in GPT-2."""
    vocab_size, n_embd = state_dict["transformer.wte.weight"].shape
    n_layer = len({name.split(".")[2] for name in state_dict if name.startswith("transformer.h.")})
    shapes = {}
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        factors = [state_dict[f"transformer.h.{layer}.{name}.A"] for layer in range(n_layer)]
        shapes[name] = [(dim_1, dim_2, r) for r, dim_1, dim_2 in (A.shape for A in factors)]
    n_inner = shapes["mlp.c_fc"][0][1] * state_dict["transformer.h.0.mlp.c_fc.B"].shape[2]
    return dict(block_size=len(state_dict["transformer.wpe.weight"]), vocab_size=vocab_size, n_layer=n_layer,
                n_head=max(1, n_embd // GPT2_HEAD_DIM), n_embd=n_embd, n_inner=n_inner, shapes=shapes)
