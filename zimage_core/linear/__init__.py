"""One linear layer: the SVDQuant INT4 linear, its tile layout, user adapters beside it, and the backends that run it.

The lowest package. May import `sizes`.
"""
