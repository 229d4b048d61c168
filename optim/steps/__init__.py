"""The step, fast: plain torch, C++ on the CPU, Triton on CUDA, and what they share."""
