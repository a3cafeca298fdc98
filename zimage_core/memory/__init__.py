"""Device memory: what a picture takes of it, what is streamed from the host, CUDA graphs.

May import `formats`, `models`, `linear`, `sampler`, `tiles` and `sizes`.
"""
