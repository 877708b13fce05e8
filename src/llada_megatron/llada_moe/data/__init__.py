"""Text to packed training windows."""
