"""What the kernels offer; imported where one is launched."""

from hsrjax._src.kernels.triton.append import append as append
from hsrjax._src.kernels.triton.best import best as best
from hsrjax._src.kernels.triton.launch import scan_and_sum as scan_and_sum
from hsrjax._src.kernels.triton.launch import sum_all as sum_all
from hsrjax._src.kernels.triton.select import with_tail as with_tail
from hsrjax._src.kernels.triton.select import within as within
