"""A node's side under Flower: a ``ClientApp`` that hands requests to the node's site."""

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hansa.errors import InputError, first_line
from hansa.federation.engines.flower.exchange import Answer, Request
from hansa.federation.engines.flower.records import from_records, to_records
from hansa.federation.message import MessageError

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
        except (InputError, MessageError) as error:
            answer = Answer("", status="refused", error=first_line(error))
        return Message(to_records(answer), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    app.query()(handle)
    app.query("end")(handle)
    return app
