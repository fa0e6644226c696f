"""The model card of a compressed export: README.md with the front matter of the Hugging Face hub, filled from what the
checkpoint and those that it was made of say of themselves."""
import math
from pathlib import Path

from kronygpt import checkpoint
from kronygpt.configurator import UserError
from kronygpt.tokenizer import read_json

MARK = "<!-- Written by kron_to_gpt.py, which replaces this file; without this line it stays. -->"
LONGEST_NAME = 100  # of a model on the hub
MOST_STEPS = 10  # of a history
TRAINING = ("dataset", "learning_rate", "max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "teacher")
UNSAID = ("init_from", "tokenizer", "out")  # options that a step of the history says otherwise, or not at all


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
                             for _, matrix in model.matrices() if not matrix.is_dense)
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
