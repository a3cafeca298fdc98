"""Device memory: what a picture needs of it, blocks streamed from the host, CUDA graphs.

May import `formats`, `models` and `linear`.
"""
