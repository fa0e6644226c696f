# What each part of a model is worth to ours at half of the parameters of the base of config/compare_base.py: ranks alone,
# with one part beside them, with heads and hidden units, and with all three.
base = "out/base/best.pt"
train_config = "config/compare_base_train.py"
dataset = "pysource"
out_dir = "out/compare_ablation"
seeds = "1"
n_batches = 100

starts = """
ranks: kron_decompose.py --budget=3.451M --keep=embedding,heads,hidden --calibrate=pysource | --learning_rate=3e-4
ranks, heads: kron_decompose.py --budget=3.451M --keep=embedding,hidden --calibrate=pysource | --learning_rate=3e-4
ranks, hidden units: kron_decompose.py --budget=3.451M --keep=embedding,heads --calibrate=pysource | --learning_rate=3e-4
ranks, embeddings: kron_decompose.py --budget=3.451M --keep=heads,hidden --calibrate=pysource | --learning_rate=1e-4
ranks, heads, hidden units: kron_decompose.py --budget=3.451M --keep=embedding --calibrate=pysource | --learning_rate=1e-4
all: kron_decompose.py --budget=3.451M --calibrate=pysource | --learning_rate=1e-4
"""
