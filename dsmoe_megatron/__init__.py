"""Dense training, sparse inference: mixture-of-experts language models on Megatron-Core (arXiv 2404.05567)."""

__version__ = "0.1.0"
