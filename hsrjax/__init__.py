"""Half-space reporting and exact sparse attention in JAX.

`build`, `query`, `count`, `insert`, `delete` report all stored keys k with
<a, k> >= b. `attention`, and `init_cache`, `extend`, `reindex`, `decode_attention`
for growing caches, look only at the keys that fire; `explain` says what a call will do.
`Activation` is what your own weights subclass. `reference` is the slow oracle, `theory`
the paper's formulas. What is in `_src` is private.
"""

from hsrjax import reference as reference
from hsrjax import theory as theory
from hsrjax._src.activations.base import Activation as Activation
from hsrjax._src.activations.closed import CELU as CELU
from hsrjax._src.activations.closed import SELU as SELU
from hsrjax._src.activations.closed import PReLU as PReLU
from hsrjax._src.activations.entmax import Entmax as Entmax
from hsrjax._src.activations.relu import ReLU as ReLU
from hsrjax._src.activations.softmax import Softmax as Softmax
from hsrjax._src.attention import attention as attention
from hsrjax._src.core.tiles import Info as Info
from hsrjax._src.decode import KVCache as KVCache
from hsrjax._src.decode import decode_attention as decode_attention
from hsrjax._src.decode import extend as extend
from hsrjax._src.decode import init_cache as init_cache
from hsrjax._src.decode import reindex as reindex
from hsrjax._src.explain import Explanation as Explanation
from hsrjax._src.explain import explain as explain
from hsrjax._src.flax_attention import attention_fn as attention_fn
from hsrjax._src.index.index import Index as Index
from hsrjax._src.reporting import Report as Report
from hsrjax._src.reporting import build as build
from hsrjax._src.reporting import count as count
from hsrjax._src.reporting import delete as delete
from hsrjax._src.reporting import insert as insert
from hsrjax._src.reporting import query as query

__version__ = "0.1.0"

__all__ = (
    "CELU",
    "SELU",
    "Activation",
    "Entmax",
    "Explanation",
    "Index",
    "Info",
    "KVCache",
    "PReLU",
    "ReLU",
    "Report",
    "Softmax",
    "attention",
    "attention_fn",
    "build",
    "count",
    "decode_attention",
    "delete",
    "explain",
    "extend",
    "init_cache",
    "insert",
    "query",
    "reference",
    "reindex",
    "theory",
)
