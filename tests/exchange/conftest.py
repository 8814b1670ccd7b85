from bov_megatron.compat import register_missing_torchvision_ops

# Test modules import transformers at their head; conftest is read before them.
register_missing_torchvision_ops()
