"""How a job starts: local workers, training and sampling programs."""
