"""A KronyGPT for transformers: the dense and the compressed model, its tokenizer and its model card."""
import json
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

from kronygpt import __version__, checkpoint
from kronygpt.compress import without_dropped_units
from kronygpt.configurator import UserError
from kronygpt.kron import column_side, others
from kronygpt.tokenizer import END_OF_TEXT, READABLE, GPT2Tokenizer, bytes_to_unicode, special_token
from model import KINDS

CODE = Path(__file__).with_name("modeling_kronygpt.py")  # which travels with a compressed export
MARK = "<!-- Written by kron_to_gpt.py, which replaces this file; without this line it stays. -->"
TOKENS_COMPARED = 256
RIDGE = 1e-6  # of the mean diagonal of a metric, for factors whose rows depend on each other
ROUNDING = 0.2  # share of a matrix's norm; int8 takes about 0.01, and at most sqrt(m) / 254 where a column is one number
GPT2_FILES = {  # as tiktoken names them, with their sha256
    "vocab.json": ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")}


# ----------------------------------------------------------------------------------------------------------------------
# the model

def sizes(config):
    """The arguments of a GPT2Config for a KronyGPTConfig."""
    return dict(
        vocab_size=config.vocab_size, n_positions=config.block_size,
        n_ctx=config.block_size,  # an older name, which llama.cpp's converter asks for
        n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=None if max(config.n_inner) == 4 * config.n_embd else max(config.n_inner),
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout)


def to_dense(model):
    """The transformers GPT2LMHeadModel that computes the same function as a KronyGPT: Kronecker sums are expanded, and zeros
    pad narrow heads to the width head_dim, and all MLPs to one number of hidden units."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    state_dict = {name: p for name, p in model.state_dict().items() if ".ln_" in name}

    def padded(t):  # (..., sum of widths), where zeros bring each part to one width
        return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in t.split(widths, dim=-1)], dim=-1)

    for layer, kind, matrix in model.matrices():
        W, bias, qk, v = matrix.weight, matrix.bias, config.head_qk[layer], config.head_v[layer]
        widths, width = [config.n_inner[layer]], max(config.n_inner)
        if kind.startswith("attn."):
            widths, width = v if kind.endswith("c_proj") else [*qk, *qk, *v], config.head_dim
        if kind.endswith("c_proj"):
            W = padded(W.T).T
        else:
            W, bias = padded(W), padded(bias)
        state_dict |= {f"transformer.h.{layer}.{kind}.weight": W, f"transformer.h.{layer}.{kind}.bias": bias}
    for name in "wte", "wpe":
        state_dict[f"transformer.{name}.weight"] = model.transformer.get_submodule(name).dense()
    return with_weights(GPT2LMHeadModel, GPT2Config(**sizes(config)), state_dict)


def to_compressed(model, int8=False):
    """The KronyGPTForCausalLM of modeling_kronygpt.py with the tensors of a KronyGPT, perhaps rounded: factors stay
    factors."""
    from kronygpt.modeling_kronygpt import KronyGPTConfig, KronyGPTForCausalLM, head_places

    classes = dict(AutoConfig="KronyGPTConfig", AutoModel="KronyGPTModel", AutoModelForCausalLM="KronyGPTForCausalLM")
    widths = {name: getattr(model.config, name) for name in ("n_inner", "head_qk", "head_v")}
    widths |= {name: [list(band) for band in getattr(model.config, name)] for name in ("wte", "wpe")
               if not model.transformer.get_submodule(name).is_dense}
    config = KronyGPTConfig(
        widths=widths, int8=int8,
        shapes={kind: [list(shape) for shape in of_blocks] for kind, of_blocks in model.config.shapes.items()},
        auto_map={auto: f"{CODE.stem}.{name}" for auto, name in classes.items()}, **sizes(model.config))
    modules = checkpoint.stored_parts(model.state_dict(), ranks_once=True)
    for layer, (qk, v) in enumerate(zip(model.config.head_qk, model.config.head_v)):
        if {*qk, *v} != {model.config.head_dim}:
            modules[f"transformer.h.{layer}.attn"] = head_places(qk, v)
    state_dict = {}
    for module, parts in modules.items():
        if module.endswith(KINDS):
            parts = linear_parts(**parts)
        elif "B" in parts:
            parts = embedding_parts(model.transformer.get_submodule(module.partition(".")[2]).bands, **parts)
        state_dict |= {f"{module}.{part}": p for part, p in (rounded(parts) if int8 else parts).items()}
    return with_weights(KronyGPTForCausalLM, config, state_dict)


def linear_parts(A, B, bias, pivots=None):
    """The tensors of a modeling_kronygpt.LowRankLinear from those of a dense or low-rank model.KronLinear, or else those of
    its KronLinear."""
    if B.shape == (1, 1, 1):
        return {"up.weight": A[0].T, "up.bias": bias}
    if pivots is None:
        return dict(A=A, B=B, bias=bias)
    rest, row = (B, A) if column_side(A.shape, B.shape) == "B" else (A, B)
    order = torch.cat((pivots, others(pivots, rest.shape[1] + len(pivots))))
    return {"down.weight": rest[:, :, 0], "up.weight": row[:, 0].T, "up.bias": bias, "order": order.int()}


def embedding_parts(bands, A, B, row=None, pivots=None):
    """The tensors of a modeling_kronygpt.FactoredEmbedding from those of a model.Embedding of some bands."""
    columns = torch.tensor([k for n, k in bands for _ in range(n)])
    if row is None:
        columns[:len(pivots)] = 0
        row = torch.cat((pivots, others(pivots, len(columns)))).argsort()
        A, B = A[:, :, 0].T.flatten(), B[:, 0]
    starts = columns.cumsum(0) - columns
    return dict(A=A, B=B, row=row.int(), start=starts[row].int(), columns=columns[row].int())


def rounded(parts):
    """The tensors of a module with weights in int8, each with a scale for each output column of a matrix or a factor, or for
    each token of an embedding. The factor that is rounded last makes up for the other one."""
    result = dict(parts)

    def put(part, p, metric=None):
        result[part], result[f"{part}_scale"] = to_int8(p, metric)
        return result[part] * result[f"{part}_scale"]

    if "down.weight" in parts:  # x [I; downᵀ] upᵀ
        down = put("down.weight", parts["down.weight"])
        metric = torch.eye(len(down)) + down @ down.T
        up = parts["up.weight"].T
        put("up.weight", torch.linalg.solve(metric, up + down @ (parts["down.weight"].T @ up)).T, metric)
    elif "row" in parts:  # the rows of A B, in bands of as many columns; 0 are a row of the identity
        B, A, scales = put("B", parts["B"]), [], []
        columns, counts = parts["columns"][parts["row"].argsort()].unique_consecutive(return_counts=True)
        for W, k, n in zip(parts["A"].split((columns * counts).tolist()), columns.tolist(), counts.tolist()):
            W, scale = W.view(n, k), torch.ones(n, 1)
            if k:
                W = W @ torch.linalg.lstsq(B[:k].T, parts["B"][:k].T).solution.T
                W, scale = to_int8(W, B[:k] @ B[:k].T)
            A.append(W)
            scales.append(scale)
        result |= dict(A=torch.cat([W.flatten() for W in A]).to(torch.int8), A_scale=torch.cat(scales)[parts["row"]])
    else:
        for part, p in parts.items():
            if p.dim() > 1:
                put(part, p)
    return result


def to_int8(W, metric=None):
    """W [n, k], or factors [r, m, n], as multiples of a scale that is 1/127 of the largest number in a row [n, 1], or in a
    column [r, 1, n] of a factor. With a metric [k, k], a row's error e costs e metric eᵀ, and the error of each column is
    made up for in those behind it (GPTQ, arXiv 2210.17323, with another factor in the place of inputs)."""
    largest = W.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    if metric is None:
        return (W / scale).round().to(torch.int8), scale
    rest = (W / scale).T.contiguous()
    metric = metric.double() + RIDGE * metric.diagonal().mean() * torch.eye(len(metric))
    root = torch.linalg.cholesky(torch.linalg.inv(metric), upper=True).float()
    for i in range(len(rest)):
        error = rest[i] - rest[i].round().clamp(-127, 127)
        rest[i:].addr_(root[i, i:] / root[i, i], error, alpha=-1)
    return rest.T.round().to(torch.int8), scale


def with_weights(cls, config, state_dict):
    """A transformers model that takes over the tensors of a state dict, and has one matrix for embedding and output."""
    with torch.device("meta"):  # nothing to initialize
        hf_model = cls(config)
    if "lm_head.weight" in hf_model.state_dict():
        state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
    hf_model.load_state_dict({name: p.detach().contiguous() for name, p in state_dict.items()}, assign=True)
    hf_model.tie_weights()
    return hf_model.eval()


@torch.no_grad()
def verify(model, directory, compressed, dtype, tolerance):
    """The largest absolute difference of a logit between a KronyGPT and the transformers model in a directory, whose code
    does not run, but our own; UserError where it is too large. In int8, a matrix may differ by a share of ROUNDING of its
    norm, which finds a wrong scale or order, and logits are compared with the rounded matrices' own."""
    from transformers import GPT2LMHeadModel

    from kronygpt.modeling_kronygpt import KronyGPTForCausalLM

    cls = KronyGPTForCausalLM if compressed else GPT2LMHeadModel
    exported = cls.from_pretrained(directory, dtype=torch.float32).eval()
    size = 2, min(TOKENS_COMPARED, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    logits, found = model.eval()(idx), exported(idx).logits
    expected = logits
    if dtype == "int8":
        again = checkpoint.load(directory, as_stored=True)[0].eval()
        for W, rounded_W in zip(without_dropped_units(model).weights(), again.weights()):
            if not (W - rounded_W).norm() <= ROUNDING * W.norm():
                raise UserError(f"a matrix in int8 is off by {(W - rounded_W).norm() / W.norm():.0%} of its norm; "
                                "nothing was written", status=1)
        expected = again(idx)
    difference = (expected - found).abs().max().item()
    limit = largest_allowed(logits, compressed, dtype) if tolerance is None else tolerance
    if not difference < limit:
        raise UserError(f"the converted model differs by {difference:.1e} in a logit, more than --tolerance={limit:.1e}; "
                        "nothing was written", status=1)
    return (logits - found).abs().max().item()


def largest_allowed(logits, compressed, dtype):
    """The difference that counts as rounding beside the logits of the checkpoint's model: 1e-3, or 1e-4 where no sum is
    expanded (and no logit is above 10, as float32 is relative), or eight units of the last place in half precision."""
    largest = logits.abs().max().item()
    exact = 1e-4 * max(1.0, largest / 10) if compressed else 1e-3
    return exact if dtype in ("float32", "int8") else max(exact, 8 * torch.finfo(getattr(torch, dtype)).eps * largest)


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer

def write_tokenizer(directory, tokenizer, block_size):
    """Write a Tokenizer for transformers into a model's directory, with the model's context: data files only, which name
    no code."""
    if tokenizer.directory:
        settings = write_own(directory, tokenizer)
    else:
        settings = write_gpt2(directory) if tokenizer.name == GPT2Tokenizer.name else write_bytes(directory, tokenizer)
    # GPT-2 takes token_type_ids, which transformers 4 makes unasked, for more tokens to embed
    settings |= dict(model_input_names=["input_ids", "attention_mask"], model_max_length=block_size,
                     pad_token=settings.get("pad_token") or settings.get("eos_token"))
    text = json.dumps({name: value for name, value in settings.items() if value is not None}, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n")


def gpt2_files():
    """{"vocab.json": bytes, "merges.txt": bytes} of GPT-2, from tiktoken's cache."""
    from tiktoken.load import read_file_cached

    folder = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    return {name: read_file_cached(f"{folder}/{theirs}", sha256) for name, (theirs, sha256) in GPT2_FILES.items()}


def write_gpt2(directory):
    """Write GPT-2's tokenizer; returns what tokenizer_config.json says of it."""
    for name, content in gpt2_files().items():  # which transformers 4 and llama.cpp read
        (directory / name).write_bytes(content)
    tokenizer = Tokenizer(models.BPE.from_file(*(str(directory / name) for name in GPT2_FILES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                unk_token=END_OF_TEXT)


def write_bytes(directory, ours):
    """Write the byte tokenizer; returns what tokenizer_config.json says of it."""
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE({text: byte for byte, text in characters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    end = characters[ours.end_of_text]  # the line end; in the vocabulary it is a character that is also a letter
    return dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, split_special_tokens=True,
                clean_up_tokenization_spaces=False)


def write_own(directory, ours):
    """Copy the files of a model's own tokenizer; returns what tokenizer_config.json says of it."""
    for name in READABLE:
        if (ours.directory / name).exists():
            shutil.copyfile(ours.directory / name, directory / name)
    if not (directory / "tokenizer.json").exists():
        ours.tokenizer.save(str(directory / "tokenizer.json"))
    stated = {name: special_token(ours.directory, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if ours.end_of_text is not None:
        stated["eos_token"] = ours.end_name
    return dict(stated, tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)


# ----------------------------------------------------------------------------------------------------------------------
# the model card

def commands(config):
    """The options of the commands that made a model, in order, from those in its checkpoint."""
    own = {option: value for option, value in config.items() if option != "init_options" and value not in (None, "")}
    return [*commands(config["init_options"]), own] if config.get("init_options") else [own]


def base_model(config):
    """The hub name that the options of a command start from, or None where they start elsewhere."""
    name = str(config.get("init_from", "scratch"))
    is_local = Path(name).exists() or (checkpoint.MODELS_DIR / name).exists()
    return name if checkpoint.looks_like_hub_name(name) and not is_local and name not in ("scratch", "resume") else None


CARD = """---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, kronecker, compression]
---
{mark}

# {name}

GPT-2 with {parameters:,} parameters ({dense:,} with all products expanded), in {dtype}. Weight matrices are of low rank or
other sums of Kronecker products, Σ A_f ⊗ B_f, and are stored and computed as their factors.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`modeling_kronygpt.py` in this directory is the code that runs. It needs only torch and transformers.

## How it was made

By KronyGPT {version}, with {steps:,} steps of training. The options, command after command:

{options}
{scores}"""


def model_card(name, model, rest, perplexities, dtype):
    """The text of the model card of a KronyGPT that is exported under a name, in a dtype.

    Args:
        rest: what checkpoint.load returned beside the model. Of absolute paths in its options only the names are told.
        perplexities: {data set: {"perplexity", ...}} as perplexity.py --json_out writes it, perhaps empty.
    """
    made = commands(rest["config"])
    base, counts = base_model(made[0]), model.count_parameters()
    dense = counts["vectors"] + sum(W.numel() for W in model.weights())

    def told(value):
        return repr(Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value)

    options = ["\n".join(f"    {option} = {told(value)}" for option, value in command.items()) for command in made]
    rows = [f"| {dataset} | {result['perplexity']:.2f} |\n" for dataset, result in perplexities.items()]
    return CARD.format(
        base=f"base_model: {base}\n" if base else "", mark=MARK, name=name, parameters=counts["total"], dense=dense,
        dtype=dtype, version=__version__, steps=rest["iter_num"],
        options="\n\n".join(options) or "    not known",
        scores="".join(["\n| data set | perplexity |\n|---|---|\n", *rows] if rows else []))
