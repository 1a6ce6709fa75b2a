"""The shape of a model: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from models.network.rope import RopeScaling, frequencies

AttentionKind = Literal[
    "softmax", "relu", "relu_length", "threshold_relu", "differential_relu", "entmax"
]
Threshold = Literal["gaussian", "cap"]
Method = Literal["dense", "hsr", "auto"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]

_CHOICES = {
    "attention_kind": get_args(AttentionKind),
    "attention": get_args(Method),
    "dtype": get_args(ComputeDtype),
    "param_dtype": get_args(ComputeDtype),
    "threshold": get_args(Threshold),
}
# The largest value of each integer field: far above any model that fits a machine, so
# that a damaged file is refused before anything is allocated.
_LARGEST = {
    "vocab_size": 2**24,
    "num_layers": 2**12,
    "embed_dim": 2**20,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**10,
    "value_dim": 2**12,
    "mlp_dim": 2**22,
    "relu_power": 16,
    "capacity": 2**31 - 1,
    "top_r": 2**31 - 1,
    "tail": 32,
    "rotary_dim": 2**10,
    "window": 2**31 - 1,
    "nope_interval": 2**12,
}
_MAY_BE_NONE = ("value_dim", "qk_norm", "output_norm", "capacity", "top_r", "epsilon")
_MAY_BE_NONE += ("tail", "rotary_dim", "rope_scaling", "window", "nope_interval")
_FLOATS = ("rope_theta", "norm_eps", "epsilon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      num_layers: number of blocks.
      embed_dim: width of the residual stream.
      num_heads: query heads N.
      num_kv_heads: key and value heads K; N must be a multiple of K.
      head_dim: query and key head size H; even, because RoPE turns pairs.
      mlp_dim: hidden width of the SwiGLU feed-forward layer.
      value_dim: value head size; None is head_dim.
      vocab_size: 256 for models that read bytes.
      attention_kind: "softmax"; "relu", the paper's ReLU^p with a learnable bias per
        head and row sums; "relu_length", the same divided by the visible length;
        "threshold_relu", ReLU^p on unit-norm queries and keys above a threshold that
        grows with the visible length, RMSNorm on the output; "differential_relu", one
        such view minus a learnable share of a second one (twice the query and key
        heads); "entmax", 1.5-entmax, softmax with exact zeros.
      relu_power: p of the ReLU kinds; 3 trains best in the recipe study.
      threshold: thresholded kinds: "gaussian" takes scores between unit vectors for
        normal, "cap" uses their exact law, which matters for head_dim up to 16.
      keep_self: adds a learnable multiple of a position's own value, so that no row is
        empty.
      qk_norm: queries and keys of unit length, with a learnable factor per head where
        no threshold sets the scale; None is the kind's own choice, True for thresholded
        kinds, which cannot do without.
      output_norm: RMSNorm on the output of attention; None is the kind's own choice,
        True for thresholded kinds.
      attention: which hsrjax method computes it. It changes speed and, beyond
        rounding, never the result, and the parameters are the same for all three.
      capacity: slots of the hsr method; None lets hsrjax choose.
      top_r: softmax only: keep the r best keys of every query. An approximation.
      epsilon: softmax only: leave out at most this share of the mass. Likewise.
      tail: with either: what is left out acts through sketches, its values as means of
        so many consecutive keys. See `hsrjax.Softmax`.
      rope_theta: base of the RoPE wavelengths.
      rope_scaling: how they are stretched for longer rows, see `models.network.rope`.
      rotary_dim: first dimensions of a query and key head that turn; None is all.
      nope_interval: every so many layers, one has no positions (SmolLM3).
      window: keys a query sees, itself included; None is all up to itself.
      window_from: the first layer with a window (Qwen2).
      head_norm: RMSNorm with a learned scale on query and key heads, before RoPE
        (Qwen3).
      qkv_bias, out_bias, mlp_bias: whether these layers add a bias.
      norm_eps: added to the mean square in every RMSNorm.
      tie_embeddings: whether the output layer is the transposed embedding.
      dtype: of the computation.
      param_dtype: of the parameters; what is trained is float32.

    Raises:
      ValueError: a field has the wrong type or a value that no model can have.

    Example:
      >>> config = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2,
      ...                      head_dim=16, mlp_dim=128)
      >>> config.value_size
      16
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    value_dim: int | None = None
    vocab_size: int = 256
    attention_kind: AttentionKind = "threshold_relu"
    relu_power: int = 3
    threshold: Threshold = "gaussian"
    keep_self: bool = False
    qk_norm: bool | None = None
    output_norm: bool | None = None
    attention: Method = "auto"
    capacity: int | None = None
    top_r: int | None = None
    epsilon: float | None = None
    tail: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    nope_interval: int | None = None
    window: int | None = None
    window_from: int = 0
    head_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dtype: ComputeDtype = "float32"
    param_dtype: ComputeDtype = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_field(field.name, getattr(self, field.name))
        _check_together(self)

    @property
    def value_size(self) -> int:
        """The value head size with None resolved."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def turning_dim(self) -> int:
        """`rotary_dim` with None resolved."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def layer_window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees; None is all."""
        return self.window if layer >= self.window_from else None

    def layer_turns(self, layer: int) -> bool:
        """Whether this layer has rotary positions."""
        return self.nope_interval is None or (layer + 1) % self.nope_interval != 0

    @property
    def is_thresholded(self) -> bool:
        """Whether thresholds grow with the length and follow a schedule."""
        return self.attention_kind in ("threshold_relu", "differential_relu")

    @property
    def normalizes_heads(self) -> bool:
        """`qk_norm` with None resolved."""
        return self.is_thresholded if self.qk_norm is None else self.qk_norm

    @property
    def normalizes_output(self) -> bool:
        """`output_norm` with None resolved."""
        return self.is_thresholded if self.output_norm is None else self.output_norm

    @property
    def views(self) -> int:
        """Query heads per head of the output: two where one is subtracted."""
        return 2 if self.attention_kind == "differential_relu" else 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> ModelConfig:
        """Makes a config of what `to_dict` wrote, trusting nothing.

        Args:
          fields: the dictionary; anything else is refused.

        Raises:
          ValueError: not a dictionary, a field is missing, unknown or impossible.
        """
        if not isinstance(fields, dict):
            raise ValueError(
                "ModelConfig.from_dict: expected a dictionary of fields, got "
                f"{type(fields).__name__}; pass what ModelConfig.to_dict() returned."
            )
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in fields if name not in known)
        missing = sorted(
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in fields
        )
        if unknown or missing:
            raise ValueError(
                f"ModelConfig.from_dict: missing fields {missing}, unknown fields "
                f"{unknown}; the fields are {', '.join(known)}."
            )
        scaling = fields.get("rope_scaling")
        if scaling is not None:
            fields = fields | {"rope_scaling": RopeScaling.from_dict(scaling)}
        return cls(**fields)


def _check_field(name: str, value: Any) -> None:
    if value is None and name in _MAY_BE_NONE:
        return
    if name in _CHOICES:
        choices = _CHOICES[name]
        if not isinstance(value, str) or value not in choices:
            raise ValueError(
                f"ModelConfig: {name} must be one of {', '.join(choices)}, got "
                f"{value!r}; choose one of them."
            )
    elif name in _LARGEST:
        if type(value) is not int or not 1 <= value <= _LARGEST[name]:
            raise ValueError(
                f"ModelConfig: {name} must be an integer from 1 to {_LARGEST[name]}, "
                f"got {value!r}; give a value in that range."
            )
    elif name in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"ModelConfig: {name} must be a number, got {value!r}.")
        if not 0 < value < math.inf:
            raise ValueError(
                f"ModelConfig: {name} must be a finite number above 0, got {value!r}; "
                "leave it out to take the default."
            )
    elif name == "rope_scaling":
        if not isinstance(value, RopeScaling):
            raise ValueError(
                f"ModelConfig: rope_scaling must be a RopeScaling, got {value!r}."
            )
    elif name == "window_from":
        if type(value) is not int or value < 0:
            raise ValueError(
                f"ModelConfig: window_from must be an integer from 0, got {value!r}."
            )
    elif not isinstance(value, bool):
        raise ValueError(f"ModelConfig: {name} must be True or False, got {value!r}.")


def _check_together(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            "ModelConfig: num_heads must be a multiple of num_kv_heads, got "
            f"{config.num_heads} and {config.num_kv_heads}; "
            f"use num_kv_heads={math.gcd(config.num_heads, config.num_kv_heads)}."
        )
    if config.head_dim % 2:
        raise ValueError(
            "ModelConfig: head_dim must be even because RoPE turns pairs, got "
            f"{config.head_dim}; use {config.head_dim + 1}."
        )
    if config.turning_dim % 2 or config.turning_dim > config.head_dim:
        raise ValueError(
            f"ModelConfig: rotary_dim must be even and at most head_dim, got "
            f"{config.rotary_dim} and {config.head_dim}; leave it out to turn all."
        )
    scaling = config.rope_scaling
    if scaling is not None:
        try:
            frequencies(config.turning_dim, theta=config.rope_theta, scaling=scaling)
        except ArithmeticError as error:
            raise ValueError(
                f"ModelConfig: rope_theta={config.rope_theta} and rope_scaling give no "
                f"wavelengths ({error})."
            ) from error
    if config.is_thresholded and not config.normalizes_heads:
        raise ValueError(
            "ModelConfig: thresholds are those of unit vectors, got qk_norm=False with "
            f"attention_kind={config.attention_kind!r}; leave it out."
        )
    limited = config.top_r is not None or config.epsilon is not None
    if limited and config.attention_kind != "softmax":
        raise ValueError(
            "ModelConfig: top_r and epsilon approximate softmax attention, got "
            f"attention_kind={config.attention_kind!r}, which is sparse and exact "
            "already; leave them out and use attention='hsr'."
        )
    if config.top_r is not None and config.epsilon is not None:
        raise ValueError(
            f"ModelConfig: top_r and epsilon exclude each other, got {config.top_r} "
            f"and {config.epsilon}; give one of them."
        )
    if config.epsilon is not None and config.epsilon >= 1:
        raise ValueError(
            f"ModelConfig: epsilon must lie between 0 and 1, got {config.epsilon}; "
            "1e-3 is a good start."
        )
    if config.tail is not None and (config.tail.bit_count() != 1 or not limited):
        raise ValueError(
            "ModelConfig: tail must be 1, 2, 4, 8, 16 or 32, with top_r or epsilon, "
            f"which leave keys out, got tail={config.tail}, top_r={config.top_r} and "
            f"epsilon={config.epsilon}."
        )
