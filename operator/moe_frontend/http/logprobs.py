"""Log-probabilities of tokens with their texts. Pure."""

import codecs
from collections.abc import Iterable

from moe_api.inference.v1 import inference_pb2
from moe_frontend.http.answers import ChatLogprobs, ChosenToken, LikelyToken, Logprobs


def piece_text(piece: bytes) -> str:
    """The text of a token; of one that is not whole UTF-8 characters its bytes, written as OpenAI does."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class CompletionLogprobs:
    """Of one text, message by message.

    Args:
        offset: characters of the text before the first token: those of the prompt, where it is echoed.
    """

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, found: Iterable[inference_pb2.TokenLogprobs]) -> Logprobs:
        """The next tokens; a text offset is that of the first character which the token completes."""
        logprobs = Logprobs([], [], [], [])
        for token in found:
            text = piece_text(token.piece)
            logprobs.tokens.append(text)
            logprobs.token_logprobs.append(token.logprob)
            likely = {piece_text(top.piece): top.logprob for top in token.top}
            logprobs.top_logprobs.append(likely | {text: token.logprob} if likely else {})
            logprobs.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(token.piece))
        return logprobs


def joined(parts: Iterable[Logprobs]) -> Logprobs:
    """Those of a whole text."""
    whole = Logprobs([], [], [], [])
    for part in parts:
        whole.tokens.extend(part.tokens)
        whole.token_logprobs.extend(part.token_logprobs)
        whole.top_logprobs.extend(part.top_logprobs)
        whole.text_offset.extend(part.text_offset)
    return whole


def chat_logprobs(found: Iterable[inference_pb2.TokenLogprobs]) -> ChatLogprobs:
    """Those of a chat's message."""
    return ChatLogprobs(
        [
            ChosenToken(
                piece_text(token.piece),
                token.logprob,
                list(token.piece),
                [LikelyToken(piece_text(top.piece), top.logprob, list(top.piece)) for top in token.top],
            )
            for token in found
        ]
    )
