"""What is logged of an update: metrics, callbacks, hints."""
