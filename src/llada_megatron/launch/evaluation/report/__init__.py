"""The page of `llada eval report`: what runs and results say, side by side."""
