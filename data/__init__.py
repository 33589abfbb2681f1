"""Text to packed training rows."""
