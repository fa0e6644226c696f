# Kronecker products or low rank? Shapes of the MLPs fitted to text, with about as many parameters as (256, 256, 1), on the
# base of config/compare_bytes.py; attention and embeddings stay dense.
base = "../shared/data/gpt2-bytes"
train_config = "config/compare_bytes_train.py"
dataset = "pydocs"
out_dir = "out/compare_kronecker"
seeds = "1"

starts = """
Kronecker (256, 256, 1): kron_decompose.py 256 256 1 --calibrate=pydocs | --learning_rate=3e-4
Kronecker (64, 64, 16): kron_decompose.py 64 64 16 --calibrate=pydocs | --learning_rate=3e-4
low rank (256, 1, 53): kron_decompose.py 256 1 53 --calibrate=pydocs | --learning_rate=3e-4
low rank, ranks by loss: kron_decompose.py --budget=1.718M --matrices=mlp --calibrate=pydocs | --learning_rate=3e-4
"""
