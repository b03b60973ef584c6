"""The performance gate: assertions for tests about memory, time ratios and costs that must not grow."""
