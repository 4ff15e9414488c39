"""What is left when runs are killed."""
