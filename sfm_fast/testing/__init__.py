"""What tests and benchmarks share: op inputs, measuring time and memory."""
