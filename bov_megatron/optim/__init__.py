"""Parameter groups, schedules, Muon and the sharded optimizer (arXiv 2606.02780, "Optimisation")."""
