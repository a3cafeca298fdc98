"""LoRA files of every style, and their application to a model whose own weights stay as they are.

May import `formats`, `models` and `linear`.
"""
