"""Likelihood and infilling quality."""
