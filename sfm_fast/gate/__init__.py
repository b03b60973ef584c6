"""The performance gate: assertions on memory, time ratios and costs that must not grow, for tests."""
