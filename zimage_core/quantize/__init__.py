"""Making small files: SVDQuant INT4 transformers, calibrated or not, and 8-bit or 4-bit text encoders.

May import what is below the pipeline: `failures`, `formats`, `linear`, `lora`, `memory`, `models`, `sampler`,
`sizes`, `whole`.
"""
