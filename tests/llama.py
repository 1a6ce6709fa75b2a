"""Llama in numpy, from the files of a folder: what `transformers` computes, slowly."""

import json

import numpy as np
import safetensors.numpy


def logits(folder, tokens):
    """f64[T, V] of tokens [T]; matrices are stored as [outputs, inputs]."""
    config = json.loads((folder / "config.json").read_text())
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    weights = {name: value.astype(np.float64) for name, value in stored.items()}
    embedding = weights.pop("model.embed_tokens.weight")
    stream = embedding[np.asarray(tokens)]
    for number in range(config["num_hidden_layers"]):
        start = f"model.layers.{number}."
        layer = {
            name.removeprefix(start): weights.pop(name)
            for name in list(weights)
            if name.startswith(start)
        }
        stream = stream + _attention(
            _norm(stream, layer, config, "input"), layer, config
        )
        inputs = _norm(stream, layer, config, "post_attention")
        gate = inputs @ layer["mlp.gate_proj.weight"].T
        up = inputs @ layer["mlp.up_proj.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * up
        stream = stream + hidden @ layer["mlp.down_proj.weight"].T
    final = {"x_layernorm.weight": weights.pop("model.norm.weight")}
    head = embedding if config["tie_word_embeddings"] else weights.pop("lm_head.weight")
    assert not weights
    return _norm(stream, final, config, "x") @ head.T


def _norm(stream, layer, config, name):
    square = np.mean(stream * stream, axis=-1, keepdims=True)
    scaled = stream / np.sqrt(square + config["rms_norm_eps"])
    return layer[f"{name}_layernorm.weight"] * scaled


def _attention(inputs, layer, config):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    length, size = len(inputs), config["head_dim"]

    def project(name, count):
        found = inputs @ layer[f"self_attn.{name}_proj.weight"].T
        return found.reshape(length, count, size)

    query, key = _turn(project("q", heads), config), _turn(project("k", groups), config)
    key, value = (
        np.repeat(x, heads // groups, axis=1) for x in (key, project("v", groups))
    )
    scores = np.einsum("tnh,snh->nts", query, key) / np.sqrt(size)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    seen = np.einsum("nts,snh->tnh", shares, value).reshape(length, -1)
    return seen @ layer["self_attn.o_proj.weight"].T


def _turn(heads, config):
    """The first half of a head turns with the second."""
    length, _, size = heads.shape
    turns = config["rope_theta"] ** -(np.arange(0, size, 2) / size)
    angle = np.tile(np.arange(length)[:, None] * turns, 2)[:, None]
    first, second = np.split(heads, 2, axis=-1)
    return heads * np.cos(angle) + np.concatenate([-second, first], -1) * np.sin(angle)
