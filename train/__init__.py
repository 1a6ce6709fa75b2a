"""Training of ReLU-attention language models: run `python -m train --help`.

From what is needed to what needs it; nothing imports from further down:

config, data   every option of a run and the presets; a corpus as shuffled batches
step           pure loss, train step and evaluation step
processes      where arrays live: one device, many, many processes
telemetry      what every head of a model does on held-out text
files/         the run folder: config.json, checkpoints, metrics, written and read
loop           the training loop: logging, evaluation, checkpoints, resume
plots          pictures: loss, sparsity by layer and head, which keys fire
commands/      `python -m train report | compare | export | length | speed | study`
__main__, demo what is started: the header of all commands; train, generate, compare
"""
