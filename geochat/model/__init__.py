"""Models: built from parts, read and written as checkpoints, adapted with LoRA or DoRA, merged."""
