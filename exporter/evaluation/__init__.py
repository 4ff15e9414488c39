"""What calibration does: replies under every defence, judged, with intervals."""
