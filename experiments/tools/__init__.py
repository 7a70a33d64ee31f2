"""Commands and helpers beside main: exports, evaluation data, estimates, plots."""
