"""The exported Hugging Face model (self-contained files) and the way there."""
