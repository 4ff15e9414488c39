"""The flow, from a base checkpoint to a verified export and its evidence."""
