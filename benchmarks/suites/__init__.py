"""What is measured, one module a suite; `presets.SUITES` lists them."""
