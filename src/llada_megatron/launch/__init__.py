"""How a job starts and survives: commands, ranks on this machine, jobs on a cluster, and batches of samples."""
