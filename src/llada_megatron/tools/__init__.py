"""What people run around a model: prepare data, inspect, environment report, benchmarks."""
