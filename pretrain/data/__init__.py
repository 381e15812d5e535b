"""From text to batches: token store, order, packing, and labelled tasks."""
