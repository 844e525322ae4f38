"""SteerLM in JAX: reward models that predict human ratings, and chat models that are steered by them.

    import steerjax

    rm = steerjax.load("runs/rm")  # a run, a checkpoint, a Hugging Face folder or a hub id
    rm.rate("What is RoPE?", ["A rotation of queries and keys by their positions.", "No idea."])
    # a list of two mappings: helpfulness, correctness, ... of each response

    chat = steerjax.load("runs/sft")
    chat.generate("Why is the sky blue?", {"verbosity": 1})
    for piece in chat.stream("Why is the sky blue?", {"verbosity": 4, "complexity": 4}):
        print(piece, end="")

    config = steerjax.recipe("rm")  # as --config rm; or a file's path
    config.data.train = ("ratings.jsonl",)
    steerjax.fit(config, workdir="runs/mine")  # run again with the same workdir, it resumes

    served = steerjax.connect("http://localhost:8000")  # a server with an exported model
    served.generate("Why is the sky blue?", {"verbosity": 1})

Every error that a user can cure is a `SteerjaxError`, whose message says what is wrong, where, and the cure. The
commands are the same things in a terminal: `steerjax --help`.
"""

from steerjax.api import Model, ServedModel, connect, fit, load, recipe
from steerjax.errors import SteerjaxError

__all__ = ["Model", "ServedModel", "SteerjaxError", "connect", "fit", "load", "recipe"]
__version__ = "0.2.0.dev0"
