"""Pretraining with a Bank of Values (arXiv 2606.02780) on Megatron-core."""

from bov_megatron.compat import install_torchvision_fix

# The one thing that importing the package does: many of its dependencies import torchvision, from many places.
install_torchvision_fix()

__version__ = "0.1.0"
