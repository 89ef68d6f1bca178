"""Records, boxes, chat templates and instruction files. Needs no torch."""
