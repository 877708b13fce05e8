"""Attention over a pattern: one module (`pattern_attention`), one place that chooses how it is computed (`backends`),
and one file for each way. All are equal to a softmax over the keys that the pattern lets a query see."""
