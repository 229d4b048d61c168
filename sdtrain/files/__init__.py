"""Files in and out: safetensors and text, read by one reader and written whole or not at all; no torch but for tensors."""
