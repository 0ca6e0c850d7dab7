"""The pictures of a run as one HTML page."""
