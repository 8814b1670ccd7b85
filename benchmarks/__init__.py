"""What `tools/bench.py` measures: whole training steps, core attention, the data loader, table lookups, generation."""
