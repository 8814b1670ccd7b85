"""Pictures of runs from their metrics.jsonl: files, pages and a live view in the terminal. Imports no torch."""
