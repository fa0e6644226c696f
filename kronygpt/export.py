"""A KronyGPT for transformers: the dense and the compressed model, its tokenizer and its model card."""
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

from kronygpt import __version__, checkpoint
from kronygpt.compress import without_dropped_units
from kronygpt.configurator import UserError
from kronygpt.kron import column_side, others, with_identity
from kronygpt.tokenizer import END_OF_TEXT, READABLE, GPT2Tokenizer, bytes_to_unicode, special_token
from model import KINDS

CODE = Path(__file__).with_name("modeling_kronygpt.py")  # which travels with a compressed export
MARK = "<!-- Written by kron_to_gpt.py, which replaces this file; without this line it stays. -->"
TRAINING = ("dataset", "learning_rate", "max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "teacher")
UNSAID = ("init_from", "tokenizer", "out")  # options that the card says otherwise, or not at all
TOKENS_COMPARED = 256
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

    config, state_dict = model.config, layer_norms(model)

    def pad_heads(t, widths):  # (..., sum of widths), one for each head of each part
        return torch.cat([F.pad(head, (0, config.head_dim - head.shape[-1])) for head in t.split(widths, dim=-1)], dim=-1)

    for layer, kind, matrix in model.matrices():
        W, bias, qk, v = matrix.weight, matrix.bias, config.head_qk[layer], config.head_v[layer]
        units = 0, max(config.n_inner) - config.n_inner[layer]
        if kind == "attn.c_attn":
            W, bias = pad_heads(W, [*qk, *qk, *v]), pad_heads(bias, [*qk, *qk, *v])
        elif kind == "attn.c_proj":
            W = pad_heads(W.T, v).T
        elif kind == "mlp.c_fc":
            W, bias = F.pad(W, units), F.pad(bias, units)
        else:
            W = F.pad(W, (0, 0, *units))
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
    modules = {f"transformer.h.{layer}.{kind}": linear_parts(matrix) for layer, kind, matrix in model.matrices()}
    modules |= {f"transformer.{name}": embedding_parts(model.transformer.get_submodule(name)) for name in ("wte", "wpe")}
    for layer, (qk, v) in enumerate(zip(model.config.head_qk, model.config.head_v)):
        if {*qk, *v} != {model.config.head_dim}:
            modules[f"transformer.h.{layer}.attn"] = head_places(qk, v)
    state_dict = layer_norms(model)
    for module, parts in modules.items():
        state_dict |= {f"{module}.{part}": p for part, p in (rounded(parts) if int8 else parts).items()}
    return with_weights(KronyGPTForCausalLM, config, state_dict)


def layer_norms(model):
    return {name: p for name, p in model.state_dict().items() if ".ln_" in name}


@torch.no_grad()
def linear_parts(matrix):
    """The tensors of a modeling_kronygpt.LowRankLinear from a dense or low-rank model.KronLinear, or else those of its
    KronLinear."""
    if matrix.is_dense:
        return {"up.weight": matrix.A[0].T, "up.bias": matrix.bias}
    A, B, pivots = with_identity(matrix.A, matrix.B)
    if pivots is None:
        return dict(A=A, B=B, bias=matrix.bias)
    rest, row = (B, A) if column_side(A.shape, B.shape) == "B" else (A, B)
    order = torch.cat((pivots, others(pivots, rest.shape[1] + len(pivots))))
    return {"down.weight": rest[:, :, 0], "up.weight": row[:, 0].T, "up.bias": matrix.bias, "order": order.int()}


@torch.no_grad()
def embedding_parts(embedding):
    """The tensors of a modeling_kronygpt.FactoredEmbedding from a model.Embedding, or its weight where it is dense."""
    if embedding.is_dense:
        return dict(weight=embedding.weight)
    A, B, row, columns = embedding.A, embedding.B, embedding.row, embedding.columns
    if row is None:
        V, rank = embedding.bands[0]
        A, B, pivots = with_identity(A.view(V, rank).T[:, :, None], B[:, None])
        A, B, columns = A[:, :, 0].T.flatten(), B[:, 0], torch.where(torch.arange(V) < rank, 0, rank)
        row = torch.cat((pivots, others(pivots, V))).argsort()
    starts = columns.cumsum(0) - columns
    return dict(A=A, B=B, row=row.int(), start=starts[row].int(), columns=columns[row].int())


def rounded(parts):
    """The tensors of a module with weights in int8: multiples of a scale that is 1/127 of the largest number in an output
    column of a matrix or a factor, or in a token of an embedding."""
    result = dict(parts)
    for part, p in parts.items():
        if p.dim() > 1:
            largest = p.abs().amax(-1 if p.dim() == 2 else 1, keepdim=True)
        elif part == "A":
            tokens = checkpoint.owners(parts["row"], parts["columns"])
            largest = torch.zeros(len(parts["row"])).scatter_reduce(0, tokens, p.abs(), "amax")[:, None]
        else:
            continue
        scale = torch.where(largest > 0, largest / 127, 1.0)
        each = scale if p.dim() > 1 else scale[tokens, 0]
        result |= {part: (p / each).round().to(torch.int8), f"{part}_scale": scale}
    return result


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
    does not run, but our own; UserError where it is too large. In int8, matrices are compared with the KronyGPT's, and
    logits with the rounded matrices' own."""
    from transformers import GPT2LMHeadModel

    from kronygpt.modeling_kronygpt import KronyGPTForCausalLM

    cls = KronyGPTForCausalLM if compressed else GPT2LMHeadModel
    exported = cls.from_pretrained(directory, dtype=torch.float32).eval()
    size = 2, min(TOKENS_COMPARED, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    logits, found = model.eval()(idx), exported(idx).logits
    expected = check_rounded(without_dropped_units(model), directory).eval()(idx) if dtype == "int8" else logits
    difference = (expected - found).abs().max().item()
    limit = largest_allowed(logits, compressed, dtype) if tolerance is None else tolerance
    if not difference < limit:
        raise UserError(f"the converted model differs by {difference:.1e} in a logit, more than --tolerance={limit:.1e}; "
                        "nothing was written", status=1)
    return (logits - found).abs().max().item()


def check_rounded(model, directory):
    """The KronyGPT of an export in int8; UserError where one of its matrices is off by more than a share of ROUNDING of the
    norm: by another scale, or transposed."""
    found, _ = checkpoint.load(directory)
    pairs = [(kind, p.weight, q.weight) for (_, kind, p), (_, _, q) in zip(model.matrices(), found.matrices())]
    pairs += [(name, getattr(model.transformer, name).dense(), getattr(found.transformer, name).dense())
              for name in ("wte", "wpe")]
    for name, W, other in pairs:
        if not (W - other).norm() <= ROUNDING * W.norm():
            raise UserError(f"{name} in int8 is off by {(W - other).norm() / W.norm():.0%} of its norm; nothing was written",
                            status=1)
    return found


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

def is_card(path):
    """Whether a README.md is a model card of ours, which nobody made their own."""
    return path.is_file() and MARK.encode() in path.read_bytes()


def describe_origin(config, iter_num):
    """A sentence about the training run or the compression that made a checkpoint, from the options in it. Of absolute
    paths only the names are told."""
    if not config:
        return "The checkpoint does not say."
    said = {name: Path(str(value)).name if Path(str(value)).is_absolute() else value for name, value in config.items()
            if value not in (None, "")}
    is_training = "gradient_accumulation_steps" in said
    names = TRAINING if is_training else [name for name in said if name not in UNSAID]
    options = ", ".join(f"{name}={said[name]}" for name in names if name in said)
    done = f"Trained for {iter_num:,} steps" if is_training else "Compressed"
    return f"{done} from `{said.get('init_from')}`: `{options}`"


def base_model(config):
    """The hub name that the options in a checkpoint start from, or None where they start elsewhere."""
    name = str(config.get("init_from", "scratch"))
    is_local = Path(name).exists() or (checkpoint.MODELS_DIR / name).exists()
    return name if checkpoint.looks_like_hub_name(name) and not is_local and name not in ("scratch", "resume") else None


def describe_shapes(config):
    """A table of the shapes of the four matrices, with the blocks that have them."""
    lines = ["| matrix | shapes (dim_1, dim_2, r) and the number of blocks that have them |", "|---|---|"]
    for kind in KINDS:
        said = []
        for layer, shape in enumerate(config.shapes[kind]):
            m, n = config.sizes(layer)[kind]
            said.append(f"[{m}, {n}] " + ("dense" if shape == (m, n, 1) else f"({', '.join(map(str, shape))})"))
        lines.append(f"| {kind} | {', '.join(f'{text} in {said.count(text)}' for text in dict.fromkeys(said))} |")
    return "\n".join(lines)


CARD = """{mark}

# {name}

GPT-2 with {parameters:,} parameters ({dense:,} with the Kronecker sums expanded), in {dtype}. Weight matrices W
are sums of Kronecker products, Σ A_f ⊗ B_f, and are stored and computed as their factors.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`modeling_kronygpt.py` in this directory is the code that runs. It needs only torch and transformers.

## How it was made

By KronyGPT {version}. {origin}

{shapes}
{scores}"""


def model_card(name, model, rest, perplexities, dtype):
    """The ModelCard of a KronyGPT that is exported under a name, in a dtype.

    Args:
        rest: what checkpoint.load returned beside the model.
        perplexities: {data set: {"perplexity", ...}} as perplexity.py --json_out writes it, perhaps empty.
    """
    parameters = model.count_parameters()["total"]
    dense = parameters + sum(matrix.weight.numel() + matrix.bias.numel() - matrix.count_parameters()
                             for _, _, matrix in model.matrices())
    dense += sum(E.dense().numel() - E.count_parameters() for E in (model.transformer.wte, model.transformer.wpe))
    data = ModelCardData(base_model=base_model(rest["config"]), library_name="transformers", pipeline_tag="text-generation",
                         tags=["gpt2", "kronecker", "compression"])
    rows = [f"| {dataset} | {result['perplexity']:.2f} |" for dataset, result in perplexities.items()]
    text = CARD.format(mark=MARK, name=name, version=__version__, parameters=parameters, dense=dense, dtype=dtype,
                       origin=describe_origin(rest["config"], rest["iter_num"]), shapes=describe_shapes(model.config),
                       scores="\n".join(["", "| data set | perplexity |", "|---|---|", *rows, ""] if rows else []))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
