"""A stand-in for Triton's backend "cpu", with which vLLM uses model runner V2 without a GPU.

With ``TRITON_INTERPRET=1`` kernels run in numpy, so that this backend is never asked to compile.
"""
