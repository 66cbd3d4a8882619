"""What `scripts.benchmark attention` does: cases and their kernels, the check of each result, the measurement, the report."""
