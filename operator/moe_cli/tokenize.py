"""`moe tokenize`."""

import click

from moe_api.inference.v1 import inference_pb2
from moe_client.calling import TEXT, calling, model_options
from moe_client.endpoint import Endpoint


@click.command()
@model_options
@click.option("--special", is_flag=True, help="Prepend the begin-of-text token, as generate does.")
@click.argument("text", type=TEXT)
def tokenize(endpoint: Endpoint, model: str, timeout: float | None, text: str, *, special: bool) -> None:
    """Prints the token ids of TEXT ("-" reads standard input)."""
    request = inference_pb2.TokenizeRequest(model=model, text=text, add_special_tokens=special)
    with calling(endpoint) as stub:
        response = stub.Tokenize(request, timeout=timeout, metadata=endpoint.metadata)
    click.echo(" ".join(map(str, response.tokens.ids)))
