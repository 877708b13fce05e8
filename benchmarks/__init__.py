"""What proves the project and is not installed: `python -m benchmarks.NAME` in the root of a checkout.

- `chaos`: faults at random into a job on a real SLURM that is started on this machine
- `sample_peers`: the sampling presets beside the samplers of LLaDA and Fast-dLLM

Modules here import llada_megatron; nothing there imports these.
"""
