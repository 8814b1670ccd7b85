"""CORE: 21 tasks of DCLM's evaluation bundle, scored as in arXiv 2606.02780."""
