"""Next to nothing: shows whether triton works."""

import triton
import triton.language as tl


@triton.jit
def one(x_ptr):
    tl.store(x_ptr, 1)
