"""The checks of every node before a job trains on it: `python -m llada_megatron.launch.cluster.preflight JOB`."""
