"""Flower's two kinds of apps: what a node runs for each message, and what a server runs."""

from collections.abc import Callable

from flwr.app import Context as Context
from flwr.app import Message
from flwr.clientapp import ClientApp as ClientApp
from flwr.serverapp import Grid as Grid
from flwr.serverapp import ServerApp as ServerApp

from hansa.errors import InputError, first_line
from hansa.federation.engines.flower.exchange import Answer, LetterError, Request
from hansa.federation.engines.flower.records import from_records, to_records

Answering = Callable[[Request], Answer]


def client_app(site: Callable[[Context], Answering]) -> ClientApp:
    """Return the app of a node.

    Args:
        site: called with Flower's context, returns what answers requests at this node.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            answer = site(context)(from_records(Request, message.content))
        except (InputError, LetterError) as error:
            answer = Answer("", status="refused", error=first_line(error))
        return Message(to_records(answer), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    app.query()(handle)
    app.query("end")(handle)
    return app


def server_app(serve: Callable[[Grid], None]) -> ServerApp:
    """Return the app of a server."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    return app
