"""The exported Hugging Face model: files that ship with every export."""
