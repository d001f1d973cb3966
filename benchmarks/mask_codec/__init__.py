"""What the mask codecs save, and what they cost."""
