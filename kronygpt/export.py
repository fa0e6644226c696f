"""A KronyGPT for transformers: the dense and the compressed model, its tokenizer and its model card."""
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from kronygpt import checkpoint
from kronygpt.configurator import UserError
from kronygpt.tokenizer import read_json

MARK = "<!-- Written by kron_to_gpt.py, which replaces this file; without this line it stays. -->"
LONGEST_NAME = 100  # of a model on the hub
MOST_STEPS = 10  # of a history
TRAINING = ("dataset", "learning_rate", "max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "teacher")
UNSAID = ("init_from", "tokenizer", "out")  # options that a step of the history says otherwise, or not at all
TOKENS_COMPARED = 256
TOKENS_GENERATED = 8  # behind as many


def sizes(config):
    """The arguments of a GPT2Config for a KronyGPTConfig."""
    return dict(
        vocab_size=config.vocab_size, n_positions=config.block_size,
        n_ctx=config.block_size,  # an older name, which llama.cpp's converter asks for
        n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=None if config.n_inner == 4 * config.n_embd else config.n_inner,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout)


def to_transformers(model):
    """The transformers GPT2LMHeadModel that computes the same function as a KronyGPT, with the Kronecker sums expanded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    hf_model = GPT2LMHeadModel(GPT2Config(**sizes(model.config)))
    state_dict = model.state_dict()
    for layer, kind, matrix in model.matrices():
        name = f"transformer.h.{layer}.{kind}"
        state_dict[f"{name}.weight"] = matrix.weight  # [in, out], as Conv1D has it
        del state_dict[f"{name}.A"], state_dict[f"{name}.B"]
    hf_model.load_state_dict(state_dict)
    return hf_model.eval()


def to_compressed(model):
    """The KronyGPTForCausalLM of modeling_kronygpt.py with the tensors of a KronyGPT: factors stay factors."""
    import torch

    from kronygpt.modeling_kronygpt import KronyGPTConfig, KronyGPTForCausalLM

    module = KronyGPTConfig.__module__
    auto_map = dict(AutoConfig=f"{module}.KronyGPTConfig", AutoModel=f"{module}.KronyGPTModel",
                    AutoModelForCausalLM=f"{module}.KronyGPTForCausalLM")
    shapes = {name: [list(shape) for shape in of_blocks] for name, of_blocks in model.config.shapes.items()}
    config = KronyGPTConfig(shapes=shapes, auto_map=auto_map, **sizes(model.config))
    with torch.device("meta"):  # nothing to initialise
        hf_model = KronyGPTForCausalLM(config)
    state_dict = model.state_dict()
    for layer, kind, matrix in model.matrices():
        name = f"transformer.h.{layer}.{kind}"
        if matrix.is_dense:  # a Conv1D
            state_dict[f"{name}.weight"] = state_dict.pop(f"{name}.A")[0]
            del state_dict[f"{name}.B"]
    hf_model.load_state_dict(state_dict, assign=True)
    hf_model.tie_weights()
    return hf_model.eval()


def gpt2_vocabulary():
    """GPT-2's {token: id} and its merges, [(left, right), ...], from tiktoken's ranks.

    The pair whose merge made a token is what byte pair encoding with the tokens before it leaves of the token.
    """
    from kronygpt.tokenizer import END_OF_TEXT, GPT2Tokenizer, bytes_to_unicode

    gpt2, characters = GPT2Tokenizer(), bytes_to_unicode()
    tokens = [gpt2.decode_bytes([number]) for number in range(gpt2.end_of_text)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    texts = {token: "".join(characters[byte] for byte in token) for token in tokens}
    merges = [[texts[part] for part in parts_before(token, ranks)] for token in tokens if len(token) > 1]
    return {texts[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: gpt2.end_of_text}, merges


def parts_before(token, ranks):
    """The two parts that the merges of lower ranks make of a token of this rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first:first + 2] = [parts[first] + parts[first + 1]]
    return parts


def write_built_in(directory, ours):
    """Write GPT-2's or the byte tokenizer's files; returns what tokenizer_config.json says of it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    from kronygpt.tokenizer import END_OF_TEXT, GPT2Tokenizer, bytes_to_unicode

    is_gpt2 = ours.name == GPT2Tokenizer.name
    characters = bytes_to_unicode()
    vocab, merges = gpt2_vocabulary() if is_gpt2 else ({text: byte for byte, text in characters.items()}, [])
    made = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)
    made.decoder = decoders.ByteLevel()
    if is_gpt2:
        made.post_processor = processors.ByteLevel(trim_offsets=False)
        made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        made.model.save(str(directory))  # vocab.json and merges.txt, which transformers 4 and llama.cpp read
        settings = dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False, bos_token=END_OF_TEXT,
                        eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
    else:  # a document ends with a line end, but the character that stands for it in the vocabulary is also a letter
        end = characters[ours.end_of_text]
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, split_special_tokens=True,
                        clean_up_tokenization_spaces=False)
    made.save(str(directory / "tokenizer.json"))
    return settings


def write_own(directory, ours):
    """Copy the files of a model's own tokenizer; returns what tokenizer_config.json says of it."""
    from kronygpt.tokenizer import READABLE, special_token

    for name in READABLE:
        if (ours.directory / name).exists():
            shutil.copyfile(ours.directory / name, directory / name)
    if not (directory / "tokenizer.json").exists():
        ours.tokenizer.save(str(directory / "tokenizer.json"))
    stated = {name: special_token(ours.directory, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if ours.end_of_text is not None:
        stated["eos_token"] = ours.end_name
    return dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                **{name: token for name, token in stated.items() if token})


def write_tokenizer(directory, ours, block_size):
    """Write a tokenizer for transformers into a directory: data files alone, which name no code.

    Args:
        directory: of the model.
        ours: a Tokenizer.
        block_size: the model's context.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = write_own(directory, ours) if ours.directory else write_built_in(directory, ours)
    text = json.dumps(dict(settings, model_max_length=block_size), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def no_code_left():
    """Let transformers copy the code of the models that it loads in this block to a directory of the block alone, so that
    no earlier copy is run and none is left."""
    from transformers import dynamic_module_utils

    place, modules = dynamic_module_utils.HF_MODULES_CACHE, set(sys.modules)
    with TemporaryDirectory() as directory:
        dynamic_module_utils.HF_MODULES_CACHE = directory
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = place
            sys.path[:] = [entry for entry in sys.path if entry != directory]
            for name in sys.modules.keys() - modules:
                if name.split(".")[0] == "transformers_modules":
                    del sys.modules[name]


def save_weights(exported, directory):
    """save_pretrained() of a transformers model, with the system's own error where the disk is full."""
    from safetensors import SafetensorError

    try:
        exported.save_pretrained(directory)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from None
    for file in directory.glob("*.safetensors"):  # which only their owner may read
        shutil.copymode(directory / "config.json", file)


def verify(model, directory, ckpt, compressed, dtype, tolerance, seed):
    """Compare a KronyGPT with the transformers model in a directory, whose code is run where it is ours.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        UserError: it is too large, or a compressed export generates other tokens with its cache than without.
    """
    import torch
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    context = model.config.block_size
    idx = torch.randint(model.config.vocab_size, (2, min(TOKENS_COMPARED, context)), generator=generator)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=compressed,
                                                        local_files_only=True).eval()
        logits = model.eval()(idx)
        difference = (logits - exported(idx).logits).abs().max().item()
        limit = largest_allowed(logits, compressed, dtype) if tolerance is None else tolerance
        if not difference < limit:
            raise UserError(f"the converted model differs from {ckpt} by {difference:.1e} in a logit, more than "
                            f"--tolerance={limit:.1e}; nothing was written", status=1)
        if compressed and context > 1:
            prompt = idx[:, :min(TOKENS_GENERATED, context // 2)]
            with_cache, without = (exported.generate(prompt, do_sample=False, use_cache=use_cache, pad_token_id=0,
                                                     max_new_tokens=prompt.shape[1]) for use_cache in (True, False))
            if not torch.equal(with_cache, without):
                raise UserError("the converted model generates other tokens with its cache than without; nothing was "
                                "written", status=1)
    return difference


def largest_allowed(logits, compressed, dtype):
    """The difference of a logit that counts as rounding, for the logits of the checkpoint's model.

    It is 1e-3, or 1e-4 where no sum is expanded (and the largest logit is not above 10, as float32 is relative); in half
    precision four units of the last place of the largest logit are more.
    """
    import torch

    largest = logits.abs().max().item()
    exact = 1e-4 * max(1.0, largest / 10) if compressed else 1e-3
    return exact if dtype == "float32" else max(exact, 4 * torch.finfo(getattr(torch, dtype)).eps * largest)


def is_card(path):
    """Whether a README.md is a model card of ours, which nobody made their own."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def read_perplexities(path):
    """{data set: perplexity} of a file that perplexity.py --json_out wrote.

    Raises:
        UserError: it is no such file.
    """
    found = {}
    for name, result in read_json(Path(path)).items():
        value = result.get("perplexity") if isinstance(result, dict) else None
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{path} is no file of perplexity.py --json_out: it has no perplexity of {name}")
        found[name] = value
    return found


def history(rest):
    """The options with which a checkpoint and those before it were made, as (config, iter_num), the latest first.

    A file that is gone, or is no checkpoint any more, ends the history.
    """
    steps = []
    while isinstance(config := rest.get("config"), dict) and config and len(steps) < MOST_STEPS:
        steps.append((config, rest.get("iter_num", 0)))
        path = Path(str(config.get("init_from")))
        try:
            if not path.is_file():
                break
            _, rest = checkpoint.read_file(path)
        except (UserError, OSError):
            break
    return steps


def one_line(value):
    """A value of a checkpoint's config as text for a line of Markdown; of an absolute path only the name."""
    text = " ".join(str(value).replace("`", "'").replace("|", "/").split())
    return Path(text).name if Path(text).is_absolute() else text


def describe_step(config, iter_num, context):
    """A line about a step of the history: a training run, or a compression."""
    is_training = "gradient_accumulation_steps" in config
    names = TRAINING if is_training else [name for name in config if name not in UNSAID]
    options = ", ".join(f"{one_line(name)}={one_line(config[name])}" for name in names if config.get(name) not in (None, ""))
    options = f": `{options}`" * bool(options)
    source = one_line(config.get("init_from"))
    if not is_training:
        return f"Compressed from `{source}`{options}"
    numbers = [iter_num, *(config.get(name) for name in ("batch_size", "gradient_accumulation_steps")),
               config.get("block_size") or context]
    if any(type(number) is not int for number in numbers):  # a config of another program
        return f"Trained from `{source}`{options}"
    return f"Trained from `{source}` for {iter_num:,} steps, {math.prod(numbers):,} tokens{options}"


def base_model(steps):
    """The hub name from which the history starts, or None where it starts elsewhere."""
    name = steps[-1][0].get("init_from") if steps else None
    if not isinstance(name, str) or name in ("scratch", "resume") or len(name) > LONGEST_NAME:
        return None
    is_local = any(path.exists() for path in (Path(name), checkpoint.MODELS_DIR / name))
    return name if checkpoint.looks_like_hub_name(name) and not is_local else None


def describe_shapes(config):
    """A table of the shapes of the four matrices, with the blocks that have them."""
    lines = ["| matrix | shapes (dim_1, dim_2, r) and the number of blocks that have them |", "|---|---|"]
    for name, (m, n) in config.matrices.items():
        shapes = config.shapes[name]
        counts = {shape: shapes.count(shape) for shape in shapes}
        said = ", ".join(("dense" if shape == (m, n, 1) else f"({', '.join(map(str, shape))})") + f" in {count}"
                         for shape, count in counts.items())
        lines.append(f"| {name} [{m}, {n}] | {said} |")
    return "\n".join(lines)


def model_card(name, model, rest, perplexities, dtype):
    """The text of a model card.

    Args:
        name: of the model.
        model: the KronyGPT that was exported.
        rest: what checkpoint.load returned beside it.
        perplexities: {data set: perplexity}, perhaps empty.
        dtype: of the export, a name.
    """
    steps, parameters = history(rest), model.count_parameters()["total"]
    dense = parameters + sum(matrix.weight.numel() - matrix.A.numel() - matrix.B.numel()
                             for _, _, matrix in model.matrices() if not matrix.is_dense)
    base = base_model(steps)
    made = [f"{i}. {describe_step(*step, model.config.block_size)}" for i, step in enumerate(reversed(steps), 1)]
    front = ["---", *([f"base_model: {base}"] if base else []), "# license: yours to choose", "library_name: transformers",
             "pipeline_tag: text-generation", "tags:", "- gpt2", "- kronecker", "- compression", "---"]
    scores = [f"| {one_line(key)} | {value:.2f} |" for key, value in perplexities.items()]
    return "\n".join([
        *front, MARK, "", f"# {name}", "",
        f"GPT-2 with {parameters:,} parameters ({dense:,} with the Kronecker sums expanded), in {dtype}. Weight matrices W",
        "are sums of Kronecker products, Σ A_f ⊗ B_f, and are stored and computed as their factors.", "",
        "## Use", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")', "```", "",
        "`modeling_kronygpt.py` in this directory is the code that runs. It needs torch and transformers alone. Quantisers",
        "look for `Conv1D` or `nn.Linear`: they find dense matrices and the output matrix, and leave factors.", "",
        "## How it was made", "", *(made or ["The checkpoint does not say."]), "",
        describe_shapes(model.config), *(["", "| data set | perplexity |", "|---|---|", *scores] if scores else []),
    ]) + "\n"
