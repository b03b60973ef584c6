"""The demo: distillation, evaluation and cost on the embedded data, with an HTML page of the results."""
