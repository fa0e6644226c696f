"""Hugging Face's GPT-2: directories and hub names, read as data, without transformers and without running code; and a
KronyGPT and its tokenizer for transformers, and their upload."""
import json
import shutil
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from kronygpt.configurator import UserError
from kronygpt.tokenizer import TOKENIZER_FILES, read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
COMPRESSED_TYPE = "kronygpt"  # model_type of modeling_kronygpt.py: factors that are not expanded
HUB_SECONDS = 5  # that the hub has for its first answer
FUNCTION = {  # fields of a GPT-2's config.json that change its function, with the values of the one computed here
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "quantization_config": (None,),
}


def reach_hub():
    """Ask the Hugging Face hub for an answer, once. Where there is none, use its local caches from now on, without minutes
    of retries. It is called before `datasets` is imported."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        answers = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code < 500
    except Exception:  # the errors of its HTTP clients have no class in common
        answers = False
    if not answers:
        constants.HF_HUB_OFFLINE = True


def hub_dataset(name, config=None, split="train", revision=None):
    """A data set of the hub, or from its local cache, as a datasets.Dataset."""
    reach_hub()
    from datasets import load_dataset

    return load_dataset(name, config, split=split, revision=revision)


def download(name):
    """Fetch a model from the Hugging Face hub, or find it in the hub's local cache; only its data files.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: there is no such model, or no network.
    """
    from huggingface_hub import snapshot_download

    reach_hub()
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            directory = Path(snapshot_download(name, allow_patterns=["config.json", weights, *TOKENIZER_FILES]))
            if any((directory / file).exists() for file in WEIGHTS):
                break
        return directory
    except Exception as error:  # the hub's errors have no class in common
        places = name if name.startswith("models/") else f"{name}, nor models/{name}"
        raise FileNotFoundError(f"no file or directory {places}, and no such model could be fetched from the Hugging Face "
                                f"hub ({type(error).__name__}): is there a network?") from None


def check_push(name):
    """Raise UserError where it is plain before an upload that the hub will not take it: a name that is no ORG/NAME, no
    network, no token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push={name} is no name for the hub: {error}") from None
    if "/" not in name:
        raise UserError(f"--push={name} does not say whose model it is: give ORG/NAME")
    reach_hub()
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push={name} needs a network: the Hugging Face hub does not answer, or HF_HUB_OFFLINE is set",
                        status=1)
    if not get_token():
        raise UserError(f"--push={name} needs a token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN")


def upload(directory, name):
    """Upload a directory to a model repository of the hub, which is made where there is none.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=directory)
        return address
    except Exception as error:  # the hub's errors have no class in common
        raise UserError(f"{directory} is written, but not uploaded to {name} ({type(error).__name__}: {error})",
                        status=1) from None


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
    for name, matrix in model.matrices():
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
    for name, matrix in model.matrices():
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
