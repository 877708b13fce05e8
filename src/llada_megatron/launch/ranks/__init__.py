"""The ranks of a run: started on this machine or by torchrun or srun, watched for hangs, and their reports."""
