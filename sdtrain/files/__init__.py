"""Files in and out: safetensors and text, with one reader, one writer and one contract for both."""
