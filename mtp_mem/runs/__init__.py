"""Cases become records: sweeps, isolated measurements, predictions, and the files that keep them."""
