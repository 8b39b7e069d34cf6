"""Data sets: folders of pictures, captions, training batches."""
