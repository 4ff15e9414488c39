"""What every room needs below it: reading, hashing, locking, batches, ranks, progress."""
