"""The operations that attention is made of, and the code that runs them."""

from hsrjax._src.kernels.base import register
from hsrjax._src.kernels.triton.implementation import Triton
from hsrjax._src.kernels.xla.implementation import XLA

register(XLA())
register(Triton())
