"""Evaluation suites of `evaluate`: a module each, with `add_options(parser)` and `run(options)`.

`run` prints what it found, writes its own files into `options.output` and returns what goes into metrics.json.
"""

SUITES = {"attributes": "steerjax.evaluation.attributes", "steerability": "steerjax.evaluation.steerability"}
