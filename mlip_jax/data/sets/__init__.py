"""What a dataset is, and every kind of it: records of image bytes, captions and labels."""
