"""All that touches ComfyUI: model files, MODEL, CLIP and VAE around `zimage_core`, sampling, messages.

May import ComfyUI and `zimage_core`; only the node classes in `nodes/` import it.
Written against ComfyUI 0.18 and 0.33: what differs between them is probed.
"""
