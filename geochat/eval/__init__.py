"""Floor 4: benchmarks as data, metrics as pure functions, and the programs that run, score and report them."""
