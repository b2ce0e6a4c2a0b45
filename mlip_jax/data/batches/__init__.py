"""From records to training batches, in worker processes, by seed and step alone."""
