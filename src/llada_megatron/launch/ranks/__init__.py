"""Ranks: started on this machine or joined, watched, and what they leave behind."""
