# Kronecker products or low rank? Shapes of the MLPs fitted to text, with about as many parameters as (256, 256, 1), on the
# base of config/compare_base.py; attention and embeddings stay dense.
base = "out/base/best.pt"
train_config = "config/compare_base_train.py"
dataset = "pysource"
out_dir = "out/compare_kronecker"
seeds = "1"
n_batches = 100

starts = """
Kronecker (256, 256, 1): kron_decompose.py 256 256 1 --calibrate=pysource | --learning_rate=3e-4
Kronecker (64, 64, 16): kron_decompose.py 64 64 16 --calibrate=pysource | --learning_rate=1e-3
low rank (256, 1, 53): kron_decompose.py 256 1 53 --calibrate=pysource | --learning_rate=3e-4
low rank, ranks by loss: kron_decompose.py --budget=4.542M --matrices=mlp --calibrate=pysource | --learning_rate=3e-4
"""
