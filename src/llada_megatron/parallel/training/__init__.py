"""Training: one step under any layout, and the loop that reports, saves and recovers."""
