"""What `scripts.benchmark layers` measures."""
