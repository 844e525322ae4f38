"""Evaluation suites, a module each: `run(options)` prints, writes into `options.output`, returns metrics."""
