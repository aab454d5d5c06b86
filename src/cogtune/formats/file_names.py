"""Names by which others find what is in a folder; no import here, since commands that only look are done at once."""

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""An adapter's file, as diffusers and PEFT call it."""
