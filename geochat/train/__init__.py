"""Training: arguments, data layout, loss, saves. Entry point: `python -m geochat.train.train`."""
