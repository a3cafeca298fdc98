"""Files: what a file is (`identify`), its tensors (`safetensors`, `gguf`), their names and forms, the strict loader.

A new kind of file, or a new stored form, gets a row in `identify`; a form that stays small in memory a function in
`stored` and its tensors in `weights`. May import `failures`, `linear`, `models`, `sizes` and `tune`.
"""
