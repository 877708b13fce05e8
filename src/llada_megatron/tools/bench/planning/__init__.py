"""Published measurements of training runs, and what the planner predicts for each."""
