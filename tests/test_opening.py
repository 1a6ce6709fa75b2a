"""Paths that hold no model: named for what they are, in one sentence."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from models.files.runs import ModelFileError
from models.opening import open_model


def refused(name, words):
    with pytest.raises(ModelFileError, match=words) as caught:
        open_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    "name",
    ["org/some-model", "https://huggingface.co/org/some-model", "hf://org/some-model"],
)
def test_a_name_of_the_hub_says_how_it_is_fetched(name):
    said = refused(name, "`hf download org/some-model --local-dir some-model`")
    assert said.startswith(name)
    assert said.endswith("--model some-model")


def test_a_path_that_is_missing_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    refused("runs/mine", "runs/mine does not exist")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": "{}"}, "is a PEFT adapter, not a model: merge it"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}',
             "config.json": "{}"},
            "is a PEFT adapter of org/base",
        ),
        ({"small.gguf": ""}, r"a folder with a GGUF file: .* --model .*small\.gguf"),
        ({"a.gguf": "", "b.gguf": ""}, r"2 GGUF files: .* --model .*a\.gguf"),
        ({"model_index.json": "{}"}, "a pipeline of diffusers"),
        ({"snapshots/abc/config.json": "{}"}, "--model .*snapshots/abc"),
        ({"checkpoint-9/config.json": "{}"}, "--model .*checkpoint-9"),
        ({"pytorch_model.bin": ""}, r"weights \(pytorch_model.bin\) without their"),
        ({"notes.txt": ""}, "holds no config.json, so it is not a run folder"),
    ],
)  # fmt: skip
def test_folders_are_named_for_what_they_are(files, words, tmp_path):
    refused(fill(tmp_path, files), words)


def test_files_are_named_for_what_they_are(tmp_path):
    fill(tmp_path, {"model.safetensors": ""})
    refused(tmp_path / "model.safetensors", f"give its folder, {tmp_path}")
    for field, value, words in (
        ("general.type", "adapter", "'adapter': it is no language model"),
        ("split.count", 3, "one of 3 parts: join them"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), "f4"))
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(field, value, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / "x.gguf", words)


def test_a_model_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, {"mine/config.json": json.dumps({"model_type": "gpt2"})})
    refused("~/mine", f"{tmp_path}/mine cannot be loaded")
    assert not Path("~").exists()
