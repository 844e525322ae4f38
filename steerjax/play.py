"""A page to steer a chat model on: a slider for each attribute, two settings side by side.

steerjax play --model CHAT [--reward-model RM]
steerjax play --server URL --model FOLDER_THAT_IT_SERVES

Attributes, ranges and meanings are the model's. With --reward-model each answer is rated, and what is predicted stands
beside what was asked for. The page is for this machine alone, unless --host says otherwise, and speaks to nobody else.
"""

import argparse
import contextlib
from collections.abc import Sequence

from steerjax.command import KEY, MODEL, add_model_options
from steerjax.errors import ConfigError, ModelError, reported_errors
from steerjax.schema import SCHEMAS
from steerjax.signals import raises_interrupt


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steerjax play", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help=MODEL)
    add("--reward-model", metavar="DIR", help="rates the answers")
    add("--server", metavar="URL", help=f"e.g. http://localhost:8000, and --model the folder it serves; {KEY}")
    add("--server-model", metavar="NAME", help="which of the server's models; default: the only one")
    add("--schema", choices=SCHEMAS, help="attributes of a model that does not name them")
    add("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network; there is no password")
    add("--port", type=int, metavar="N", help="default: the first that is free from 7860 on")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default; the page can change it")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="answers are cut there; default 512")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add_model_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    o = parse_arguments(arguments)
    with raises_interrupt(), reported_errors(), contextlib.suppress(KeyboardInterrupt):
        if not (o.model or o.server):
            raise ConfigError("neither --model nor --server; cure: one of them")
        if o.port is not None and not 0 < o.port < 2**16:
            raise ConfigError(f"--port {o.port}: no port; cure: 1 to 65535")
        from steerjax.playground.page import require_gradio, serve

        require_gradio()
        from steerjax.api import connect, load
        from steerjax.inference.steering import Sampling
        from steerjax.playground.player import Player
        from steerjax.typed import typed

        asked = {name: getattr(o, name) for name in ("temperature", "seed", "max_new_tokens")}
        sampling = typed(Sampling, asked, "options", ConfigError)
        verify = not o.no_verify
        if o.server:
            known = {"like": o.model, "template": o.template, "schema": o.schema, "attempts": 2}
            chat = connect(o.server, model=o.server_model, **known)
        else:
            chat = load(o.model, template=o.template, schema=o.schema, mesh=o.mesh, dtype=o.dtype, verify=verify)
        if not chat.attributes_known:
            cure = f"--schema NAME{', or --model, the folder that it serves' if o.server else ''}"
            raise ModelError(f"{chat!r} does not say which attributes it takes\n  cure: {cure}")
        judge = load(o.reward_model, mesh=o.mesh, dtype=o.dtype, verify=verify) if o.reward_model else None
        player = Player(chat, judge)
        with contextlib.closing(player):
            serve(player, sampling, o.host, o.port)


if __name__ == "__main__":
    main()
