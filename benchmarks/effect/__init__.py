"""What calibration does to replies."""
