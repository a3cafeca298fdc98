"""Files: headers, what a file is, tensor names of every style, and the strict load into the models.

A new file format goes here. May import `models` and `linear`.
"""
