"""Jobs on a cluster: what `llada submit` writes, and what runs on the nodes once SLURM has started the job."""
