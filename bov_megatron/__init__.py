"""Pretraining with a Bank of Values (arXiv 2606.02780) on Megatron-core."""

__version__ = "0.1.0"
