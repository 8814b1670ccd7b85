"""From text to this rank's micro-batches: tokenizer, packed MDS shards, global order, loaders."""
