# What each part of a model is worth to ours at 28 % of the parameters of the base of config/compare_bytes.py: ranks alone,
# with one part beside them, with heads and hidden units, and with all three.
base = "../shared/data/gpt2-bytes"
train_config = "config/compare_bytes_train.py"
dataset = "pydocs"
out_dir = "out/compare_ablation"
seeds = "1"

starts = """
ranks: kron_decompose.py --budget=0.931M --keep=embedding,heads,hidden --calibrate=pydocs | --learning_rate=3e-5
ranks, heads: kron_decompose.py --budget=0.931M --keep=embedding,hidden --calibrate=pydocs | --learning_rate=3e-5
ranks, hidden units: kron_decompose.py --budget=0.931M --keep=embedding,heads --calibrate=pydocs | --learning_rate=3e-5
ranks, embeddings: kron_decompose.py --budget=0.931M --keep=heads,hidden --calibrate=pydocs | --learning_rate=3e-5
ranks, heads, hidden units: kron_decompose.py --budget=0.931M --keep=embedding --calibrate=pydocs | --learning_rate=3e-5
all: kron_decompose.py --budget=0.931M --calibrate=pydocs | --learning_rate=3e-5
"""
