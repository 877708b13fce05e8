"""What `llada bench sample` runs on: a small language, small models that have learnt it, and the peers' samplers."""
