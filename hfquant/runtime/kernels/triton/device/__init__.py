"""What runs on the GPU.  Its functions are compiled by Triton, whose types are not Python's; launchers are typed."""
