"""What a run has learned, looked at through its checkpoint: the page of `bov inspect_run`."""
