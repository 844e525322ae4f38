"""Train state, step, schedules, input, loop."""
