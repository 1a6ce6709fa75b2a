"""How published models turn positions: what their files say, none of it passed over."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.files.families import model_config
from models.files.fields import Fields
from models.files.positions import gguf_rope, rope_fields, scaling
from models.network.rope import frequencies, yarn_gain

HERE = Path(__file__).parent / "pretrained"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = {"mscale": 0.707, "mscale_all_dim": 1.0}


def turns(rope, **fields):
    """Radians per position, and what queries and keys are multiplied by."""
    content = json.loads((HERE / "llama3" / "config.json").read_text())
    config = model_config(content | {"rope_scaling": rope, "head_dim": 64} | fields)
    return frequencies(
        config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling
    )


@pytest.mark.parametrize(
    ("more", "gain"),
    [
        ({}, 0.1 * np.log(4) + 1),
        (MSCALE, (0.0707 * np.log(4) + 1) / (0.1 * np.log(4) + 1)),
        (MSCALE | {"mscale": 1.0}, 1.0),
        ({"mscale": 0.707}, 0.1 * np.log(4) + 1),  # alone it says nothing
        (MSCALE | {"attention_factor": 1.5}, 1.5),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_the_gain_of_yarn_is_that_of_transformers(more, gain):
    assert turns(YARN | more)[1] == pytest.approx(gain)
    nested = {"full_attention": YARN | more, "sliding_attention": YARN | more}
    assert turns(nested)[1] == pytest.approx(gain)


def test_the_ramp_of_yarn_begins_at_whole_dimensions_unless_told_otherwise():
    """With theta 500 it would begin at -6, cut at 0, and ends where turns are one."""
    plain, _ = turns(None)
    one = 64 * np.log(64 / (2 * np.pi)) / (2 * np.log(500))
    for truncate, end in ((True, np.ceil(one)), (False, one)):
        found, _ = turns(YARN | {"truncate": truncate})
        place = np.arange(32) / end
        want = plain * (1 - 0.75 * np.clip(place, 0, 1))
        np.testing.assert_allclose(found, want, rtol=1e-6)
    whole, _ = turns(YARN)
    np.testing.assert_array_equal(whole, turns(YARN | {"truncate": True})[0])


STORED = {"scaling.type": "yarn", "scaling.factor": 4.0}
STORED |= {"scaling.original_context_length": 16}


@pytest.mark.parametrize(
    ("stored", "want"),
    [
        ({}, None),
        ({"scaling.type": "none", "scaling.factor": 2.0}, None),
        ({"scaling.factor": 2.0}, {"kind": "linear", "factor": 2.0}),
        ({"scale_linear": 2.0}, {"kind": "linear", "factor": 2.0}),
        (STORED, {"kind": "yarn", "beta_fast": 32.0, "attention_factor": None}),
        (STORED | {"scaling.yarn_beta_fast": 8.0}, {"beta_fast": 8.0}),
        (
            STORED | {"scaling.attn_factor": 2.0},
            {"attention_factor": 2 * yarn_gain(4.0)},
        ),
        (STORED | {"scaling.yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multi"),
        ({"dimension_sections": [1]}, "rope.dimension_sections is not known"),
    ],
)
def test_what_a_file_says_of_positions(stored, want):
    metadata = {"llama.rope.freq_base": 100.0}
    metadata |= {f"llama.rope.{name}": value for name, value in stored.items()}
    read = lambda: Fields({"rope_parameters": gguf_rope("llama", metadata, None, {})})
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            read()
        return
    found = scaling(rope_fields(read()), read())
    assert found is want if want is None else want.items() <= vars(found).items()
