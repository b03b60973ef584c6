"""The measurements, one module per suite; `presets.SUITES` lists them."""
