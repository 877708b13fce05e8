"""The agent of a job on each of its nodes: `python -m llada_megatron.launch.cluster.agent JOB`."""
