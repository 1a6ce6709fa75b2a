"""Half-space reporting and exact sparse attention in JAX.

`build`, `query`, `count`, `insert`, `delete` report all stored keys k with
<a, k> >= b. `attention`, and `init_cache`, `extend`, `reindex`, `decode_attention`
for growing caches, look only at the keys that fire; `explain` says what a call will do.
`reference` is the slow oracle, `theory` the paper's formulas.
"""

from hsrjax import reference as reference
from hsrjax import theory as theory
from hsrjax.activations import CELU as CELU
from hsrjax.activations import SELU as SELU
from hsrjax.activations import Entmax as Entmax
from hsrjax.activations import PReLU as PReLU
from hsrjax.activations import ReLU as ReLU
from hsrjax.activations import Softmax as Softmax
from hsrjax.attention import attention as attention
from hsrjax.decode import KVCache as KVCache
from hsrjax.decode import decode_attention as decode_attention
from hsrjax.decode import extend as extend
from hsrjax.decode import init_cache as init_cache
from hsrjax.decode import reindex as reindex
from hsrjax.explain import Explanation as Explanation
from hsrjax.explain import explain as explain
from hsrjax.index import Index as Index
from hsrjax.index import build as build
from hsrjax.index import delete as delete
from hsrjax.index import insert as insert
from hsrjax.query import Report as Report
from hsrjax.query import count as count
from hsrjax.query import query as query
from hsrjax.reported import Info as Info

__version__ = "0.1.0"

__all__ = (
    "CELU",
    "SELU",
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
