# What the embeddings' share of the budget is worth with a real vocabulary: a GPT-2 over 4,096 tokens of byte-level BPE, 6
# blocks, 192 wide, at 50 % of its 3.51M parameters, 22 % of which are the token embedding. Its data is
# ../shared/data/gpt2-bpe4k/data, linked to data/bpe4k.
base = "../shared/data/gpt2-bpe4k"
train_config = "config/compare_bytes_train.py"
dataset = "bpe4k"
out_dir = "out/compare_bpe"
seeds = "1"

starts = """
1.8M ours: kron_decompose.py --budget=1.752M --calibrate=bpe4k | --learning_rate=1e-4
1.8M ours, dense embeddings: kron_decompose.py --budget=1.752M --keep=embedding --calibrate=bpe4k | --learning_rate=1e-4
"""
