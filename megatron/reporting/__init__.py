"""Comparison of runs: loading, paired differences and the HTML report."""
