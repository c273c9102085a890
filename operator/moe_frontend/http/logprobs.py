"""Log-probabilities of tokens with their texts. Pure."""

import codecs
from collections.abc import Iterable, Sequence

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
        echo: the prompt as the client wrote it, which stands before the text; "": there is none, or it
            consists of token ids, and its text is that of the tokens.
    """

    def __init__(self, echo: str = "") -> None:
        self._echo = echo
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take_prompt(self, found: Sequence[inference_pb2.PromptToken]) -> tuple[str, Logprobs]:
        """The next tokens of the prompt: their text, and what the model thought of them.

        A first token that the prompt does not begin with was put there by the tokenizer: it is no text.
        """
        logprobs, texts = Logprobs([], [], [], []), []
        for token in found:
            text = piece_text(token.piece)
            logprob = token.logprob if token.HasField("logprob") else None
            _append(logprobs, text, logprob, token.top, self._offset)
            prefixed = logprob is None and self._echo and not self._echo.encode().startswith(token.piece)
            if not prefixed:
                texts.append(self._decoder.decode(token.piece))
                self._offset += len(texts[-1])
        return "".join(texts), logprobs

    def take(self, found: Iterable[inference_pb2.TokenLogprobs]) -> Logprobs:
        """The next tokens; a text offset is that of the first character which the token completes."""
        logprobs = Logprobs([], [], [], [])
        for token in found:
            if self._echo:  # the text goes on behind the prompt, however its tokens spell that
                self._offset, self._echo = len(self._echo), ""
                self._decoder.reset()
            _append(logprobs, piece_text(token.piece), token.logprob, token.top, self._offset)
            self._offset += len(self._decoder.decode(token.piece))
        return logprobs


def _append(
    to: Logprobs, text: str, logprob: float | None, top: Iterable[inference_pb2.TopLogprob], offset: int
) -> None:
    likely = {piece_text(one.piece): one.logprob for one in top}
    to.tokens.append(text)
    to.token_logprobs.append(logprob)
    if logprob is None:
        to.top_logprobs.append(None)
    else:
        to.top_logprobs.append(likely | {text: logprob} if likely else {})
    to.text_offset.append(offset)


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
