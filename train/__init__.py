"""Training of ReLU-attention language models: run `python -m train --help`.

config       every option of a run as one frozen dataclass, and the presets
data         corpus of bytes -> rows -> shuffled batches, position saved and restored
command      options from the command line, errors in one sentence
step         pure loss, train step and evaluation step
loop         the training loop: logging, evaluation, checkpoints, resume
checkpoints  the run folder: written atomically, read with clear errors
metrics      CSV and TensorBoard files of a run
plots        pictures: loss, sparsity by layer and head, which keys fire
demo         `python -m train.demo`: train, generate twice, compare
"""
