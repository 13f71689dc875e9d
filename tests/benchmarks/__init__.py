"""The benchmarks' own logic: what they say when something goes wrong."""
