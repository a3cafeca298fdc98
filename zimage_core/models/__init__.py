"""The networks: transformer, text encoder, VAE, their sizes and the operations between a block's linears.

Modules take their linears from a factory, so they know nothing of files or of memory. May import `failures`, `linear`
and `sizes`.
"""
