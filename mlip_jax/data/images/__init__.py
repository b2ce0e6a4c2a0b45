"""From encoded images to arrays: decoding, augmentation, preprocessing."""
