"""Jobs on a cluster: what `llada submit` renders, and what runs on the nodes once SLURM has started it."""
