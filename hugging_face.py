"""Hugging Face's GPT-2: directories and hub names, read as data, without transformers and without running code; and a
KronyGPT as a model of transformers."""
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from configurator import UserError
from tokenizer import TOKENIZER_FILES, read_json

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
        raise FileNotFoundError(f"no file or directory {name}, nor models/{name}, and no such model could be fetched "
                                f"from the Hugging Face hub ({type(error).__name__}): is there a network?") from None


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

    from modeling_kronygpt import KronyGPTConfig, KronyGPTForCausalLM

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
